import json
import warnings

import numpy as np
import pytest

from megamtp.data import samples as samples_module
from megamtp.data.samples import Samples, permute
from megamtp.data.stream import Stream
from megamtp.errors import UserError


def permutation(size, key):
    return permute(np.arange(size, dtype=np.uint64), size, key)


@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_permute_is_a_bijection_of_every_small_range(key):
    for size in range(1, 201):
        assert sorted(permutation(size, key).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [2**16 - 1, 2**16, 2**16 + 1, 100_003])
def test_permute_is_a_bijection_of_larger_ranges(size):
    assert np.array_equal(np.sort(permutation(size, 3)), np.arange(size))


def test_permute_stays_inside_and_apart_in_a_huge_range():
    size = 10**15 + 3
    out = permute(np.arange(size - 20_000, size, dtype=np.uint64), size, 9)
    assert out.max() < size and len(np.unique(out)) == 20_000


def test_permute_index_by_index_is_the_same():
    whole = permutation(37, 5)
    assert [int(permute(np.array([i], np.uint64), 37, 5)[0]) for i in range(37)] == whole.tolist()


def test_permute_mixes():
    """Displacement, neighbours and keys look like those of a random permutation (bounds are some 5 sigma)."""
    size = 20_000
    first, second = permutation(size, 1).astype(float), permutation(size, 2).astype(float)
    for a, b in [(first, np.arange(size)), (first[1:], first[:-1]), (first, second)]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.035
    assert sum(first == second) < 10
    # Every value at every place, over keys: 2000 keys, 8 places, 250 expected.
    counts = np.zeros((8, 8), int)
    for key in range(2000):
        counts[np.arange(8), permutation(8, key)] += 1
    assert counts.min() > 170 and counts.max() < 330


def test_order_is_frozen(write_dataset):
    """A change of the order would make every resumed run read other data: then say so, and change the state.

    The numbers come from a second implementation, on Python's integers.
    """
    assert permutation(12, 1234).tolist() == [3, 8, 10, 2, 6, 9, 7, 11, 0, 5, 4, 1]
    samples = Samples(write_dataset([1000]), 16, 4, seed=7)
    assert [samples.start(i) for i in (0, 1, 60, 61, 1000)] == [654, 974, 190, 281, 224]


@pytest.mark.parametrize("n_tokens", [*range(12, 45), 200])
@pytest.mark.parametrize("seq_len, n", [(5, 1), (8, 4), (1, 3)])
def test_samples_tile_the_stream_in_every_epoch(write_dataset, n_tokens, seq_len, n):
    samples = Samples(write_dataset([n_tokens]), seq_len, n, seed=3)
    per_epoch = samples.samples_per_epoch
    fitting = (n_tokens - n) // seq_len
    assert per_epoch in (fitting, fitting - 1) and per_epoch >= 1
    offsets = set()
    for epoch in range(8):
        cuts = [samples.get(epoch * per_epoch + i)[0] for i in range(per_epoch)]
        starts = sorted(cut[0] for cut in cuts)
        assert np.array_equal(np.diff(starts), [seq_len] * (per_epoch - 1))
        assert 0 <= starts[0] < seq_len
        for cut in cuts:
            assert np.array_equal(cut, np.arange(cut[0], cut[0] + seq_len + n))
        offsets.add(int(starts[0]))
    if fitting > 1 and seq_len > 1:
        assert len(offsets) > 1


def test_offset_reaches_all_that_fits(write_dataset):
    """Two samples fit, one is taken: every offset of [0, seq_len). One fits: only what is left over."""
    for n_tokens, offsets in [(4 * 2 + 2, 4), (4 + 2, 1), (4 + 2 + 2, 3)]:
        samples = Samples(write_dataset([n_tokens]), 4, 2, seed=0)
        assert samples.samples_per_epoch == 1
        assert {samples.start(i) for i in range(200)} == set(range(offsets))


