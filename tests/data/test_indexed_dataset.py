import struct

import numpy as np
import pytest

from megamtp.data import indexed_dataset
from megamtp.data.dataset_writer import IndexedDatasetWriter
from megamtp.data.indexed_dataset import IndexedDataset, token_dtype
from megamtp.data.stream import Stream
from megamtp.errors import UserError
from megamtp.files import write_atomic

DOCUMENTS = [[1, 2, 65000], [], [7], [8, 9, 10, 11]]


def idx_bytes(code=8, lengths=(3, 0, 1, 4), pointers=(0, 6, 6, 8), documents=(0, 1, 2, 3, 4), version=1):
    """The .idx from the description of the format, field by field."""
    return (
        b"MMIDIDX\x00\x00"
        + struct.pack("<Q", version)
        + struct.pack("<B", code)
        + struct.pack("<Q", len(lengths))
        + struct.pack("<Q", len(documents))
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(pointers)}q", *pointers)
        + struct.pack(f"<{len(documents)}q", *documents)
    )


BIN = struct.pack("<8H", 1, 2, 65000, 7, 8, 9, 10, 11)


@pytest.fixture
def prefix(tmp_path):
    """A good pair whose name holds a dot, which ``Path.with_suffix`` would lose."""
    prefix = tmp_path / "corpus.v1"
    put(prefix, idx_bytes(), BIN)
    return prefix


def put(prefix, idx, bin=BIN):
    prefix.with_name(prefix.name + ".idx").write_bytes(idx)
    prefix.with_name(prefix.name + ".bin").write_bytes(bin)


def refusal(prefix):
    with pytest.raises(UserError) as error:
        IndexedDataset(prefix)
    message = str(error.value)
    assert "\n" not in message and str(prefix) in message
    return message


def test_written_bytes(tmp_path):
    with IndexedDatasetWriter(tmp_path / "new" / "x", token_dtype(65499)) as writer:
        for document in DOCUMENTS:
            writer.add_document(document)
    folder = tmp_path / "new"
    assert sorted(file.name for file in folder.iterdir()) == ["x.bin", "x.idx"]
    assert (folder / "x.idx").read_bytes() == idx_bytes()
    assert (folder / "x.bin").read_bytes() == BIN


def test_written_bytes_int32(tmp_path):
    with IndexedDatasetWriter(tmp_path / "x", token_dtype(65500)) as writer:
        writer.add_document(np.array([70000, 1]))
        writer.add_document([2])
    assert (tmp_path / "x.idx").read_bytes() == idx_bytes(4, (2, 1), (0, 8), (0, 1, 2))
    assert (tmp_path / "x.bin").read_bytes() == struct.pack("<3i", 70000, 1, 2)


@pytest.mark.parametrize("chunk", [1, 2, 3, 1 << 22])
def test_read(prefix, monkeypatch, chunk):
    monkeypatch.setattr(indexed_dataset, "SCAN_ITEMS", chunk)
    data = IndexedDataset(prefix)
    assert len(data) == data.n_documents == 4
    assert [list(data[i]) for i in range(4)] == DOCUMENTS
    assert [list(document) for document in data] == DOCUMENTS
    assert data.dtype == np.uint16 and data.n_tokens == 8 and data.max_token() == 65000
    assert list(data.tokens) == sum(DOCUMENTS, [])
    assert list(data.document_offsets) == [0, 3, 3, 4, 8]
    assert data.document_offsets.dtype == np.int64


