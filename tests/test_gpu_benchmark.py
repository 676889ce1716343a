"""The GPU's benchmark in small on a CPU: it goes on where it stopped, and ends with the figures by name."""

import json
import subprocess
import sys

import pytest
import torch

NAMES = {"mfu_1.3b_n4", "mfu_3b_n4", "time_over_flops_n4", "memory_ratio_n4_n1", "cross_entropy_share"}


def run(path, *arguments: str) -> tuple[dict, subprocess.CompletedProcess]:
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--tiny", "--output", str(path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done


def test_it_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "results.json"
    last, _ = run(path, "--only", "ceilings gemm|heads naive")
    first = json.loads(path.read_text())
    assert last["left"] == 0 and first["results"].keys() == {"ceilings gemm", "heads naive"} and last.keys() >= NAMES
    last, done = run(path, "--only", "ceilings|loss", "--minutes", "0")
    assert last["left"] == 2 and "2 measurements left: run it again" in done.stderr
    last, done = run(path, "--only", "ceilings|loss")
    record = json.loads(path.read_text())
    assert last["left"] == 0 and 0 < record["cross_entropy_share"] == last["cross_entropy_share"] < 2
    assert record["results"]["ceilings gemm"] == first["results"]["ceilings gemm"]  # not measured again
    assert record["tiny"] and "heads naive" in done.stdout and "loss cross-entropy" in done.stdout


@pytest.mark.slow
def test_all_of_it(tmp_path):
    last, done = run(tmp_path / "results.json", "--minutes", "6")
    assert last["left"] == 0, done.stdout
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    trained = [value for key, value in results.items() if key.startswith("train")]
    assert len(trained) == 14 and all(value["tokens_per_s"] > 0 for value in trained)
    assert results["precision bf16"]["over_fp32"] == pytest.approx(1, rel=0.01)
    assert results["decode plain"]["cost_of_a_pass"] > 1 and last["time_over_flops_n4"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, "benchmarks/gpu.py"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "there is no GPU here; --device cpu --tiny runs the same code" in done.stderr
