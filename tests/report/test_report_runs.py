"""Reading run folders of any age and state."""

import math

import numpy as np
import pytest

from megamtp.errors import UserError
from megamtp.report.page import differences, summary
from megamtp.report.runs import read_run, read_runs
from tests.report.run_folders import ALL_EVENTS, event_line, step_line, validation_line, write_run


def of(run) -> dict[str, str]:
    return {label: value for label, (value,) in summary([run])}


def test_lines_are_sorted_and_the_later_one_of_a_step_wins(tmp_path):
    lines = [step_line(step, grad_norm=1.0) for step in (1, 2, 3)] + [step_line(2, grad_norm=5.0)]
    run = read_run(write_run(tmp_path / "run", lines), "run")
    steps, norms = run.numbers("grad_norm")
    assert steps.tolist() == [1, 2, 3] and norms.tolist() == [1, 5, 1]
    assert run.notes == ["config.yaml: No such file or directory"]


def test_steps_that_were_rolled_back_are_gone(tmp_path):
    lines = [step_line(step) for step in range(1, 9)] + [validation_line(8, [1.0, 2.0])]
    lines += [event_line(8, "rolled_back", to_step=4, skipped_samples=16), step_line(5)]
    run = read_run(write_run(tmp_path / "run", lines), "run")
    assert list(run.steps) == [1, 2, 3, 4, 5] and not run.validation
    assert of(run)["steps"] == "5" and of(run)["rolled back"] == "1"


def test_broken_and_unknown_lines_are_told_and_passed_over(tmp_path):
    records = [step_line(1), {"step": 1, "unheard_of": [1, {}]}, step_line(2, n_heads=2, unknown="key")]
    folder = write_run(tmp_path / "run", records, config={"a": 1}, tail='{"step": 3, "lo')
    assert read_run(folder, "run").notes == []  # a torn last line is what a crash leaves
    text = (folder / "metrics.jsonl").read_text()
    broken = ["not JSON", "[1]", '{"loss": 1.0}', '{"step": "4", "loss": 1.0}', "\x00\x00", "[" * 100_000]
    (folder / "metrics.jsonl").write_text("\n".join(broken) + "\n\n" + text)
    run = read_run(folder, "run")
    assert list(run.steps) == [1, 2]
    assert run.notes == ["metrics.jsonl: 6 lines are no records of a step; the first is line 1"]


def test_what_is_no_finite_number_is_nan(tmp_path):
    values = [None, "fast", True, [1], {}, 10**400]
    lines = [step_line(step, grad_norm=value) for step, value in enumerate(values, start=1)]
    folder = write_run(tmp_path / "run", [*lines, step_line(7, loss_per_head=[None, 3.0])])
    (folder / "metrics.jsonl").open("a").write('{"step": 8, "loss": 1, "grad_norm": Infinity}\n')
    run = read_run(folder, "run")
    steps, norms = run.numbers("grad_norm")
    assert steps.tolist() == list(range(1, 9))
    assert np.isnan(norms).tolist() == [True] * 6 + [False, True]
    assert run.numbers("loss_per_head", 0)[0].tolist() == list(range(1, 8))
    assert math.isnan(run.numbers("loss_per_head", 0)[1][-1])
    assert run.numbers("loss_per_head", 5)[0].tolist() == []


def test_the_summary_counts_what_happened(tmp_path):
    lines = [step_line(step) for step in range(1, 31)] + ALL_EVENTS
    lines += [validation_line(30, [2.5, 3.25])]
    told = of(read_run(write_run(tmp_path / "run", lines, config={"training": {"steps": 1200}}), "run"))
    assert told == {
        "steps": "30 of 1,200",
        "tokens": "15,360",
        "wall time": "1 min 0 s in steps, 1 min 0 s from first to last line",
        "loss per head, nats": f"{2 + 5 * math.exp(-30 / 40):.3f} · {3 + 5 * math.exp(-30 / 40):.3f}",
        "validation loss per head, nats": "2.500 · 3.250 (step 30)",
        "validation accuracy per head, %": f"{100 * math.exp(-2.5):.1f} · {100 * math.exp(-3.25):.1f} (step 30)",
        "tokens/s, median": "256",
        "MFU, median": "25.0 %",
        "peak memory of the main rank": "0.50 GiB",
        "layout": "tensor 2 x pipeline 1 x data 1 (2 ranks), before: tensor 2 x pipeline 1 x data 2 (4 ranks)",
        "restarts": "1",
        "skipped steps": "1",
        "rolled back": "0",
        "checkpoints": "1",
        "checkpoints that failed": "1",
        "damaged checkpoints": "1",
    }


def test_an_old_run_tells_less(tmp_path):
    new = ("time", "seconds", "seconds_per_part", "slowest_rank")
    lines = [{key: value for key, value in step_line(step).items() if key not in new} for step in (1, 2, 3, 4)]
    for line in lines[2:]:
        line["skipped_steps"] = 1
    run = read_run(write_run(tmp_path / "run", lines), "run")
    told = of(run)
    assert told["wall time"] == "8.0 s in steps"  # 2048 tokens at 256 a second
    assert told["skipped steps"] == "1" and "restarts" not in told and "checkpoints" not in told
    assert [(event["step"], event["event"]) for event in run.events] == [(3, "skipped")]


def test_runs_are_named_by_folder_and_by_path_where_that_is_not_enough(tmp_path):
    folders = [write_run(tmp_path / name, [step_line(1)]) for name in ("x/demo", "y/demo", "other")]
    assert [run.name for run in read_runs(folders)] == [str(folders[0]), str(folders[1]), "other"]


def test_configs_are_compared_key_by_key(tmp_path):
    configs = [
        {"model": {"dim": 64, "n_heads": 4}, "data": {"train": ["a"]}, "heads": {}},
        {"model": {"dim": 96, "n_heads": 4}, "data": {"train": ["a"]}, "heads": {}, "monitor": {"wandb": True}},
    ]
    runs = read_runs([write_run(tmp_path / str(i), [step_line(1)], config) for i, config in enumerate(configs)])
    assert differences(runs) == [("model.dim", ["64", "96"]), ("monitor.wandb", ["-", "True"])]
    assert differences(runs[:1]) == []


@pytest.mark.parametrize("text", ["{a: [", "a: 2026-99-99", "\x00", "- 1", "[" * 10_000])
def test_a_config_that_cannot_be_read_is_a_note(tmp_path, text):
    folder = write_run(tmp_path / "run", [step_line(1)])
    (folder / "config.yaml").write_text(text)
    run = read_run(folder, "run")
    assert run.config == {} and list(run.steps) == [1]
    assert bool(run.notes) == (text != "- 1")


def test_no_metrics_is_an_error(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="metrics.jsonl: cannot read the metrics: No such file"):
            read_run(folder, "run")
