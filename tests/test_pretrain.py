"""The command ``pretrain.py``: what it prints, what it refuses and with which exit code."""

import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

import pretrain
from megamtp.config import leaves, load
from megamtp.training.run_config import RunConfig
from tests.distributed import Outcome, run_rank, start_ranks
from tests.training.tiny import VOCAB, config_dict, exact, newest, run_config, run_training, step_lines, write_corpus

ROOT = Path(pretrain.__file__).parent


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "train", n_documents=60, seed=0)
    write_corpus(folder / "validation", n_documents=10, seed=1)
    return folder


@pytest.fixture
def config_file(corpus, tmp_path) -> Path:
    """A config of two steps into ``tmp_path / "run"``."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(config_dict(tmp_path / "run", corpus, {"training.steps": 2})))
    return path


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def run_main(*arguments) -> Outcome:
    """The command with a process group of its own, in a new process without launcher."""
    return start_ranks(1, pretrain.main, [str(argument) for argument in arguments], launched=False)[0]


def refused(outcome: Outcome) -> str:
    """The one line with which the command, exit code 2, says what is wrong."""
    assert outcome.code == 2, outcome.error or outcome.stderr
    assert "Traceback" not in outcome.stderr
    errors = [line for line in outcome.stderr.splitlines() if "error" in line.lower()]
    assert len(errors) == 1, outcome.stderr
    assert errors[0].startswith("error: ")
    return errors[0]


# --- help and dry run


def test_help_lists_every_key():
    result = subprocess.run([sys.executable, "pretrain.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stderr == ""
    listed = re.findall(r"^ *--(\S+)", result.stdout, flags=re.M)
    keys = [key for key, _, _ in leaves(RunConfig)]
    assert len(keys) > 30
    assert set(keys) <= set(listed)
    assert "--dry-run" in result.stdout


def test_no_argument_prints_the_help_and_fails(capsys):
    with pytest.raises(SystemExit) as ended:
        pretrain.main([])
    assert ended.value.code == 2
    assert "--training.steps" in capsys.readouterr().out


def test_a_dry_run_describes_the_run_and_leaves_no_trace(config_file, tmp_path, capsys):
    assert pretrain.main([str(config_file), "--dry-run", "--training.steps", "7"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert yaml.safe_load(out[: out.index("parameters:")])["training"]["steps"] == 7
    # By hand: 32 x 128 twice (the vocabulary of 101 is padded), 6 blocks, one norm.
    block = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 2 * 32
    total = 2 * 32 * 128 + 6 * block + 32
    assert re.search(rf"total +{total:,}", out)
    # Per token and matrix element 6 FLOPs; attention sees (16 + 1) / 2 positions; 4 unembeddings of 101 rows.
    flops = 3 * (6 * (2 * (block - 64) + 4 * 32 * 17 / 2) + 4 * 2 * 32 * VOCAB)
    assert f"training FLOPs per token: {flops:,.0f}" in out
    assert f"tokens of the whole run: {7 * 8 * 16:,}" in out
    assert "memory estimate" in out
    assert not (tmp_path / "run").exists()


# --- runs


def test_overrides_change_the_run_and_are_written_down(config_file, tmp_path):
    overrides = ["--model.dim=48", "--training.steps", "5", f"--run_dir={tmp_path / 'other'}"]
    outcome = run_main(config_file, *overrides, "--heads.loss_weights", "[1, 1, 0.5, 0.5]")
    assert outcome.code == 0, outcome.error or outcome.stderr
    assert len(step_lines(tmp_path / "other")) == 5
    written = load(RunConfig, tmp_path / "other" / "config.yaml", [])
    assert (written.model.dim, written.training.steps) == (48, 5)
    assert written.heads.loss_weights == [1.0, 1.0, 0.5, 0.5]
    assert newest(tmp_path / "other").manifest["model"]["dim"] == 48
    assert not (tmp_path / "run").exists()
    # What to expect is said before the first step; of a CPU there is no time.
    (estimate,) = re.findall(r"^estimate: .*", outcome.stdout, flags=re.M)
    assert estimate.endswith("TFLOP a step") and "GiB on the fullest rank" in estimate
    # And beside it, after 5 steps, what it was.
    (beside,) = re.findall(r"estimated / measured: ([\d.]+) / ([\d.]+) GiB resident", outcome.stderr + outcome.stdout)
    assert 0 <= float(beside[0]) < float(beside[1]) < 0.5


def test_two_ranks_under_torchrun(config_file, corpus, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "pretrain.py"]
    command += [str(config_file), "--parallel.zero_stage", "1"]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr
    assert set(newest(tmp_path / "run").manifest["files"]) == {"rank-00000.safetensors", "rank-00001.safetensors"}
    # The run of one rank, without launcher, as the reference.
    run_rank(run_training, run_config(tmp_path / "one", corpus, {"training.steps": 2}))
    for ours, reference in zip(step_lines(tmp_path / "run"), step_lines(tmp_path / "one"), strict=True):
        assert ours["loss_per_head"] == pytest.approx(reference["loss_per_head"], rel=2e-6)


def test_sigterm_saves_and_the_same_command_goes_on_exactly(config_file, corpus, tmp_path):
    long = {"training.steps": 100_000}
    command = [sys.executable, "pretrain.py", str(config_file), "--training.steps", "100000"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    stopped = newest(tmp_path / "run").manifest["step"]
    assert [line["step"] for line in step_lines(tmp_path / "run")] == list(range(1, stopped + 1))
    assert f"stopped by SIGTERM after step {stopped}, checkpoint saved" in out

    until = {"training.stop_after": stopped + 3}
    assert run_main(config_file, "--training.steps", 100_000, "--training.stop_after", stopped + 3).code == 0
    run_rank(run_training, run_config(tmp_path / "unbroken", corpus, long | until))
    resumed, unbroken = (step_lines(tmp_path / name) for name in ("run", "unbroken"))
    assert [exact(line) for line in resumed] == [exact(line) for line in unbroken]


# --- refusals that need no process group: all of them come before any work, so a dry run finds them


def refused_by_dry_run(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as ended:
        pretrain.main([*(str(argument) for argument in arguments), "--dry-run"])
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--training.step", "3"], ["unknown key training.step", "did you mean training.steps?"]),
        (["--model.n_head", "4"], ["unknown key model.n_head", "did you mean model.n_heads?"]),
        (["--seq_len", "8"], ["unknown key seq_len", "did you mean data.seq_len?"]),
        (["--model.n_future_tokens", "6"], ["n_future_tokens 6 must be smaller than n_layers 6"]),
        (["--model.dim", "30"], ["dim 30 must be a multiple of n_heads 4"]),
        (["--model.dim", "wide"], ["model.dim", "valid integer", "'wide'"]),
        (["--training.steps", "0"], ["training.steps", "greater than or equal to 1"]),
        (["--training.precision", "fp16"], ["training.precision", "'fp32' or 'bf16'"]),
        (["--training.precision", "bf16"], ["bf16 needs parallel.zero_stage 1"]),
        (["--parallel.zero_stage", "4"], ["parallel.zero_stage", "less than or equal to 3"]),
        (["--heads.loss_weights", "[1, 1]"], ["heads.loss_weights has 2 entries; model.n_future_tokens is 4"]),
        (["--schedule.warmup_steps", "9"], ["schedule.warmup_steps 9 exceeds training.steps 2"]),
        (["--training.steps"], ["--training.steps needs a value"]),
        (["stray"], ["unexpected 'stray'"]),
        (["--data.seq_len", "100000"], ["train: a sequence longer than the data", "lower data.seq_len"]),
        (["--model.vocab_size", "40"], ["train: holds token 100", "model.vocab_size is 40"]),
        (["--data.train", "nowhere/data"], ["nowhere/data.idx: cannot read the data"]),
        (["--data.validation", "nowhere/data"], ["nowhere/data.idx: cannot read the data"]),
    ],
)
def test_a_wrong_value_is_one_line(config_file, capsys, overrides, expected):
    line = refused_by_dry_run(capsys, config_file, *overrides)
    for part in expected:
        assert part in line


@pytest.mark.parametrize(
    ("world_size", "overrides", "expected"),
    [
        (3, ["tensor=2"], "3 ranks do not make whole replicas of parallel.tensor 2 x parallel.pipeline 1 = 2 ranks"),
        (2, ["tensor=2", "pipeline=2"], "= 4 ranks; start 4 ranks, or change the layout"),
        (3, ["tensor=3"], "model.n_heads 4 does not divide by parallel.tensor 3; use a divisor of n_heads"),
        (2, ["tensor=2", "model.n_kv_heads=1", "model.ffn_dim=65"], "model.ffn_dim 65 does not divide by"),
        (6, ["tensor=6", "model.n_heads=12", "model.dim=48", "model.n_kv_heads=4"], "must divide model.n_kv_heads 4"),
        (2, ["tensor=2", "data.seq_len=15"], "data.seq_len 15 does not divide by parallel.tensor 2"),
        (2, ["tensor=2", "model.vocab_multiple=256"], "leaves tensor-parallel rank 1 with padding only; use a smaller"),
        (2, ["tensor=2", "heads.mode=naive"], "heads.mode naive needs whole logits"),
        (1, ["sequence=true"], "parallel.sequence needs parallel.tensor of 2 or more"),
        (2, ["pipeline=2", "zero_stage=2"], "the pipeline accumulates whole gradients over its micro-batches"),
        (2, ["tensor=2", "ops.compile=true"], "ops.compile compiles blocks that hold their whole weights"),
        (2, ["zero_stage=3", "ops.compile=true"], "ops.compile compiles blocks that hold their whole weights"),
        (2, ["zero_stage=3", "heads.mode=sequential"], "heads.mode sequential does not go with parallel.zero_stage 3"),
        (2, ["zero_stage=0", "offload_optimizer=true"], "parallel.offload_optimizer needs parallel.zero_stage 1, 2"),
        (8, ["pipeline=8"], "more than the 4 layers (embedding, 2 trunk layers, heads); lower parallel.pipeline"),
        (3, ["pipeline=3", "schedule=dualpipev"], "makes 6 stages, more than the 4 layers"),
        (2, ["schedule=dualpipev"], "parallel.schedule dualpipev needs parallel.pipeline of 2 or more"),
        (2, ["pipeline=2", "schedule=dualpipev", "training.micro_batch_size=4"], "2 micro-batches a step are too few"),
        (2, ["pipeline=2", "pipeline_cut=[1, 2]"], "holds 3 trunk layers; the model has 2"),
        (2, ["pipeline=2", "pipeline_cut=[2]"], "parallel.pipeline_cut has 1 entries; 1f1b over 2 ranks has 2 stages"),
        (4, ["pipeline=4", "pipeline_cut=[1, 0, 0, 1]"], "leaves a stage without layers"),
        (16, ["zero_stage=1"], "global_batch_size 8 does not divide into micro-batches of 2 on 16 data-parallel ranks"),
    ],
)
def test_a_layout_that_cannot_be_is_one_line(config_file, capsys, monkeypatch, world_size, overrides, expected):
    for name, value in (("RANK", 0), ("WORLD_SIZE", world_size), ("LOCAL_RANK", 0)):
        monkeypatch.setenv(name, str(value))
    pairs = [override.split("=") for override in overrides]
    options = [f"--{key if '.' in key else f'parallel.{key}'}={value}" for key, value in pairs]
    assert expected in refused_by_dry_run(capsys, config_file, *options)


def test_a_missing_config_is_one_line(tmp_path, capsys):
    assert "nowhere.yaml: cannot read the config: No such file" in refused_by_dry_run(capsys, tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: [1, 2", "not valid YAML"),
        ("- 1\n- 2\n", "expected a mapping of sections, found list"),
        ("run_dir: x\n", "is missing; give it in the file or as --"),
        ("run_dir: x\nmodel: 3\n", "model: Input should be"),
        ("", "is missing"),
    ],
)
def test_a_broken_config_is_one_line(tmp_path, capsys, text, expected):
    (tmp_path / "broken.yaml").write_text(text)
    line = refused_by_dry_run(capsys, tmp_path / "broken.yaml")
    assert f"{tmp_path / 'broken.yaml'}: " in line
    assert expected in line


def test_damaged_data_is_one_line(config_file, corpus, tmp_path, capsys):
    def with_files(bin_bytes: bytes, idx_bytes: bytes) -> str:
        (tmp_path / "data.bin").write_bytes(bin_bytes)
        (tmp_path / "data.idx").write_bytes(idx_bytes)
        return refused_by_dry_run(capsys, config_file, "--data.train", tmp_path / "data")

    whole = (corpus / "train.bin").read_bytes(), (corpus / "train.idx").read_bytes()
    assert "data.bin: is truncated" in with_files(whole[0][:-2], whole[1])
    assert "data.bin: belongs to another .idx" in with_files(whole[0] + b"\0\0", whole[1])
    assert "data.idx: truncated" in with_files(whole[0], whole[1][:-1])
    assert "data.idx: " in with_files(whole[0], b"a foreign file" * 10)
    assert "data.idx: " in with_files(whole[0], b"")
    version = whole[1][:9] + struct.pack("<Q", 7) + whole[1][17:]
    assert "data.idx: " in with_files(whole[0], version)


# --- refusals of a run


def test_a_global_batch_that_does_not_divide_is_refused(config_file, tmp_path):
    line = refused(run_main(config_file, "--training.micro_batch_size", 3))
    assert "global_batch_size 8 does not divide into micro-batches of 3 on 1 data-parallel ranks; use 6 or 9" in line
    assert not (tmp_path / "run").exists()


def test_a_dry_run_finds_a_global_batch_that_does_not_divide(config_file, capsys):
    assert "use 6 or 9" in refused_by_dry_run(capsys, config_file, "--training.micro_batch_size", 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_kernel_of_another_device_is_refused(config_file):
    line = refused(run_main(config_file, "--ops.cross_entropy", "triton"))
    assert "ops.cross_entropy is triton: needs a GPU; use torch, or leave it out" in line


def test_a_folder_that_cannot_be_written_is_refused(config_file, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    line = refused(run_main(config_file, "--run_dir", tmp_path / "file" / "run"))
    assert "cannot write here" in line


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory) -> Path:
    """The folder of a finished run of two steps; runs that are refused leave it as it is."""
    folder = tmp_path_factory.mktemp("finished")
    run_rank(run_training, run_config(folder, corpus, {"training.steps": 2}))
    return folder


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--model.dim", "48"], "is of another model: dim is 32 there and 48 here"),
        (["--model.vocab_size", "200"], "is of another model: vocab_size is 101 there and 200 here"),
        (["--training.seed", "6"], "the checkpoint was made with other data: seed was 5, now it is 6"),
        (["--data.seq_len", "8"], "the checkpoint was made with other data: seq_len was 16, now it is 8"),
    ],
)
def test_another_runs_checkpoint_is_refused(config_file, finished, overrides, expected):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    line = refused(run_main(config_file, "--run_dir", finished, "--training.steps", 4, *overrides))
    assert expected in line
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_a_damaged_checkpoint_is_refused(config_file, tmp_path):
    assert run_main(config_file).code == 0
    file = tmp_path / "run" / "checkpoints" / "step-00000002" / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert "damaged, its checksum is wrong" in refused(run_main(config_file, "--training.steps", 4))
    file.write_bytes(data[:-10])
    assert f"{file}: has {len(data) - 10} bytes" in refused(run_main(config_file, "--training.steps", 4))


def refused_by_both_ranks(*arguments) -> str:
    outcomes = start_ranks(2, pretrain.main, [str(argument) for argument in arguments])
    assert [outcome.code for outcome in outcomes] == [2, 2], outcomes[0].error or outcomes[1].error
    return "".join(outcome.stderr for outcome in outcomes)


def test_ranks_refuse_together_a_file_that_one_of_them_reads(config_file, tmp_path):
    parallel = ["--parallel.zero_stage", "1"]
    start_ranks(2, pretrain.main, [str(config_file), *parallel])
    file = tmp_path / "run" / "checkpoints" / "step-00000002" / "rank-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    assert f"{file}: damaged" in refused_by_both_ranks(config_file, *parallel, "--training.steps", 4)


def test_ranks_refuse_together_a_folder_that_cannot_be_written(config_file, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert str(tmp_path / "file") in refused_by_both_ranks(config_file, "--run_dir", tmp_path / "file" / "run")


def test_every_rank_ends_with_the_same_code(config_file):
    arguments = [str(config_file), "--data.train", "nowhere/data"]
    outcomes = start_ranks(2, pretrain.main, arguments)
    assert [outcome.code for outcome in outcomes] == [2, 2]
    lines = [line for outcome in outcomes for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1  # only the first rank's line begins so


def test_a_run_is_quiet_about_everything_but_itself(config_file, tmp_path):
    outcome = run_main(config_file)
    assert outcome.code == 0
    assert "Warning" not in outcome.stderr and "WARNING" not in outcome.stderr, outcome.stderr
    assert all(json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
