"""Text to a data set: what is in it, and that it is the same however the work is shared out."""

import dataclasses
import gzip
import hashlib
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tokenizers")
from tokenizers import Tokenizer

from megamtp.data.indexed_dataset import IndexedDataset
from megamtp.data.manifest import Manifest
from megamtp.data.merge import merge
from megamtp.data.preprocess import encode, inputs
from megamtp.data.preprocess.encode import preprocess
from megamtp.data.preprocess.train_bpe import train_bpe
from megamtp.errors import UserError
from tests.data.preprocessing import (
    COMMAND,
    ROOT,
    SUFFIXES,
    TEXTS,
    check_whole,
    contents,
    environment,
    jsonl,
    processes_with,
)
from tests.data.test_documents import awkward_lines, write

MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
needs_mpi = pytest.mark.skipif(not MPIRUN, reason="there is no mpirun")


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


@pytest.fixture
def mixed(tmp_path):
    """Files of every kind, some with awkward lines; two are malformed at some places."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(awkward_lines(0))
    write(folder / "b.jsonl.gz", [f"b{text}" for text in TEXTS])
    (folder / "c.jsonl").write_bytes(awkward_lines(1) + b"\noops\n" + jsonl(["a long line " * 3000, "", ""]))
    (folder / "d.jsonl").write_bytes(b"")
    (folder / "e.jsonl").write_bytes(b"{\n" + jsonl(TEXTS))
    write(folder / "f.jsonl.zst", TEXTS)
    write(folder / "g.parquet", TEXTS)
    return folder


def test_round_trip(tmp_path, corpus, tokenizer_path):
    manifest = preprocess([corpus], tokenizer_path, tmp_path / "out" / "x")
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    data = IndexedDataset(tmp_path / "out" / "x")
    assert len(data) == data.n_documents == len(TEXTS) and data.dtype == np.uint16
    for document, text in zip(data, TEXTS, strict=True):
        assert document[-1] == 0 and 0 not in document[:-1]
        assert tokenizer.decode(document[:-1].tolist(), skip_special_tokens=False) == text
    assert manifest == check_whole(tmp_path / "out" / "x")
    assert (manifest.documents, manifest.tokens, manifest.vocab_size) == (len(TEXTS), data.n_tokens, 320)
    assert (manifest.eod_token, manifest.eod_id, manifest.skipped) == ("<|endoftext|>", 0, 0)
    assert manifest.tokenizer_sha256 == hashlib.sha256(tokenizer_path.read_bytes()).hexdigest()
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_bytes(tmp_path, corpus):
    preprocess([corpus], "bytes", tmp_path / "x")
    for document, text in zip(IndexedDataset(tmp_path / "x"), TEXTS, strict=True):
        assert document.tolist() == [*text.encode(), 256]


def test_another_key_and_end(tmp_path, tokenizer_path):
    (tmp_path / "x.jsonl").write_bytes(jsonl(["x", "yy"], key="content"))
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    end = next(token for token, i in tokenizer.get_vocab().items() if i == 319)
    manifest = preprocess([tmp_path / "x.jsonl"], tokenizer_path, tmp_path / "x", "content", end)
    assert (manifest.eod_token, manifest.eod_id) == (end, 319)
    assert [document[-1] for document in IndexedDataset(tmp_path / "x")] == [319, 319]


# --- the same files


@pytest.mark.parametrize("unit_bytes, batch_characters", [(50, 1 << 20), (3000, 1), (1 << 22, 500)])
def test_the_same_bytes_for_every_cut_and_number_of_workers(
    unit_bytes, batch_characters, mixed, tokenizer_path, tmp_path, monkeypatch
):
    preprocess([mixed], tokenizer_path, tmp_path / "whole", workers=1, on_error="skip")
    expected = contents(tmp_path / "whole")
    assert Manifest.read(tmp_path / "whole").skipped == 2
    monkeypatch.setattr(inputs, "UNIT_BYTES", unit_bytes)
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", batch_characters)
    for workers in (1, 2, 3):
        preprocess([mixed], tokenizer_path, tmp_path / "x", workers=workers, on_error="skip")
        assert contents(tmp_path / "x") == expected, workers


@pytest.mark.parametrize("n_shards", [2, 3])
def test_merged_shards_are_the_whole(n_shards, mixed, tokenizer_path, tmp_path, monkeypatch):
    preprocess([mixed], tokenizer_path, tmp_path / "whole", workers=1, on_error="skip")
    monkeypatch.setattr(inputs, "UNIT_BYTES", 1000)
    shards = [tmp_path / f"x{i}" for i in range(n_shards)]
    for i, prefix in enumerate(shards):
        preprocess([mixed], tokenizer_path, prefix, shard=(i, n_shards), workers=1, on_error="skip")
    merge(shards, tmp_path / "x", remove=True)
    assert contents(tmp_path / "x") == contents(tmp_path / "whole")
    assert not any(Path(f"{prefix}{suffix}").exists() for prefix in shards for suffix in SUFFIXES)


def run_mpi(n_ranks: int, *arguments: Path | str) -> subprocess.CompletedProcess:
    command = [MPIRUN, "--allow-run-as-root", "--oversubscribe", "-n", str(n_ranks), *COMMAND, *map(str, arguments)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)


@needs_mpi
@pytest.mark.parametrize("n_ranks", [2, 3])
def test_mpirun_makes_the_same_files(n_ranks, mixed, tokenizer_path, tmp_path):
    pytest.importorskip("mpi4py")
    preprocess([mixed], tokenizer_path, tmp_path / "whole", workers=1, on_error="skip")
    arguments = ["--input", mixed, "--tokenizer", tokenizer_path, "--output", tmp_path / "out" / "x", "--workers", 1]
    result = run_mpi(n_ranks, *arguments, "--on-error", "skip")
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "out" / "x") == contents(tmp_path / "whole")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["x.bin", "x.idx", "x.json"]
    assert json.loads(result.stdout)["documents"] == IndexedDataset(tmp_path / "whole").n_documents
    assert "2 malformed documents skipped" in result.stderr
    assert f"skipped {mixed / 'e.jsonl'}:1: not valid JSON" in result.stderr
    assert not processes_with(str(tmp_path))


@needs_mpi
@pytest.mark.parametrize("what", ["malformed", "nothing"])
def test_mpirun_refuses_with_one_line(what, tokenizer_path, tmp_path):
    """The rank that has found it says so; the others do not wait for it."""
    pytest.importorskip("mpi4py")
    lines = {"malformed": jsonl(TEXTS * 10) + b"oops\n", "nothing": b"\n" * 100}[what]
    (tmp_path / "x.jsonl").write_bytes(lines)
    arguments = ["--input", tmp_path / "x.jsonl", "--tokenizer", tokenizer_path, "--output", tmp_path / "out" / "x"]
    result = run_mpi(2, *arguments, "--workers", 1)
    assert result.returncode == 2
    expected = {"malformed": rf"rank 1: error: .*x.jsonl:{10 * len(TEXTS) + 1}: not valid", "nothing": "no documents"}
    assert re.search(expected[what], result.stderr) and "Traceback" not in result.stderr
    assert not any((tmp_path / "out" / f"x{suffix}").exists() for suffix in SUFFIXES)
    assert not processes_with(str(tmp_path))


# --- malformed documents


def test_malformed_documents_are_counted_and_the_first_told(tmp_path, tokenizer_path, monkeypatch, capsys):
    lines = [jsonl([f"text {i}"]) if i % 3 else b"oops %d\n" % i for i in range(150)]
    (tmp_path / "x.jsonl").write_bytes(b"".join(lines))
    monkeypatch.setattr(inputs, "UNIT_BYTES", 100)
    manifest = preprocess([tmp_path / "x.jsonl"], tokenizer_path, tmp_path / "x", workers=2, on_error="skip")
    assert (manifest.documents, manifest.skipped) == (100, 50) and check_whole(tmp_path / "x") == manifest
    told = re.findall(r"skipped .*x.jsonl:(\d+): not valid JSON", capsys.readouterr().err)
    assert list(map(int, told)) == list(range(1, 61, 3))


@pytest.mark.parametrize("documents_before", [0, 3, 2000])
def test_a_malformed_document_leaves_nothing(tmp_path, tokenizer_path, documents_before):
    corpus = tmp_path / "in" / "corpus.jsonl"
    corpus.parent.mkdir()
    corpus.write_bytes(jsonl(["text"] * documents_before) + b'{"text": "cut o')
    with pytest.raises(UserError) as error:
        preprocess([corpus], tokenizer_path, tmp_path / "out" / "x")
    assert f"{corpus}:{documents_before + 1}: not valid JSON" in str(error.value)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("content, expected", [(b"\n  \n", "no documents;"), (b"oops\n", "no documents but 1 malf")])
def test_no_documents(content, expected, tmp_path, tokenizer_path):
    (tmp_path / "empty.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=expected):
        preprocess([tmp_path / "empty.jsonl"], tokenizer_path, tmp_path / "x", on_error="skip")
    assert [file.name for file in tmp_path.iterdir()] == ["empty.jsonl"]


# --- the command


@pytest.fixture
def command(monkeypatch):
    """Runs tools/preprocess_data.py in this process."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: Path | str) -> None:
        monkeypatch.setattr(sys, "argv", ["preprocess_data.py", *map(str, arguments)])
        runpy.run_path(str(ROOT / "tools" / "preprocess_data.py"), run_name="__main__")

    yield run
    signal.signal(signal.SIGTERM, before)