def test_order_differs_between_epochs_and_seeds(write_dataset):
    data = write_dataset([2000])
    orders = set()
    for seed in (0, 1, -1):
        samples = Samples(data, 10, 2, seed)
        count = samples.samples_per_epoch
        for epoch in range(5):
            orders.add(tuple(samples.start(epoch * count + i) // 10 for i in range(count)))
    assert len(orders) == 15
    assert samples.start(77) == Samples(data, 10, 2, -1).start(77)


def test_without_shuffling_in_order(write_dataset):
    samples = Samples(write_dataset([30]), 7, 2, seed=5, shuffle=False)
    assert samples.samples_per_epoch == 4
    assert [samples.start(i) for i in range(8)] == [0, 7, 14, 21] * 2


def brute_force_ids(lengths, start, stop):
    """Walk the stream token by token."""
    owner = [document for document, length in enumerate(lengths) for _ in range(length)][start:stop]
    ids, current = [], 0
    for i, document in enumerate(owner):
        current += i > 0 and document != owner[i - 1]
        ids.append(int(current))
    return ids


@pytest.mark.parametrize(
    "lengths", [[20], [3, 4, 13], [0, 0, 5, 0, 6, 0, 0, 9, 0], [1] * 20, [0, 1, 0, 1, 18, 0], [10, 10], [0, 20, 0]]
)
def test_document_ids_of_every_cut(write_dataset, lengths):
    data = write_dataset(lengths)
    for start in range(20):
        for stop in range(start + 1, 21):
            [ids] = Stream(data).document_ids(np.array([start]), stop - start)
            assert ids.dtype == np.int32 and ids.tolist() == brute_force_ids(lengths, start, stop)
    samples = Samples(data, 5, 3, seed=1)
    for index in range(30):
        tokens, ids = samples.get(index)
        assert tokens.dtype == np.int64 and tokens.shape == ids.shape == (8,)
        assert ids.tolist() == brute_force_ids(lengths, tokens[0], tokens[0] + 8)


def test_document_ids_of_random_streams(write_dataset):
    random = np.random.default_rng(0)
    for _ in range(20):
        lengths = (random.integers(0, 6, 60) * random.integers(0, 2, 60)).tolist() + [20]
        samples = Samples(write_dataset(lengths), 11, 4, seed=2)
        for index in range(samples.samples_per_epoch):
            tokens, ids = samples.get(index)
            assert ids.tolist() == brute_force_ids(lengths, tokens[0], tokens[0] + 15)


def test_sequence_longer_than_the_data(write_dataset):
    assert Samples(write_dataset([8]), 5, 3, seed=0).samples_per_epoch == 1
    for lengths in ([7], [0], []):
        with pytest.raises(
            UserError, match=r"a sequence longer than the data: seq_len 5 \+ 3 .* has [70] tokens; lower"
        ):
            Samples(write_dataset(lengths), 5, 3, seed=0)


def test_negative_index_and_no_overflow_warnings(write_dataset):
    samples = Samples(write_dataset([100]), 5, 3, seed=2**70)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        samples.get(10**12)
    with pytest.raises(IndexError):
        samples.get(-1)


def test_permute_without_tables_is_the_same(monkeypatch):
    """Large ranges compute each round; the tables of small ones hold the same."""
    with_tables = [permutation(size, 77).tolist() for size in (1, 2, 5, 64, 1000, 4097)]
    monkeypatch.setattr(samples_module, "TABLE_BITS", 0)
    assert [permutation(size, 77).tolist() for size in (1, 2, 5, 64, 1000, 4097)] == with_tables


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_batch_is_its_samples_one_by_one(write_dataset, shuffle):
    random = np.random.default_rng(3)
    lengths = (random.integers(0, 30, 80) * random.integers(0, 2, 80)).tolist() + [40]
    samples = Samples(write_dataset(lengths), 7, 3, seed=4, shuffle=shuffle)
    for indices in ([0], range(5, 200), random.integers(0, 10_000, 64), list(range(samples.samples_per_epoch))):
        tokens, ids = samples.batch(indices)
        assert tokens.shape == ids.shape == (len(indices), 10)
        assert tokens.dtype == np.int64 and ids.dtype == np.int32
        for row, index in enumerate(indices):
            start = samples.start(int(index))
            assert tokens[row].tolist() == list(range(start, start + 10))
            assert ids[row].tolist() == brute_force_ids(lengths, start, start + 10)
            assert all(np.array_equal(a, b) for a, b in zip(samples.get(index), (tokens[row], ids[row]), strict=True))
    assert [array.shape for array in samples.batch([])] == [(0, 10), (0, 10)]
    with pytest.raises(IndexError):
        samples.batch([3, -1])


def test_samples_of_a_part_of_the_documents(write_dataset):
    lengths = [13, 0, 40, 7, 90, 1, 1, 60, 88]
    data = write_dataset(lengths)
    train, validation = Stream(data).split(0.3)
    assert (train.n_documents, validation.n_documents) == (8, 1)
    for stream, first in ((train, 0), (validation, 212)):
        samples = Samples(stream, 5, 2, seed=0, shuffle=False)
        tokens, ids = samples.batch(range(samples.samples_per_epoch))
        assert tokens[:, :5].ravel().tolist() == list(range(first, first + tokens[:, :5].size))
        assert first + stream.n_tokens - 7 - 5 < tokens[-1, 0] <= first + stream.n_tokens - 7
        for row in range(len(tokens)):
            assert ids[row].tolist() == brute_force_ids(lengths, tokens[row, 0], tokens[row, 0] + 7)
        assert samples.dataset is data and samples.identity()["n_tokens"] == stream.n_tokens


def test_identity(write_dataset):
    data = write_dataset([100, 200])
    first = Samples(data, 8, 3, seed=11).identity()
    assert first["packing"] == "stream" and json.loads(json.dumps(first)) == first
    assert set(first) == {
        "packing",
        "seed",
        "shuffle",
        "seq_len",
        "n_future_tokens",
        "n_tokens",
        "samples_per_epoch",
    } | {"sampled_tokens_crc32"}
    others = [
        Samples(data, 8, 3, seed=12),
        Samples(data, 9, 3, seed=11),
        Samples(data, 8, 2, seed=11),
        Samples(data, 8, 3, seed=11, shuffle=False),
        Samples(Stream(data, 1), 8, 3, seed=11),
    ]
    assert len({json.dumps(samples.identity()) for samples in others} - {json.dumps(first)}) == 5
    assert Samples(Stream(data), 8, 3, seed=11).identity() == first
