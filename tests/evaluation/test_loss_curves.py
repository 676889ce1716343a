import json
import math
import struct

import numpy as np
import pytest

from megamtp.errors import UserError
from megamtp.evaluation.loss_curves import plot_losses, read_curves, running_mean
from tools.plot_losses import main


def train_line(step, losses):
    record = {"step": step, "tokens": step * 512, "loss": sum(losses), "loss_per_head": losses, "lr": 1e-3}
    return json.dumps(record | {"accuracy_per_head": [0.1] * len(losses), "grad_norm": 1.0, "tokens_per_s": 9.0})


def evaluation_line(step, losses):
    accuracies = [math.exp(-loss) for loss in losses]
    return json.dumps({"step": step, "validation_loss_per_head": losses, "validation_accuracy_per_head": accuracies})


def run_folder(tmp_path, lines, tail=""):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text("".join(line + "\n" for line in lines) + tail)
    return run_dir


@pytest.fixture
def run_dir(tmp_path):
    rng, lines = np.random.default_rng(0), []
    for step in range(1, 201):
        losses = [2 + k + 5 * math.exp(-step / 40) for k in range(3)]
        lines.append(train_line(step, [loss + rng.normal(0, 0.1) for loss in losses]))
        if step % 50 == 0:
            lines.append(evaluation_line(step, losses))
    return run_folder(tmp_path, lines)


def png_size(path):
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and b"IEND" in content[-12:]
    return struct.unpack(">II", content[16:24])


def test_reads_both_kinds_of_line(run_dir):
    curves = read_curves(run_dir)
    assert curves.n_heads == 3
    assert curves.train_loss.shape == (200, 3)
    assert curves.validation_loss.shape == curves.validation_accuracy.shape == (4, 3)
    np.testing.assert_array_equal(curves.train_steps, np.arange(1, 201))
    np.testing.assert_array_equal(curves.validation_steps, [50, 100, 150, 200])
    np.testing.assert_allclose(curves.validation_accuracy, np.exp(-curves.validation_loss))


def test_the_later_line_of_a_step_wins(tmp_path):
    first = [train_line(s, [9.0, 9.5]) for s in (1, 2, 3)] + [evaluation_line(2, [9.0, 9.5])]
    resumed = [train_line(s, [1.0, 1.5]) for s in (2, 3, 4)] + [evaluation_line(2, [1.0, 1.5])]
    curves = read_curves(run_folder(tmp_path, first + resumed))
    np.testing.assert_array_equal(curves.train_steps, [1, 2, 3, 4])
    np.testing.assert_array_equal(curves.train_loss, [[9, 9.5], [1, 1.5], [1, 1.5], [1, 1.5]])
    np.testing.assert_array_equal(curves.validation_loss, [[1, 1.5]])


@pytest.mark.parametrize("keep", [1, 10, -1])
def test_a_torn_last_line_is_dropped(tmp_path, keep):
    lines = [train_line(1, [5.0]), train_line(2, [4.0])]
    curves = read_curves(run_folder(tmp_path, lines, tail=train_line(3, [3.0])[:keep]))
    np.testing.assert_array_equal(curves.train_steps, [1, 2])


def test_a_whole_last_line_without_newline_counts(tmp_path):
    curves = read_curves(run_folder(tmp_path, [train_line(1, [5.0])], tail=train_line(2, [4.0])))
    np.testing.assert_array_equal(curves.train_steps, [1, 2])


def test_not_a_number_stays_a_gap(tmp_path):
    lines = [train_line(1, [5.0]), train_line(2, [math.nan]), train_line(3, [4.0]).replace("[4.0]", "[null]")]
    run_dir = run_folder(tmp_path, lines)
    np.testing.assert_array_equal(read_curves(run_dir).train_loss, [[5.0], [math.nan], [math.nan]])
    plot_losses(run_dir, tmp_path / "gap.png")


def test_other_lines_are_passed_over(tmp_path):
    curves = read_curves(run_folder(tmp_path, ['{"event": "resumed"}', "", train_line(1, [5.0])]))
    np.testing.assert_array_equal(curves.train_steps, [1])
    assert curves.validation_loss.size == 0


@pytest.mark.parametrize(
    "lines, message",
    [
        ([], "no training or evaluation line"),
        (['{"event": "started"}'], "no training or evaluation line"),
        (['{"step": 1, "lo', train_line(2, [4.0])], "metrics.jsonl:1: not a JSON object"),
        ([train_line(1, [4.0]), "[1, 2]"], "metrics.jsonl:2: not a JSON object"),
        (['{"loss_per_head": [1.0]}'], "metrics.jsonl:1: no 'step'"),
        ([train_line(1, [4.0]), train_line(2, [4.0, 5.0])], r"lines with \[1, 2\] heads"),
    ],
)
def test_refuses_what_it_cannot_read(tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        read_curves(run_folder(tmp_path, lines))


def test_refuses_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="cannot read the metrics"):
        plot_losses(tmp_path, tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("length, window", [(1, 1), (7, 1), (7, 3), (40, 5), (5, 5)])
def test_running_mean(length, window):
    values = np.random.default_rng(1).normal(size=length)
    half = window // 2
    expected = [values[max(0, i - half) : i + half + 1].mean() for i in range(length)]
    np.testing.assert_allclose(running_mean(values, window), expected)


def test_draws_a_picture(run_dir, tmp_path):
    output = tmp_path / "new" / "losses.png"
    plot_losses(run_dir, output, baseline=("Kneser-Ney bigram", 3.21))
    assert png_size(output) == (1200, 500)
    assert output.stat().st_size > 20_000
    assert [path.name for path in output.parent.iterdir()] == ["losses.png"]


@pytest.mark.parametrize("line", [train_line(1, [5.0]), evaluation_line(1, [5.0])])
def test_draws_a_run_of_one_line(tmp_path, line):
    plot_losses(run_folder(tmp_path, [line]), tmp_path / "one.png")
    assert png_size(tmp_path / "one.png") == (1200, 500)


def test_command(run_dir, tmp_path, capsys):
    main([str(run_dir), "--baseline", "Kneser-Ney bigram=3.21"])
    assert png_size(run_dir / "losses.png") == (1200, 500)
    assert capsys.readouterr().out.strip() == str(run_dir / "losses.png")
    main([str(run_dir), "--output", str(tmp_path / "picture.png")])
    assert png_size(tmp_path / "picture.png") == (1200, 500)
    for wrong in ("3.21", "bigram=", "bigram=nan", "=3"):
        with pytest.raises(SystemExit) as exit:
            main([str(run_dir), "--baseline", wrong])
        assert exit.value.code == 2
        assert "LABEL=NATS" in capsys.readouterr().err
