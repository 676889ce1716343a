import itertools
import struct

import numpy as np
import pytest

from megamtp.data import stream as stream_module
from megamtp.data.indexed_dataset import IndexedDataset
from megamtp.data.stream import Stream
from megamtp.errors import UserError

CASES = [  # the sequences of each document
    [[20]],
    [[3], [4], [13]],
    [[3, 0, 2], [], [0], [7, 1], [0, 0], [5], []],
    [[], [], [4], [], [4, 4], [], [], [8]],
    [[1]] * 20,
    [[0], [20], [0, 0]],
]


def write_sequences(prefix, documents, dtype="<i4") -> IndexedDataset:
    """Documents of several sequences each, given by their lengths; token t of the stream is the number t."""
    lengths = [length for document in documents for length in document]
    code = {"<i4": 4, "<u2": 8}[dtype]
    ends = np.cumsum([0, *lengths]) * np.dtype(dtype).itemsize
    indices = np.cumsum([0, *map(len, documents)])
    prefix.with_name(prefix.name + ".idx").write_bytes(
        struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, len(lengths), len(indices))
        + np.array(lengths, "<i4").tobytes()
        + ends[:-1].astype("<i8").tobytes()
        + indices.astype("<i8").tobytes()
    )
    np.arange(sum(lengths)).astype(dtype).tofile(prefix.with_name(prefix.name + ".bin"))
    return IndexedDataset(prefix)


def owners(documents):
    """The document of each token, walking token by token."""
    return [number for number, document in enumerate(documents) for length in document for _ in range(length)]


def brute_force_ids(owner):
    ids = []
    for i, document in enumerate(owner):
        ids.append(ids[-1] + (document != owner[i - 1]) if ids else 0)
    return ids


@pytest.mark.parametrize("coarse", [1, 2, 3, 1 << 18])
@pytest.mark.parametrize("documents", CASES)
def test_ids_of_every_cut_of_every_run_of_documents(tmp_path, monkeypatch, documents, coarse):
    monkeypatch.setattr(stream_module, "MAX_COARSE", coarse)
    data = write_sequences(tmp_path / "x", documents)
    for first, last in itertools.combinations(range(len(documents) + 1), 2):
        stream = Stream(data, first, last)
        owner = owners(documents[first:last])
        before = len(owners(documents[:first]))
        assert stream.n_tokens == len(owner) and stream.n_documents == last - first
        assert stream.tokens.tolist() == list(range(before, before + len(owner)))
        for length in range(1, len(owner) + 1):
            starts = np.arange(len(owner) - length + 1)[::-1]  # in any order
            ids = stream.document_ids(starts, length)
            assert ids.dtype == np.int32 and ids.shape == (len(starts), length)
            assert ids.tolist() == [brute_force_ids(owner[start : start + length]) for start in starts]


def test_ids_of_many_random_cuts(write_dataset):
    random = np.random.default_rng(0)
    lengths = (random.integers(0, 9, 5000) * random.integers(0, 2, 5000)).tolist() + [50]
    data = write_dataset(lengths)
    stream = Stream(data)
    starts = random.integers(0, data.n_tokens - 40, 300)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    cuts = [owner[start : start + 40] for start in starts]
    expected = [np.cumsum(np.diff(cut, prepend=cut[:1]) > 0).tolist() for cut in cuts]
    assert stream.document_ids(starts, 40).tolist() == expected
    for coarse in (7, 300):
        stream = Stream(data)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stream_module, "MAX_COARSE", coarse)
            assert stream.document_ids(starts, 40).tolist() == expected
        assert len(stream._coarse_starts[0]) <= coarse


def test_beyond_the_end_is_the_last_document(write_dataset):
    assert Stream(write_dataset([3, 2, 0])).document_ids(np.array([1, 4]), 6).tolist() == [[0, 0, 1, 1, 1, 1], [0] * 6]


def test_no_copy_of_the_tokens_and_little_of_the_index(tmp_path):
    data = write_sequences(tmp_path / "x", [[2]] * 300_000, "<u2")
    stream = Stream(data)
    assert np.shares_memory(stream.tokens, data.tokens) and not stream.tokens.flags.writeable
    assert stream.document_ids(np.array([299_999]), 4).tolist() == [[0, 1, 1, 2]]
    assert stream._coarse_starts[0].flags.aligned and len(stream._coarse_starts[0]) == 150_000
    stream.read_ahead(np.array([0, 599_990]), 10)


@pytest.mark.parametrize("documents", CASES)
def test_split_cuts_at_the_nearest_boundary(tmp_path, documents):
    data = write_sequences(tmp_path / "x", documents)
    sizes = np.array([sum(document) for document in documents])
    boundaries = np.cumsum([0, *sizes])
    for first, last in itertools.combinations(range(len(documents) + 1), 2):
        stream = Stream(data, first, last)
        total = stream.n_tokens
        possible = boundaries[first : last + 1] - boundaries[first]
        for fraction in (0.001, 0.05, 0.2, 0.5, 0.9, 0.999):
            wanted = round((1 - fraction) * total)
            nearest = np.abs(possible - wanted).min()
            inside = [b for b in possible if abs(b - wanted) == nearest and 0 < b < total]
            try:
                train, validation = stream.split(fraction)
            except UserError as error:
                assert "empty" in str(error) and str(tmp_path) in str(error) and "\n" not in str(error)
                assert any(abs(b - wanted) == nearest for b in (0, total))
                continue
            assert train.n_tokens in inside and validation.n_tokens > 0
            assert train.first_document == first and validation.last_document == last
            assert train.last_document == validation.first_document
            assert train.tokens.tolist() + validation.tokens.tolist() == stream.tokens.tolist()


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 1.5, float("nan")])
def test_split_of_no_fraction(write_dataset, fraction):
    with pytest.raises(UserError, match="between 0 and 1"):
        Stream(write_dataset([5, 5])).split(fraction)


def test_documents_outside(write_dataset):
    data = write_dataset([5, 5])
    assert Stream(data, 1, 1).n_tokens == 0 and Stream(write_dataset([])).n_tokens == 0
    for first, last in [(-1, 1), (0, 3), (2, 1)]:
        with pytest.raises(UserError, match=r"no documents \[.*it has 2"):
            Stream(data, first, last)
