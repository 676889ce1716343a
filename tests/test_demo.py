"""The demo's steps, one command after another, on a small source tree and a small model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.distributed import start_ranks
from tools import demo_report, gather_stdlib, generate, plot_losses, preprocess_data, train_tokenizer

REPOSITORY = Path(__file__).parent.parent


def _pretrain(*arguments):
    import pretrain

    return pretrain.main(list(arguments))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with data and a run of three steps on two ranks, made as ``launch_scripts/demo.sh`` makes it."""
    folder = tmp_path_factory.mktemp("demo")
    gather_stdlib.main(["--output-dir", str(folder)])
    tokenizer = str(folder / "tokenizer.json")
    train_tokenizer.main(["--input", str(folder / "validation.jsonl"), "--vocab-size", "300", "--output", tokenizer])
    for split in ("train", "validation"):  # the held-out part serves as both: it is small
        source, output = str(folder / "validation.jsonl"), str(folder / split)
        preprocess_data.main(["--input", source, "--tokenizer", tokenizer, "--output", output])
    config = yaml.safe_load((REPOSITORY / "configs" / "demo.yaml").read_text())
    config["run_dir"] = str(folder / "run")
    config["model"] |= {"vocab_size": 300, "dim": 32, "n_heads": 2, "n_kv_heads": 1, "ffn_dim": 32}
    config["data"] |= {"train": str(folder / "train"), "validation": str(folder / "validation")}
    config["data"] |= {"tokenizer": tokenizer, "seq_len": 32}
    config["training"] |= {"steps": 3, "eval_samples": 20, "eval_every": 2}
    config["schedule"] = {"warmup_steps": 1}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    outcomes = start_ranks(2, _pretrain, str(folder / "config.yaml"))
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].error or outcomes[0].stderr
    return folder


def test_the_report_compares_draws_completes_and_says_where_everything_is(trained, capsys):
    run = trained / "run"
    demo_report.main([str(run), "--validation-text", str(trained / "validation.jsonl")])
    text = capsys.readouterr().out
    summary = json.loads((run / "summary.json").read_text())
    assert f"{summary['head_1_validation_loss']:.3f}" in text
    assert f"{summary['bigram_validation_loss']:.3f}" in text
    # After three steps it cannot have beaten anything, and must say so.
    assert summary["head_1_validation_loss"] > summary["bigram_validation_loss"] and "does NOT beat" in text
    for part in ("the model goes on", "the file goes on", "losses.png", "metrics.jsonl", "tensorboard", "try next"):
        assert part in text
    assert (run / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_generate_continues_the_prompt(trained, capsys):
    generate.main([str(trained / "run"), "--prompt", "def main(", "--max-new-tokens", "4"])
    assert capsys.readouterr().out.startswith("def main(")


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (lambda folder: generate.main([str(folder / "nowhere"), "--prompt", "x"]), "is not there"),
        (lambda folder: generate.main([str(folder / "run"), "--prompt", ""]), "the prompt is empty"),
        (lambda folder: plot_losses.main([str(folder)]), "metrics.jsonl"),
        (
            lambda folder: train_tokenizer.main(
                ["--input", str(folder / "none.jsonl"), "--vocab-size", "300", "--output", str(folder / "t.json")]
            ),
            "none.jsonl",
        ),
    ],
)
def test_wrong_input_is_one_line(trained, capsys, command, expected):
    with pytest.raises(SystemExit) as end:
        command(trained)
    captured = capsys.readouterr().err.strip()
    assert end.value.code == 2 and captured.startswith("error: ") and expected in captured and "\n" not in captured


def test_the_shipped_config_is_the_size_that_it_says():
    from megamtp.config import load
    from megamtp.model.cost import parameters
    from megamtp.training.run_config import RunConfig

    config = load(RunConfig, REPOSITORY / "configs" / "demo.yaml", [])
    assert 3e6 < parameters(config.model).total < 5e6
    assert config.model.n_future_tokens == 4


def test_the_allocator_setting_says_what_it_did():
    code = "from megamtp.host_memory import keep_freed_memory as keep; print(keep())"
    line = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True
    ).stdout
    assert line.startswith("allocator: ")
