"""The command ``tools/plan.py``: what it prints, writes and refuses."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megamtp.planner.devices import DEVICES
from tools.plan import main

ROOT = Path(__file__).parents[1]
CONFIG = str(ROOT / "configs" / "13b_n4.yaml")
SMALL_STEP = ["--parallel.pipeline", "4", "--training.global_batch_size", "256"]  # 8 micro-batches


def plan(*arguments, gpu="h100-80gb", gpus=256):
    main([CONFIG, "--gpu", gpu, "--gpus", str(gpus), *map(str, arguments)])


def refused(capsys, *arguments, **options) -> str:
    """The one line on stderr with which the command ends, exit code 2."""
    with pytest.raises(SystemExit) as ended:
        plan(*arguments, **options)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def test_own_layout(capsys, tmp_path):
    plan("--json", tmp_path / "plan.json")
    printed, values = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
    assert "13b_n4.yaml on 256 x h100-80gb" in printed
    assert "layout: TP 2 x PP 2 x DP 64, 1f1b, ZeRO-1; 32 micro-batches of 1; recompute none" in printed
    assert "pipeline stages" in printed and "fits: the device has 74.51" in printed
    total = float(re.findall(r"^  total +([\d.]+)$", printed, flags=re.M)[-1])
    assert total == pytest.approx(values["seconds_per_step"], abs=6e-4)
    assert f"{values['mfu']:.1%} MFU" in printed and f"{values['device_hours']:,.0f} device hours" in printed
    assert values["device"]["name"] == "h100-80gb" and values["device"]["count"] == 256
    assert values["assumptions"]["matmul_share"] == 0.65
    assert len(values["stages"]) == 2 and values["layout"]["micro_batches"] == 32


def test_ranking(capsys, tmp_path):
    plan("--rank", "--json", tmp_path / "rank.json")
    lines, values = capsys.readouterr().out.splitlines(), json.loads((tmp_path / "rank.json").read_text())
    assert len(values["layouts"]) == 10
    seconds = [layout["seconds_per_step"] for layout in values["layouts"]]
    assert seconds == sorted(seconds) and all(layout["fits"] for layout in values["layouts"])
    assert float(lines[2].split()[0]) == pytest.approx(seconds[0], abs=6e-4)
    assert values["considered"] > values["too_large"] > 0


def test_figures_and_assumptions_are_options(capsys, tmp_path):
    seconds = []
    for options in ([], ["--bf16-tflops", 100], ["--matmul-share", 0.9], ["--intra-gbs", 5], ["--overlap", 0]):
        plan(*options, "--json", tmp_path / "plan.json")
        seconds.append(json.loads((tmp_path / "plan.json").read_text())["seconds_per_step"])
    assert seconds[1] > seconds[0] > seconds[2] and seconds[3] > seconds[0] and seconds[4] > seconds[0]
    capsys.readouterr()


def test_a_users_own_gpu(capsys, tmp_path):
    file = tmp_path / "gpus.yaml"
    file.write_text(
        "big: {memory_gb: 400, bf16_tflops: 5000, bandwidth_gbs: 10000, intra_gbs: 1000, inter_gbs: 100, per_node: 72}"
    )
    plan("--gpu-file", file, gpu="BIG")
    assert "the device has 372.53" in capsys.readouterr().out
    for text, message in (
        ("big: {memory: 3}", "unknown figure memory; known are memory_gb"),
        ("big: 3", "expected figures"),
        ("[big]", "expected a mapping"),
        ("big: {memory_gb: x, bandwidth_gbs: 1}", "memory_gb must be a number, got 'x'"),
        ("big: {memory_gb: 1}", "bandwidth_gbs missing"),
        ("big: {memory_gb: 1, bandwidth_gbs: 1, per_node: 1.5}", "per_node must be a whole number, got 1.5"),
        ("big: {memory_gb: 1", "cannot read it"),
    ):
        file.write_text(text)
        assert message in refused(capsys, "--gpu-file", file, gpu="big")
    assert "cannot read it" in refused(capsys, "--gpu-file", tmp_path / "none.yaml", gpu="big")


def test_a_cpu_is_described_by_options(capsys):
    figures = ["--memory-gb", 12, "--fp32-tflops", 0.05, "--bandwidth-gbs", 10, "--intra-gbs", 2, "--per-node", 2]
    main([str(ROOT / "configs" / "demo.yaml"), "--gpu", "cpu", "--gpus", "2", *map(str, figures)])
    assert "TP 1 x PP 1 x DP 2" in capsys.readouterr().out
    assert refused(capsys, gpu="cpu") == (
        "--gpu cpu: give --memory-gb, --bf16-tflops, --bandwidth-gbs, --intra-gbs, --inter-gbs as well: the table has "
        "no such figure for it"
    )


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ([], {"gpu": "h900"}, "--gpu h900: not known; use one of a100-40gb, "),
        ([], {"gpus": 0}, "--gpus must be 1 or more, got 0"),
        ([], {"gpus": 3}, "3 ranks do not make whole replicas of parallel.tensor 2 x parallel.pipeline 2"),
        ([], {"gpus": 24}, "training.global_batch_size 2048 does not divide into micro-batches of 1 on 6"),
        (["--matmul-share", 1.5], {}, "--matmul-share must be above 0, at most 1, got 1.5"),
        (["--slack", -1], {}, "--slack must be from 0, got -1.0"),
        (["--bandwidth-gbs", -1], {}, "--gpu h100-80gb: bandwidth_gbs must be a number from 0, got -1.0"),
        (["--memory-gb", "nan"], {}, "--gpu h100-80gb: memory_gb must be a number from 0, got nan"),
        (["--slack", "nan"], {}, "--slack must be from 0, got nan"),
        (["--per-node", 0], {}, "--gpu h100-80gb: per_node must be 1 or more"),
        (["--model.dimm", 1], {}, "command line: unknown key model.dimm; did you mean model.dim?"),
        (["--rank", "--memory-gb", 4], {}, "layouts fits into 3.7 GiB: the smallest (--parallel.tensor"),
        (["--rank", "--timeline", "x.svg"], {}, "--timeline draws the config's own layout; leave out --rank"),
        (["--timeline", "x.svg", "--parallel.pipeline", 1], {}, "--timeline draws a pipeline; parallel.pipeline is 1"),
        (["--timeline", "x.svg", "--training.global_batch_size", 8192], {}, "128 micro-batches are too many"),
        ([*SMALL_STEP, "--timeline", "x.xyz"], {}, "--timeline x.xyz: cannot write it"),
        ([*SMALL_STEP, "--timeline", "no/such/folder/x.svg"], {}, "--timeline no/such/folder/x.svg: cannot write it"),
    ],
)
def test_refusals(capsys, arguments, options, message):
    assert message in refused(capsys, *arguments, **options)


@pytest.mark.parametrize("schedule", ["1f1b", "dualpipev"])
def test_timeline(capsys, tmp_path, schedule):
    """Every pass is a box, every message an arrow, and the picture is the same each time."""
    pictures = []
    for name in ("a.svg", "b.svg"):
        plan(*SMALL_STEP, "--parallel.schedule", schedule, "--timeline", tmp_path / name)
        pictures.append((tmp_path / name).read_text())
    assert pictures[0] == pictures[1]
    assert "timeline: " in capsys.readouterr().out
    stages = 4 if schedule == "1f1b" else 8
    picture = pictures[0]
    # The legend has one more of each color. Of 8 stages the last holds heads alone, which have run backward before.
    heads_backward = 8 if schedule == "1f1b" else 0
    assert picture.count("fill: #fdae6b") == 8 + 1
    assert picture.count("fill: #e6550d") == (heads_backward and heads_backward + 1)
    assert picture.count("stroke: #ffffff") == 8 * (2 * stages - 1) + heads_backward
    for words in ("rank 3", "embedding", "heads", f"{schedule}, 4 pipeline ranks, 8 micro-batches"):
        assert words in picture
    plan(*SMALL_STEP, "--timeline", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_help_and_wrong_figures_need_no_torch():
    """They are told at once: torch takes seconds to import."""
    code = "import sys; sys.path.insert(0, '.'); from tools import plan\n"
    code += "try: plan.main(['x.yaml', '--gpu', 'h900', '--gpus', '8'])\n"
    code += "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.split() == ["2", "False"], result.stderr
    assert "h900: not known" in result.stderr


def test_planning_needs_no_deepspeed():
    code = "import sys; sys.path.insert(0, '.'); from tools import plan\n"
    code += "plan.main(['configs/13b_n4.yaml', '--gpu', 'h200', '--gpus', '8', '--rank'])\n"
    code += "print([room for room in ('deepspeed', 'matplotlib') if room in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr


def test_every_gpu_of_the_table_has_its_figures_and_source():
    for name, device in DEVICES.items():
        assert device.source
        figures = [device.memory_gb, device.bf16_tflops, device.fp32_tflops, device.bandwidth_gbs, device.intra_gbs]
        assert all(figures) != (name == "cpu")
