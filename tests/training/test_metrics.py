"""What a run writes about itself."""

import json
import math
import sys
import time
import types

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megamtp.config import load
from megamtp.errors import UserError
from megamtp.model.cost import train_flops_per_token
from megamtp.training.metrics import MetricsWriter, MonitorConfig, reduce_heads
from megamtp.training.run_config import RunConfig
from tests.distributed import run_rank
from tests.training.tiny import GLOBAL_BATCH, SEQ_LEN, lines, run_config, run_training, step_lines, validation_lines

WEIGHTS = [1.0, 0.5, 2.0, 0.25]
CHANGES = {
    "training.steps": 5,
    "training.eval_every": 2,
    "training.eval_samples": 3,
    "training.peak_tflops": 0.5,
    "heads.loss_weights": WEIGHTS,
}


@pytest.fixture(scope="module")
def run_dir(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert run_rank(run_training, run_config(folder, corpus, CHANGES)) == 0
    return folder


def scalars(folder, tag: str) -> list[tuple[int, float]]:
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in board.Scalars(tag)]


def test_one_line_a_step_with_every_key(run_dir, corpus):
    steps = step_lines(run_dir)
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
    config = run_config(run_dir, corpus, CHANGES)
    flops = train_flops_per_token(config.model, SEQ_LEN)
    for line in steps:
        assert line["tokens"] == line["step"] * GLOBAL_BATCH * SEQ_LEN
        assert len(line["loss_per_head"]) == len(line["accuracy_per_head"]) == 4
        weighted = sum(weight * loss for weight, loss in zip(WEIGHTS, line["loss_per_head"], strict=True))
        assert line["loss"] == pytest.approx(weighted, rel=1e-12)
        assert all(0 < loss < 2 * math.log(config.model.vocab_size) for loss in line["loss_per_head"])
        assert all(0 <= accuracy <= 1 for accuracy in line["accuracy_per_head"])
        assert 0 < line["lr"] <= config.optimizer.lr
        assert line["grad_norm"] > 0
        assert line["skipped_steps"] == 0
        assert line["tokens_per_s"] > 0
        assert line["tflops"] == pytest.approx(line["tokens_per_s"] * flops / 1e12, rel=1e-9)
        assert line["mfu"] == pytest.approx(line["tflops"] / 0.5, rel=1e-9)
        assert 0.01 < line["memory_gib"] < 64


def test_validation_lines_at_their_steps_and_at_the_end(run_dir):
    found = validation_lines(run_dir)
    assert [line["step"] for line in found] == [2, 4, 5]
    for line in found:
        assert len(line["validation_loss_per_head"]) == len(line["validation_accuracy_per_head"]) == 4
        # Three samples; some targets lie in the next document.
        assert 0 < line["validation_targets"] <= 3 * SEQ_LEN


def test_tensorboard_has_the_same_numbers(run_dir):
    for k in range(4):
        expected = [(line["step"], line["loss_per_head"][k]) for line in step_lines(run_dir)]
        found = scalars(run_dir, f"loss_per_head/head_{k + 1}")
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=1e-6)
    assert len(scalars(run_dir, "validation_loss_per_head/head_4")) == 3


def test_the_written_config_is_the_config(run_dir, corpus):
    assert load(RunConfig, run_dir / "config.yaml", []) == run_config(run_dir, corpus, CHANGES)


def test_a_resumed_writer_drops_later_lines_and_a_torn_one(tmp_path):
    first = MetricsWriter(tmp_path, 0)
    for step in range(1, 7):
        first.write({"step": step, "loss": float(step), "loss_per_head": [1.0, 2.0], "mfu": None})
        first.write({"step": step, "validation_targets": step})
    first.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')  # a crash in the middle of a line
    resumed = MetricsWriter(tmp_path, 4)
    resumed.write({"step": 5, "loss": 50.0})
    resumed.close()
    assert [(line["step"], line.get("loss")) for line in lines(tmp_path)] == [
        *((step, loss) for step in range(1, 5) for loss in (float(step), None)),
        (5, 50.0),
    ]
    assert scalars(tmp_path, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0)]


def test_lines_that_are_no_records_survive_a_resume(tmp_path):
    foreign = ["[1, 2]", '{"note": "by hand"}', "not JSON", '{"step": "last"}']
    (tmp_path / "metrics.jsonl").write_text("\n".join([*foreign, '{"step": 2}', '{"step": 9}']) + "\n")
    MetricsWriter(tmp_path, 4).close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [*foreign, '{"step": 2}']


def test_a_new_run_in_an_old_folder_starts_an_empty_file(tmp_path):
    for value in (1.0, 2.0):
        writer = MetricsWriter(tmp_path, 0)
        writer.write({"step": 1, "loss": value})
        writer.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 2.0)]
    assert scalars(tmp_path, "loss") == [(1, 2.0)]