def test_command(tmp_path, corpus, tokenizer_path, command, capsys):
    command("--input", corpus, "--tokenizer", tokenizer_path, "--output", tmp_path / "x")
    out, err = capsys.readouterr()
    assert json.loads(out) == dataclasses.asdict(check_whole(tmp_path / "x"))
    assert json.loads(out)["documents"] == len(TEXTS) and "encoding with" in err


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--workers", "0"], "'0' is not a number of processes"),
        (["--shard", "2/2"], "'2/2' is not I/N"),
        (["--shard", "1"], "'1' is not I/N"),
        (["--input", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--output", "/proc/x"], "cannot write here"),
        (["--tokenizer", "nowhere"], "nowhere: no such tokenizer"),
        (["--eod", "<eos>"], "has no token '<eos>'"),
    ],
)
def test_arguments_that_are_refused(arguments, expected, tmp_path, corpus, tokenizer_path, command, capsys):
    given = {"--input": corpus, "--tokenizer": tokenizer_path, "--output": tmp_path / "x"} | dict([arguments])
    with pytest.raises(SystemExit) as stop:
        command(*(word for pair in given.items() for word in pair))
    assert stop.value.code == 2 and expected in capsys.readouterr().err.splitlines()[-1]
    assert [file.name for file in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_shards_by_the_command(tmp_path, corpus, tokenizer_path, command):
    preprocess([corpus], tokenizer_path, tmp_path / "whole")
    arguments = ["--input", corpus, "--tokenizer", tokenizer_path, "--output", tmp_path / "x"]
    for i in range(2):
        command(*arguments, "--shard", f"{i}/2")
    prefixes = [tmp_path / f"x-{i:05d}-of-00002" for i in range(2)]
    join = [sys.executable, ROOT / "tools" / "merge_data.py", "--input", *prefixes, "--output", tmp_path / "x"]
    result = subprocess.run([*join, "--remove"], env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "x") == contents(tmp_path / "whole")
    assert json.loads(result.stdout)["documents"] == len(TEXTS)
    assert not any(Path(f"{prefix}.bin").exists() for prefix in prefixes)
    again = subprocess.run(join, env=environment(), capture_output=True, text=True)
    assert again.returncode == 2 and "cannot read the data" in again.stderr


# --- progress


@pytest.mark.parametrize("shard", [(0, 1), (1, 3)])
def test_progress(shard, tmp_path, mixed, tokenizer_path, monkeypatch):
    """Counts what the shard reads, from nothing to all of it; says MB/s, tokens/s and the time left."""
    import tqdm

    bars = []

    class Bar(tqdm.tqdm):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            bars.append(self)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    monkeypatch.setattr(inputs, "UNIT_BYTES", 1000)
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 1000)
    preprocess([mixed], tokenizer_path, tmp_path / "x", on_error="skip", shard=shard, progress=True, workers=2)
    sizes = sum(file.stat().st_size for file in mixed.iterdir())
    assert bars[0].n == bars[0].total > 0
    if shard[1] == 1:
        assert bars[0].total == sizes
    shown = Bar.format_meter(5 << 20, 10 << 20, 1, **{key: bars[0].format_dict[key] for key in ("unit", "unit_scale")})
    assert re.search(r"00:01<00:01, 5.24MB/s", shown)
    assert re.search(r"[\d.]+M tokens/s", bars[0].postfix)


