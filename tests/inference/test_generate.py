"""The command and what it stands on: loading a run, prompts from everywhere, wrong input."""

import io
import json
from pathlib import Path

import pytest
import torch

from megamtp.data.tokenizer import ByteTokenizer, load_tokenizer
from megamtp.errors import UserError
from megamtp.inference.generate import draft_widths, generate
from megamtp.inference.load import load_model
from megamtp.inference.native import build
from megamtp.inference.text import TextStream
from megamtp.training.checkpoint import Checkpoint, latest_checkpoint
from tests.distributed import run_rank
from tests.inference.models import decoder_of
from tests.model.llama import random_model, small_config
from tests.training.tiny import run_config, run_training, tensors, write_corpus
from tools import generate as command

MODEL = {"model.vocab_size": 257, "model.n_layers": 6, "model.n_future_tokens": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of two steps whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("run")
    write_corpus(folder / "train", n_documents=120, seed=0)
    write_corpus(folder / "validation", n_documents=15, seed=1)
    config = run_config(folder / "run", folder, {"training.steps": 2, "data.tokenizer": "bytes", **MODEL})
    run_rank(run_training, config)
    return folder / "run"


def test_a_run_is_loaded_from_its_newest_checkpoint(run):
    model = load_model(run, device="cpu", backend="torch")
    saved = tensors(Checkpoint.open(latest_checkpoint(run / "checkpoints")))
    assert torch.equal(model.decoder.embedding, saved["tok_embeddings.weight"][:257])
    assert torch.equal(model.decoder.blocks[-1].w2, saved["heads.3.feed_forward.w2.weight"])
    assert model.context == model.decoder.context and model.eos_id is not None
    assert load_model(run, dtype="bf16").decoder.dtype == torch.bfloat16


def test_without_a_compiler_pytorch_decodes_and_it_is_said(run, tmp_path, capsys, monkeypatch):
    arguments = [str(run), "--prompt", "def f", "--max-new-tokens", "3"]
    command.main(arguments)
    native = capsys.readouterr()
    monkeypatch.setenv("CC", str(tmp_path / "none"))
    build.library.cache_clear()
    try:
        command.main(arguments)
        torch_alone = capsys.readouterr()
        refused = refusal([*arguments, "--backend", "native"], capsys)
    finally:
        build.library.cache_clear()
    assert "in PyTorch, several times slower than by compiled blocks: there is no C compiler" in torch_alone.err
    assert "PyTorch" not in native.err and native.out == torch_alone.out
    assert "--backend native: there is no C compiler" in refused


def test_prompt_file_and_standard_input_are_the_same_prompt(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "prompt.txt").write_text("def f():\n")
    outputs = []
    for arguments in (["--prompt", "def f():\n"], ["--prompt-file", str(tmp_path / "prompt.txt")], []):
        monkeypatch.setattr("sys.stdin", io.StringIO("def f():\n"))
        command.main([str(run), *arguments, "--max-new-tokens", "5"])
        captured = capsys.readouterr()
        outputs.append(captured.out)
        assert "tokens/s" in captured.err and "tokens per forward pass; accepted: head 2" in captured.err
    assert len(set(outputs)) == 1 and outputs[0].startswith("def f():\n")


def test_compare_tells_both_speeds_and_plain_decoding_has_no_drafts(run, capsys):
    command.main([str(run), "--prompt", "abc", "--max-new-tokens", "6", "--compare", "--tree", "2,2"])
    drafted = capsys.readouterr()
    assert "without drafts" in drafted.err and "head 3" in drafted.err and "head 4" not in drafted.err
    command.main([str(run), "--prompt", "abc", "--max-new-tokens", "6", "--draft-heads", "0"])
    plain = capsys.readouterr()
    assert plain.out == drafted.out and "forward" not in plain.err


def test_many_prompts(run, tmp_path, capsys):
    prompts = [{"prompt": "x" * (1 + i), "id": i} for i in range(5)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in prompts) + "\n")
    arguments = [str(run), "--jsonl", str(tmp_path / "in.jsonl"), "--max-new-tokens", "4", "--temperature", "0.8"]
    command.main([*arguments, "--output", str(tmp_path / "deep" / "out.jsonl"), "--batch-size", "2"])
    assert capsys.readouterr().out == ""
    lines = [json.loads(line) for line in (tmp_path / "deep" / "out.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [0, 1, 2, 3, 4]
    for line in lines:
        assert line["finish_reason"] in ("length", "stop") and len(line["tokens"]) <= 4
        assert line["completion"] == ByteTokenizer().decode(line["tokens"])
    command.main([*arguments, "--batch-size", "2"])
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == lines


def test_a_document_ends_at_its_end_and_at_what_the_user_says(run):
    model = load_model(run)
    assert command.stop_tokens(model, []) == {model.eos_id}
    assert command.stop_tokens(model, ["a", "<|endoftext|>"]) == {model.eos_id, 97, 256}


WRONG = [
    (["--prompt", ""], "the prompt is empty"),
    (["--prompt", "x" * 5000], "the model's context is"),
    (["--prompt", "x", "--draft-heads", "4"], "--draft-heads 4: the model has 4 heads"),
    (["--prompt", "x", "--draft-heads", "-1"], "must not be negative"),
    (["--prompt", "x", "--draft-heads", "3", "--tree", "2,2"], "--draft-heads is 3"),
    (["--prompt", "x", "--tree", "2,0"], "must not be negative"),
    (["--prompt", "x", "--temperature", "-1"], "temperature"),
    (["--prompt", "x", "--top-p", "2"], "top_p"),
    (["--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens"),
    (["--prompt", "x", "--batch-size", "0"], "batch_size"),
    (["--prompt", "x", "--stop", "two tokens"], "--stop"),
    (["--prompt", "x", "--output", "out"], "--output goes with --jsonl"),
    (["--prompt-file", "nowhere.txt"], "nowhere.txt: cannot be read"),
    (["--jsonl", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
    (["--prompt", "x", "--tokenizer", "nowhere.json"], "nowhere.json"),
    (["--prompt", "x", "--device", "cuda:9"], "--device cuda:9"),
    (["--prompt", "x", "--backend", "native", "--dtype", "bf16"], "--backend native: computes in fp32 on a CPU"),
]


@pytest.mark.parametrize(("arguments", "expected"), WRONG, ids=[" ".join(case[0])[:30] for case in WRONG])
def test_wrong_input_is_one_line(run, capsys, arguments, expected):
    assert expected in refusal([str(run), *arguments], capsys)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "in.jsonl:1: not JSON"),
        ('{"prompt": "a"}\n{"text": "b"}', 'in.jsonl:2: needs a "prompt"'),
        ("\n", "no prompt"),
    ],
)
def test_wrong_jsonl_is_one_line(run, tmp_path, capsys, text, expected):
    (tmp_path / "in.jsonl").write_text(text)
    assert expected in refusal([str(run), "--jsonl", str(tmp_path / "in.jsonl")], capsys)


def test_damaged_models_are_one_line(run, tmp_path, capsys):
    import shutil

    assert "is not there" in refusal([str(tmp_path / "nowhere"), "--prompt", "x"], capsys)
    (tmp_path / "empty").mkdir()
    assert "no model here" in refusal([str(tmp_path / "empty"), "--prompt", "x"], capsys)
    shutil.copytree(run, tmp_path / "run")
    file = next((tmp_path / "run" / "checkpoints").glob("step-*/rank-*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    assert "damaged, its checksum is wrong" in refusal([str(tmp_path / "run"), "--prompt", "x"], capsys)
    file.write_bytes(content[:-100])
    assert f"{file}: has" in refusal([str(tmp_path / "run"), "--prompt", "x"], capsys)
    (tmp_path / "run" / "checkpoints" / "latest").unlink()
    assert "no checkpoint yet" in refusal([str(tmp_path / "run"), "--prompt", "x"], capsys)


def test_one_head_cannot_draft():
    decoder = decoder_of(random_model(small_config(), seed=0, dtype=torch.float64))
    assert draft_widths(1, None, None) == ()
    assert len(generate(decoder, [[1, 2]], 3).completions[0].tokens) == 3
    with pytest.raises(UserError, match="--draft-heads 3: the model has 1 heads, of which 0 can draft; use 0"):
        generate(decoder, [[1, 2]], 3, draft_heads=3)
    with pytest.raises(UserError, match="prompt 1 is empty"):
        generate(decoder, [[1], []], 3)
    assert generate(decoder, [], 3).completions == []


@pytest.mark.parametrize("text", ["naïve – 漢字 🎈!", "plain " * 60, "é" * 100])
def test_streamed_text_is_the_text(text):
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode("à" + text)
    stream = TextStream(tokenizer, ids[:2])
    pieces = [stream.add([token]) for token in ids[2:]]
    assert "".join(pieces) + stream.end() == text
    assert sum(1 for piece in pieces if piece) == len(text)  # each character as soon as it is whole
    assert all("\ufffd" not in piece for piece in pieces)


def test_a_character_that_stays_cut_is_shown_in_the_end():
    stream = TextStream(load_tokenizer("bytes"), [97])
    assert stream.add([98, 0xE6, 0xBC]) == "" and stream.end() == "b\ufffd"


def refusal(arguments, capsys) -> str:
    """The one line that the command ends with, having written nothing else."""
    with pytest.raises(SystemExit) as end:
        command.main(arguments)
    captured = capsys.readouterr()
    error = captured.err.strip()
    assert end.value.code == 2 and error.startswith("error: ") and "\n" not in error and captured.out == ""
    return error