def test_an_event_is_a_line_with_its_time_and_no_curve(tmp_path):
    writer, before = MetricsWriter(tmp_path, 0), time.time()
    writer.write({"step": 1, "loss": 1.0, "time": before})
    writer.event(1, "skipped", reason="non-finite", loss=math.nan, grad_norm=math.inf)
    (*_, event) = lines(tmp_path)  # before the writer is closed
    writer.close()
    assert before <= event.pop("time") <= time.time()
    assert event == {"step": 1, "event": "skipped", "reason": "non-finite", "loss": None, "grad_norm": None}
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert board.Tags()["scalars"] == ["loss"]


def test_steps_that_were_rolled_back_are_one_curve_in_tensorboard(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    for step in range(1, 6):
        writer.write({"step": step, "loss": float(step)})
    writer.event(5, "rolled_back", to_step=2, skipped_samples=8)
    writer.write({"step": 3, "loss": 30.0})
    writer.close()
    assert scalars(tmp_path, "loss") == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 5, 3]  # the event stays


def test_lines_are_on_disk_at_once(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write({"step": 1, "loss": 1.0})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 1.0}
    writer.close()


def test_without_tensorboard_there_is_no_file_of_it(tmp_path):
    writer = MetricsWriter(tmp_path, 0, MonitorConfig(tensorboard=False))
    writer.write({"step": 1, "loss": 1.0})
    writer.event(1, "rolled_back", to_step=0, skipped_samples=8)
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


class FakeWandb(types.ModuleType):
    """Stands in for the package and records what it is called with."""

    class Error(Exception):
        pass

    def __init__(self, refusal: str | None = None):
        super().__init__("wandb")
        self.calls, self.refusal = [], refusal

    def init(self, **options):
        if self.refusal:
            raise self.Error(self.refusal)
        self.calls.append(("init", options))

    def log(self, data, step=None, commit=None):
        self.calls.append(("log", step, data))

    def finish(self):
        self.calls.append(("finish",))


def write_to_fake_wandb(_, folder):
    fake = sys.modules["wandb"] = FakeWandb()
    monitor = MonitorConfig(tensorboard=False, wandb=True, wandb_project="far tokens")
    for step in (0, 1):
        writer = MetricsWriter(folder, step, monitor)
        writer.write({"step": step + 1, "time": 5.0, "loss": 1.5, "loss_per_head": [1.0, 0.5], "mfu": None})
        writer.event(step + 1, "checkpoint", seconds=1.0)
        writer.close()
    sys.modules["wandb"] = FakeWandb("no API key\nconfigured")
    with pytest.raises(UserError, match="^monitor.wandb: no API key configured; .*WANDB_MODE=offline"):
        MetricsWriter(folder, 0, monitor)
    return fake.calls, lines(folder)


def test_wandb_gets_the_same_numbers_a_run_of_its_own_each_start(tmp_path):
    (tmp_path / "narrow").mkdir()
    calls, kept = run_rank(write_to_fake_wandb, tmp_path / "narrow")
    assert len(kept) == 4  # a start that fails drops nothing
    for step, of_start in enumerate((calls[:5], calls[5:]), start=1):
        assert of_start == [
            ("init", {"project": "far tokens", "group": "narrow", "entity": None}),
            ("log", step, {"loss": 1.5}),
            ("log", step, {"loss_per_head/head_1": 1.0}),
            ("log", step, {"loss_per_head/head_2": 0.5}),
            ("finish",),
        ]


def test_wandb_that_is_not_installed_is_told_before_anything_is_dropped(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # what makes an import fail
    (tmp_path / "metrics.jsonl").write_text('{"step": 7}\n')
    with pytest.raises(UserError, match="pip install wandb"):
        MetricsWriter(tmp_path, 0, MonitorConfig(wandb=True))
    assert lines(tmp_path) == [{"step": 7}]


class OneRank:
    """A grid whose sum over the ranks is the value itself."""

    rank, world_size = 0, 1

    def sum_over_ranks(self, values):
        return values


def test_means_are_over_valid_targets():
    sums, counts, correct = torch.tensor([[6.0, 1.0, 0.0], [4.0, 2.0, 0.0], [1.0, 2.0, 0.0]])
    heads = reduce_heads(sums, counts, correct, OneRank())
    assert heads.losses[:2] == [1.5, 0.5]
    assert heads.accuracies[:2] == [0.25, 1.0]
    assert heads.targets == 4
    assert math.isnan(heads.losses[2]) and math.isnan(heads.accuracies[2])