def test_the_encoder_is_named(tmp_path, corpus, tokenizer_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    preprocess([corpus], tokenizer_path, tmp_path / "x", progress=True)
    assert "encoding with tokenizers: gigatoken is not installed" in capsys.readouterr().err


def test_compressed_text_is_read_once_through(tmp_path, tokenizer_path):
    """A .gz of many batches: the worker's messages are in order and none is lost."""
    texts = [f"{i} " + "abc " * 500 for i in range(3000)]
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(jsonl(texts)))
    manifest = preprocess([tmp_path / "x.jsonl.gz"], "bytes", tmp_path / "x", workers=2)
    assert manifest.documents == 3000 and manifest.tokens == sum(len(text) + 1 for text in texts)
    data = IndexedDataset(tmp_path / "x")
    assert all(bytes(data[i][:-1].tolist()).decode() == texts[i] for i in range(0, 3000, 7))


@pytest.mark.parametrize("workers", [1, 3])
def test_an_encoder_that_gives_other_ids_is_replaced_before_anything_is_written(
    workers, tmp_path, corpus, tokenizer_path, monkeypatch, capsys
):
    """It is tried while the workers use it already: what they have made is thrown away."""
    gigatoken = pytest.importorskip("gigatoken")
    expected = preprocess([corpus], tokenizer_path, tmp_path / "right")
    load = gigatoken.Tokenizer.from_json

    class Reversing:
        def __init__(self, content):
            self.backend, self.true = self, load(content).backend

        def encode(self, text):
            return self.true.encode(text)[::-1]

    monkeypatch.setattr(gigatoken.Tokenizer, "from_json", Reversing)
    capsys.readouterr()
    manifest = preprocess([corpus], tokenizer_path, tmp_path / "x", workers=workers, progress=True)
    first, second, *_ = (line for line in capsys.readouterr().err.splitlines() if line.startswith("encoding with"))
    assert first == "encoding with gigatoken" and second.startswith("encoding with tokenizers: gigatoken ")
    assert "gives other tokens for" in second
    assert manifest == expected and contents(tmp_path / "x") == contents(tmp_path / "right")
    assert not list(tmp_path.glob("*.tmp"))
