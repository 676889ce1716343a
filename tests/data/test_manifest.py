"""Damage, mix-ups and foreign data: found, and told in one line."""

import hashlib
import json
import random

import numpy as np
import pytest

from megamtp.data import dataset_writer, manifest
from megamtp.data.dataset_writer import IndexedDatasetWriter
from megamtp.data.datasets import DataConfig, Share, open_data
from megamtp.data.indexed_dataset import IndexedDataset
from megamtp.data.manifest import Manifest, make_manifest
from megamtp.errors import UserError
from tools import inspect_data, verify_data

SOURCE = {"vocab_size": 500, "eod_token": "<eod>", "eod_id": 3, "tokenizer_sha256": "ab" * 32}


def write(prefix, seed=0, n_documents=60, **source):
    generator = np.random.default_rng(seed)
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for length in generator.integers(1, 40, n_documents):
            writer.add_document(generator.integers(0, 500, length))
    described = Manifest.of(writer.written, **SOURCE | source)
    described.write(prefix)
    return described


def open_(prefix, **changes):
    values = {"train": str(prefix), "seq_len": 8, "verify": "checksum"} | changes
    return open_data(DataConfig(**values), vocab_size=500, n_future_tokens=2, seed=0)


def refusal(prefix, **changes):
    with pytest.raises(UserError) as error:
        open_(prefix, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


def damage(path, edit):
    content = bytearray(path.read_bytes())
    edit(content)
    path.write_bytes(content)


def flip(bit):
    def edit(content):
        content[bit // 8] ^= 1 << bit % 8

    return edit


def test_what_is_written_and_read(tmp_path):
    written = write(tmp_path / "x")
    assert Manifest.read(tmp_path / "x") == written
    values = json.loads((tmp_path / "x.json").read_text())
    data = IndexedDataset(tmp_path / "x")
    content = {ending: (tmp_path / f"x.{ending}").read_bytes() for ending in ("bin", "idx")}
    assert values["bin_sha256"] == [hashlib.sha256(content["bin"]).hexdigest()]
    assert values["idx_sha256"] == hashlib.sha256(content["idx"]).hexdigest()
    assert (values["bin_bytes"], values["idx_bytes"]) == (len(content["bin"]), len(content["idx"]))
    assert (values["documents"], values["tokens"], values["dtype"]) == (60, data.n_tokens, "uint16")
    assert values["max_token"] == max(data.tokens) and values["tokenizer_sha256"] == "ab" * 32
    assert make_manifest(data, **SOURCE) == written
    open_(tmp_path / "x")


@pytest.mark.parametrize("chunk", [1, 64, 100, 1 << 30])
def test_checksums_of_chunks(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(dataset_writer, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(manifest, "CHUNK_BYTES", chunk)
    written = write(tmp_path / "x")
    content = (tmp_path / "x.bin").read_bytes()
    expected = [hashlib.sha256(content[i : i + chunk]).hexdigest() for i in range(0, len(content), chunk)]
    assert written.bin_sha256 == expected
    assert make_manifest(IndexedDataset(tmp_path / "x"), **SOURCE) == written
    checked = [written.check(tmp_path / "x", i) for i in range(written.n_checks())]
    assert sum(checked) == written.bin_bytes + written.idx_bytes
    damage(tmp_path / "x.bin", flip(8 * 130))
    place = 130 // chunk
    for index in range(written.n_checks()):
        if index == place + 1:
            with pytest.raises(UserError, match=f"damaged between byte {place * chunk} and byte"):
                written.check(tmp_path / "x", index)
        else:
            written.check(tmp_path / "x", index)


def test_any_flipped_bit_is_found(tmp_path):
    """Drawn over both files; in the .idx a checksum finds what its structure does not show."""
    written = write(tmp_path / "x")
    generator = random.Random(5)
    for ending, size in (("bin", written.bin_bytes), ("idx", written.idx_bytes)):
        path = tmp_path / f"x.{ending}"
        whole = path.read_bytes()
        for bit in [0, 8 * size - 1, *(generator.randrange(8 * size) for _ in range(60))]:
            damage(path, flip(bit))
            assert f"x.{ending}" in refusal(tmp_path / "x") or str(tmp_path / "x") in refusal(tmp_path / "x"), bit
            path.write_bytes(whole)
    open_(tmp_path / "x")


def test_sizes_are_checked_without_reading_everything(tmp_path):
    write(tmp_path / "x")
    damage(tmp_path / "x.bin", flip(4000))  # only a checksum can tell
    open_(tmp_path / "x", verify="sizes")
    for ending in ("bin", "idx"):
        whole = (tmp_path / f"x.{ending}").read_bytes()
        for cut in (whole[:-1], whole[: len(whole) // 2], b"", whole + b"\0"):
            (tmp_path / f"x.{ending}").write_bytes(cut)
            assert f"x.{ending}" in refusal(tmp_path / "x", verify="sizes")
        (tmp_path / f"x.{ending}").write_bytes(whole)


def test_files_of_two_data_sets(tmp_path):
    """Each of the three files from another data set, of another size or of the same."""
    for name, seed, count in (("x", 0, 60), ("other", 1, 61)):
        write(tmp_path / name, seed, count)
    for ending in ("bin", "idx", "json"):
        path = tmp_path / f"x.{ending}"
        ours = path.read_bytes()
        path.write_bytes((tmp_path / f"other.{ending}").read_bytes())
        assert str(tmp_path / "x") in refusal(tmp_path / "x", verify="sizes")
        path.write_bytes(ours)
    # A .bin with as many tokens, in another order: the pair looks whole, its checksum does not.
    tokens = np.fromfile(tmp_path / "x.bin", np.uint16)
    tokens[::-1].tofile(tmp_path / "x.bin")
    open_(tmp_path / "x", verify="sizes")
    assert "its checksum is wrong" in refusal(tmp_path / "x")


def test_vocabulary_and_tokenizer(tmp_path):
    (tmp_path / "t.json").write_text("{}")
    sha256 = hashlib.sha256(b"{}").hexdigest()
    write(tmp_path / "x", tokenizer_sha256=sha256)
    write(tmp_path / "y", tokenizer_sha256="cd" * 32)
    open_(tmp_path / "x", tokenizer=str(tmp_path / "t.json"))
    (tmp_path / "t.json").write_text("{ }")
    assert "was made with another tokenizer" in refusal(tmp_path / "x", tokenizer=str(tmp_path / "t.json"))
    assert "no such tokenizer" in refusal(tmp_path / "x", tokenizer=str(tmp_path / "none.json"))
    message = refusal(tmp_path / "x", validation=str(tmp_path / "y"))
    assert f"{tmp_path / 'y'}: was made with another tokenizer than {tmp_path / 'x'}" in message
    largest = IndexedDataset(tmp_path / "x").max_token()
    config = DataConfig(train=str(tmp_path / "x"), seq_len=8)
    open_data(config, vocab_size=largest + 1, n_future_tokens=2, seed=0)
    for _ in range(2):
        with pytest.raises(UserError, match=f"holds token {largest}, but model.vocab_size is {largest}"):
            open_data(config, vocab_size=largest, n_future_tokens=2, seed=0)
        (tmp_path / "x.json").unlink(missing_ok=True)  # then the tokens themselves are looked at


def test_shares_of_the_checks_find_it_together(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_writer, "CHUNK_BYTES", 64)
    write(tmp_path / "x")
    damage(tmp_path / "x.bin", flip(8 * 300))
    found = []
    for rank in range(3):
        config = DataConfig(train=str(tmp_path / "x"), seq_len=8, verify="checksum")
        try:
            open_data(config, vocab_size=500, n_future_tokens=2, seed=0, share=Share(rank, 3))
        except UserError as error:
            found.append((rank, str(error)))
    assert len(found) == 1 and "between byte 256 and byte 320" in found[0][1]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "cannot be read"),
        ("[]", "not the manifest of a data set"),
        ('{"documents": 3}', "not the manifest of a data set"),
        ('{"format": "megamtp-dataset", "version": 99}', "version 99"),
        ('{"format": "megamtp-dataset", "version": 1, "tokens": 3, "colour": 1}', "bin_bytes, bin_sha256, chunk_bytes"),
    ],
)
def test_no_manifest(tmp_path, content, expected):
    write(tmp_path / "x")
    (tmp_path / "x.json").write_text(content)
    assert expected in refusal(tmp_path / "x")


# --- the commands


def test_verify_command(tmp_path, capsys):
    written = write(tmp_path / "x")
    write(tmp_path / "y", seed=1)
    verify_data.main([str(tmp_path / "x"), str(tmp_path / "y")])
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2 and f"{written.tokens:,} tokens" in out[0] and "whole" in out[0]
    damage(tmp_path / "x.bin", flip(77))
    assert "its checksum is wrong" in failure(capsys, str(tmp_path / "x"))
    (tmp_path / "x.json").unlink()
    assert "no manifest to verify it by" in failure(capsys, str(tmp_path / "x"))
    (tmp_path / "x.json").write_text("a text of the user's")
    assert "x.json: is in the way" in failure(capsys, "--write-manifest", str(tmp_path / "x"))
    (tmp_path / "x.json").unlink()
    verify_data.main(["--write-manifest", str(tmp_path / "x")])
    verify_data.main([str(tmp_path / "x")])
    assert "with --write-manifest" in failure(capsys, "--tokenizer", "bytes", str(tmp_path / "x"))
    assert "bytes has 257 tokens" in failure(capsys, "--write-manifest", "--tokenizer", "bytes", str(tmp_path / "x"))


def failure(capsys, *arguments, command=verify_data):
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        command.main(list(arguments))
    assert end.value.code == 2
    return capsys.readouterr().err


def test_inspect_command(tmp_path, capsys):
    texts = ["def f():\n    pass\n", "", "Grüße"]
    with IndexedDatasetWriter(tmp_path / "x", "uint16") as writer:
        for text in texts:
            writer.add_document([*text.encode(), 256])
        writer.add_document([])
        writer.add_document(list(b"long " * 400))
    inspect_data.main([str(tmp_path / "x"), "--tokenizer", "bytes", "--show", "5"])
    out = capsys.readouterr().out
    assert "def f():\n    pass\n<|endoftext|>" in out and "Grüße<|endoftext|>" in out and "characters ...]" in out
    assert "5, 1 of them empty" in out and "manifest" in out and "0 to 2,000" in out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.strip().endswith("#") or "%" in line}
    assert rows["1,024"][2:5] == ["2,047", "1", "2,000"] and rows["0"][1:3] == ["1", "0"]
    inspect_data.main([str(tmp_path / "x"), "--documents", "2"])
    assert "71 114 195 188 195 159 101 256" in capsys.readouterr().out
    assert "has 5 documents" in failure(capsys, str(tmp_path / "x"), "--documents", "5", command=inspect_data)
    assert "cannot read the data" in failure(capsys, str(tmp_path / "none"), command=inspect_data)
