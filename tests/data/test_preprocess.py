import gzip
import hashlib
import json
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("tokenizers")
from tokenizers import Tokenizer

from megamtp.data.indexed_dataset import IndexedDataset
from megamtp.data.preprocess import encode
from megamtp.data.preprocess.encode import load_tokenizer, preprocess
from megamtp.data.preprocess.jsonl import find_files, iterate_documents
from megamtp.data.preprocess.tokenizer import train_bpe
from megamtp.errors import UserError

TEXTS = [
    "def f(x):\n    return x + 1\n",
    "",
    "Grüße, 世界 🙂\u2028next\r\n\ttabs  and   spaces ",
    "spelled out <|endoftext|> in the middle",
    "x" * 300,
    *(f"line {i}: value = {i * i}\n" for i in range(40)),
]


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe(TEXTS, 320, path)
    return path


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(jsonl(TEXTS))
    return path


def jsonl(texts, key="text"):
    return "".join(json.dumps({"id": 1, key: text}, ensure_ascii=False) + "\n" for text in texts).encode()


def texts_of(*inputs, key="text"):
    return [text for text, _ in iterate_documents(find_files(inputs), key)]


@pytest.mark.parametrize("batch", [1, 7, 1024])
def test_round_trip(tmp_path, corpus, tokenizer_path, monkeypatch, batch):
    monkeypatch.setattr(encode, "BATCH_DOCUMENTS", batch)
    stats = preprocess([corpus], tokenizer_path, tmp_path / "out" / "x")
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    data = IndexedDataset(tmp_path / "out" / "x")
    assert len(data) == len(TEXTS)
    for document, text in zip(data, TEXTS, strict=True):
        assert document[-1] == 0 and 0 not in document[:-1]
        assert tokenizer.decode(document[:-1].tolist(), skip_special_tokens=False) == text
    assert stats == json.loads((tmp_path / "out" / "x.json").read_text())
    assert stats == {
        "documents": len(TEXTS),
        "tokens": data.n_tokens,
        "vocab_size": 320,
        "eod_token": "<|endoftext|>",
        "eod_id": 0,
        "tokenizer_sha256": hashlib.sha256(tokenizer_path.read_bytes()).hexdigest(),
        "dtype": "uint16",
    }
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_truncation_and_padding_saved_in_the_tokenizer_are_dropped(tmp_path, corpus, tokenizer_path):
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "cut.json"))
    cut = preprocess([corpus], tmp_path / "cut.json", tmp_path / "a")
    whole = preprocess([corpus], tokenizer_path, tmp_path / "b")
    assert cut["tokens"] == whole["tokens"]