def test_read_documents_of_several_sequences(prefix):
    put(prefix, idx_bytes(documents=(0, 2, 2, 4, 4, 4)))
    data = IndexedDataset(prefix)
    assert len(data) == 4 and data.n_documents == 5
    assert list(data.document_offsets) == [0, 3, 3, 8, 8, 8]
    assert Stream(data).document_ids(np.array([1]), 7).tolist() == [[0, 0, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("documents", [[], [[]], [[], []]])
def test_no_tokens(tmp_path, documents):
    with IndexedDatasetWriter(tmp_path / "x", "uint16") as writer:
        for document in documents:
            writer.add_document(document)
    data = IndexedDataset(tmp_path / "x")
    assert data.n_tokens == 0 and len(data) == len(documents) and data.max_token() == -1
    assert list(data.document_offsets) == [0] * (len(documents) + 1)


@pytest.mark.parametrize("ending", [".idx", ".bin"])
def test_missing_file(prefix, ending):
    prefix.with_name(prefix.name + ending).unlink()
    message = refusal(prefix)
    assert ending + ": cannot read the data: No such file" in message


def test_every_truncation_of_the_idx(prefix):
    whole = idx_bytes()
    for size in range(len(whole)):
        put(prefix, whole[:size])
        assert ("not a Megatron" if size < 9 else "truncated") in refusal(prefix)


@pytest.mark.parametrize("size", [0, 1, 14, 15])
def test_truncated_bin(prefix, size):
    put(prefix, idx_bytes(), BIN[:size])
    assert f"is truncated: {size} bytes, corpus.v1.idx describes 16" in refusal(prefix)


@pytest.mark.parametrize(
    "idx, expected",
    [
        (b"PK\x03\x04 something else, long enough to hold a header", "not a Megatron .idx"),
        (idx_bytes(version=2), "version 2"),
        (idx_bytes(code=9), "dtype code 9 (unknown)"),
        (idx_bytes(code=0), "dtype code 0 (unknown)"),
        (idx_bytes(code=6), "dtype code 6 (float64)"),
        (idx_bytes() + bytes(4), "multimodal"),
        (idx_bytes() + bytes(5), "damaged"),
        (idx_bytes(lengths=(3, 0, 1, -4)), "sequence 3 has a negative length"),
        (idx_bytes(lengths=(3, 0, 1, 3)), "belongs to another .idx"),
        (idx_bytes(pointers=(0, 6, 8, 6)), "sequence 2 does not follow"),
        (idx_bytes(pointers=(2, 8, 8, 10)), "sequence 0 does not follow"),
        (idx_bytes(documents=(0, 1, 2, 3, 5)), "document indices"),
        (idx_bytes(documents=(1, 2, 4)), "document indices"),
        (idx_bytes(documents=(0, 3, 2, 4)), "document indices"),
        (idx_bytes(documents=()), "document indices"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 1 << 22])
def test_foreign_and_damaged(prefix, monkeypatch, idx, expected, chunk):
    monkeypatch.setattr(indexed_dataset, "SCAN_ITEMS", chunk)
    put(prefix, idx)
    assert expected in refusal(prefix)


@pytest.mark.parametrize(
    "dtype, document, expected",
    [
        ("uint16", [1, 65536], "token 65536, outside 0..65535 of uint16"),
        ("uint16", [-1, 3], "token -1"),
        ("int32", [2**31], "token 2147483648"),
        ("int32", [1.5], "float64"),
        ("int32", [2**70], "object"),
        ("int32", [[1, 2]], "shape (1, 2)"),
    ],
)
def test_bad_document(tmp_path, dtype, document, expected):
    with pytest.raises(UserError) as error, IndexedDatasetWriter(tmp_path / "x", dtype) as writer:
        writer.add_document([1])
        writer.add_document(document)
    assert expected in str(error.value) and "document 1 " in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_float_dtype_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be stored as float32"):
        IndexedDatasetWriter(tmp_path / "x", "float32")


def test_negative_token_in_foreign_data(prefix):
    put(prefix, idx_bytes(4, (2,), (0,), (0, 1)), struct.pack("<2i", 5, -1))
    with pytest.raises(UserError, match="token -1 is negative"):
        IndexedDataset(prefix).max_token()


def test_failure_keeps_the_older_pair(prefix):
    with pytest.raises(RuntimeError), IndexedDatasetWriter(prefix, "int32") as writer:
        writer.add_document([1, 2, 3])
        raise RuntimeError
    assert len(list(prefix.parent.iterdir())) == 2
    assert [list(document) for document in IndexedDataset(prefix)] == DOCUMENTS


@pytest.mark.parametrize("published", [0, 1])
def test_crash_while_publishing_leaves_no_complete_pair(prefix, monkeypatch, published):
    """Over an older pair, whose .idx and manifest must not meet the new .bin."""
    (prefix.parent / "corpus.v1.json").write_text('{"format": "megamtp-dataset"}')
    renames = []

    def replace(source, target):
        renames.append(target.name)
        if len(renames) > published:
            raise OSError("power cut")
        source_path = prefix.parent / source
        source_path.rename(target)

    monkeypatch.setattr("megamtp.files.os.replace", replace)
    with pytest.raises(OSError, match="power cut"), IndexedDatasetWriter(prefix, "uint16") as writer:
        writer.add_document(range(8))
    assert renames == ["corpus.v1.bin", "corpus.v1.idx"][: published + 1]
    assert [file.name for file in prefix.parent.iterdir()] == ["corpus.v1.bin"]


def test_two_writers_of_one_output(tmp_path):
    with IndexedDatasetWriter(tmp_path / "x", "uint16") as writer:
        writer.add_document([1])
        with pytest.raises(UserError, match="x: another process is writing it .x.bin.*tmp.; wait, or choose another"):
            IndexedDatasetWriter(tmp_path / "x", "uint16")
        IndexedDatasetWriter(tmp_path / "x.y", "uint16").__exit__(None, None, None)
    assert IndexedDataset(tmp_path / "x")[0].tolist() == [1]


def test_what_has_the_name_of_the_manifest_is_not_replaced(tmp_path):
    (tmp_path / "x.json").write_text('{"text": "megamtp"}\n' * 100)
    with pytest.raises(UserError, match="x.json: is in the way, it is no data set's manifest"):
        IndexedDatasetWriter(tmp_path / "x", "uint16")
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_a_shared_scan_looks_at_everything(write_dataset, monkeypatch):
    monkeypatch.setattr(indexed_dataset, "SCAN_ITEMS", 7)
    data = write_dataset([100])
    for size in (1, 2, 3, 20):
        found = [data.max_token(rank, size) for rank in range(size)]
        assert max(found) == 99 and (size == 1 or len(set(found)) > 1)


def test_unwritable_output(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write here"):
        IndexedDatasetWriter(tmp_path / "file" / "x", "int32")


def test_write_atomic(tmp_path, monkeypatch):
    write_atomic(tmp_path / "x", b"old")
    write_atomic(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new"

    def replace(source, target):
        raise OSError("power cut")

    monkeypatch.setattr("megamtp.files.os.replace", replace)
    with pytest.raises(OSError, match="power cut"):
        write_atomic(tmp_path / "x", b"newest")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"x": b"new"}