def test_command(tmp_path, corpus, tokenizer_path, monkeypatch, capsys):
    command = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
    arguments = ["--input", str(corpus), "--tokenizer", str(tokenizer_path), "--output", str(tmp_path / "x")]
    monkeypatch.setattr(sys, "argv", ["preprocess_data.py", *arguments])
    runpy.run_path(str(command), run_name="__main__")
    assert json.loads(capsys.readouterr().out)["documents"] == len(IndexedDataset(tmp_path / "x"))
    monkeypatch.setattr(sys, "argv", ["preprocess_data.py", *arguments, "--eod", "<eos>"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(command), run_name="__main__")
    assert stop.value.code == 2
    assert "has no token '<eos>'" in capsys.readouterr().err


@pytest.mark.parametrize("documents_before", [0, 3, 2000])
def test_failure_in_the_middle_leaves_nothing(tmp_path, tokenizer_path, documents_before):
    corpus = tmp_path / "in" / "corpus.jsonl"
    corpus.parent.mkdir()
    corpus.write_bytes(jsonl(["text"] * documents_before) + b'{"text": "cut o')
    with pytest.raises(UserError) as error:
        preprocess([corpus], tokenizer_path, tmp_path / "out" / "x")
    assert f"{corpus}:{documents_before + 1}: not valid JSON" in str(error.value)
    assert not list((tmp_path / "out").iterdir())


def test_crash_in_the_middle_keeps_the_older_output(tmp_path, corpus, tokenizer_path, monkeypatch):
    preprocess([corpus], tokenizer_path, tmp_path / "out" / "x")
    before = {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    def crashing(files, text_key):
        yield from [("text", 4)] * 2000
        raise KeyboardInterrupt

    monkeypatch.setattr(encode, "iterate_documents", crashing)
    with pytest.raises(KeyboardInterrupt):
        preprocess([corpus], tokenizer_path, tmp_path / "out" / "x")
    assert before == {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}


def test_no_manifest_beside_an_incomplete_pair(tmp_path, corpus, tokenizer_path, monkeypatch):
    preprocess([corpus], tokenizer_path, tmp_path / "out" / "x")

    def failing(self):
        raise OSError("disk full")

    monkeypatch.setattr(encode.IndexedDatasetWriter, "finalize", failing)
    with pytest.raises(OSError, match="disk full"):
        preprocess([corpus], tokenizer_path, tmp_path / "out" / "x")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["x.bin", "x.idx"]


def test_no_documents(tmp_path, tokenizer_path):
    (tmp_path / "empty.jsonl").write_text("\n  \n")
    with pytest.raises(UserError, match="no documents"):
        preprocess([tmp_path / "empty.jsonl"], tokenizer_path, tmp_path / "x")
    assert [file.name for file in tmp_path.iterdir()] == ["empty.jsonl"]


@pytest.mark.parametrize("content, expected", [(None, "no such tokenizer"), ("{}", "not a tokenizer.json")])
def test_bad_tokenizer(tmp_path, content, expected):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=expected) as error:
        load_tokenizer(tmp_path / "tokenizer.json")
    assert "\n" not in str(error.value)


def test_files_folders_and_globs(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.jsonl").write_bytes(jsonl(["b"]))
    (tmp_path / "sub" / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(["a1", "a2"])))
    (tmp_path / "c.jsonl").write_bytes(jsonl(["c"]))
    (tmp_path / "notes.txt").write_bytes(jsonl(["no"]))
    assert texts_of(tmp_path) == ["b", "c", "a1", "a2"]
    assert texts_of(f"{tmp_path}/*.jsonl") == ["b", "c"]
    assert texts_of(tmp_path / "c.jsonl", tmp_path / "sub") == ["c", "a1", "a2"]
    assert texts_of(tmp_path / "notes.txt") == ["no"]
    with pytest.raises(UserError, match="given twice"):
        find_files([tmp_path, f"{tmp_path}/b.*"])
    for nothing in (tmp_path / "none.jsonl", f"{tmp_path}/*.parquet"):
        with pytest.raises(UserError, match="no such file"):
            find_files([nothing])


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_bytes_read_add_up(tmp_path, name):
    content = b"\n" + jsonl(TEXTS)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert sum(n for _, n in iterate_documents([tmp_path / name])) == (tmp_path / name).stat().st_size


@pytest.mark.parametrize(
    "line, expected",
    [
        (b"{", "not valid JSON"),
        (b'{"text": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (b'{"text": "\xff"}', "not UTF-8 at byte 10"),
        (b"[1]", "found list"),
        (b'{"content": "x"}', r"no text under key 'text' \(found keys \['content'\]\)"),
        (b'{"text": null}', "no text under key"),
        (rb'{"text": "\ud83d"}', "surrogate"),
    ],
)
def test_malformed_line(tmp_path, line, expected):
    path = tmp_path / "x.jsonl"
    path.write_bytes(jsonl(["good"]) + b"\n" + line + b"\n" + jsonl(["after"]))
    with pytest.raises(UserError, match=expected) as error:
        texts_of(path)
    assert str(error.value).startswith(f"{path}:3: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"plain text\n", lambda data: data[:40]])
def test_damaged_gzip(tmp_path, damage):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(damage(gzip.compress(jsonl(TEXTS))))
    with pytest.raises(UserError, match="x.jsonl.gz: cannot read"):
        texts_of(path)


def test_train_bpe(tmp_path):
    assert train_bpe(TEXTS, 300, tmp_path / "a.json") == 300
    assert train_bpe(iter(TEXTS), 300, tmp_path / "b.json") == 300
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2
    tokenizer = Tokenizer.from_file(str(tmp_path / "a.json"))
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    unseen = "".join(map(chr, range(0x100))) + "日本語 𝄞 \x00"
    assert tokenizer.decode(tokenizer.encode(unseen).ids) == unseen
    assert train_bpe(["ab"], 1000, tmp_path / "small.json") == 258
    with pytest.raises(UserError, match="need 257"):
        train_bpe(TEXTS, 256, tmp_path / "c.json")
