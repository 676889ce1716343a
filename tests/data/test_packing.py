import itertools
import json

import numpy as np
import pytest
import torch

from megamtp.data import packing
from megamtp.data.loader import Batch
from megamtp.data.packing import MODES, PackedSamples, best_fit_decreasing
from megamtp.data.samples import PADDING
from megamtp.data.stream import Stream
from megamtp.errors import UserError
from tests.data.test_stream import CASES, owners, write_sequences


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Hundreds of small caches: waiting for the disk would take most of the time."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def all_documents(total):
    """Every way to cut ``total`` tokens into documents."""
    for cuts in itertools.product([False, True], repeat=total - 1):
        ends = [place + 1 for place, cut in enumerate(cuts) if cut] + [total]
        yield np.diff([0, *ends]).tolist()


def check_samples(samples, owner, first_token=0):
    """Every position once; every target the true next token of its document, else masked; ids tell pieces apart.

    Token t of the data is the number t, so that tokens and targets say where they are from.
    """
    s, n = samples.seq_len, samples.n_future_tokens
    tokens, ids = samples.batch(range(samples.samples_per_epoch))
    assert tokens.shape == ids.shape == (samples.samples_per_epoch, s + n)
    assert tokens.dtype == np.int64 and ids.dtype == np.int32
    targets = Batch(torch.from_numpy(tokens), torch.from_numpy(ids), s).targets(True, ignore_index=-7).numpy()
    targets = targets.transpose(1, 2, 0).tolist()  # plain numbers: numpy's scalars are slow
    seen = []
    for row, t in itertools.product(range(len(tokens)), range(s)):
        token = int(tokens[row, t])
        if token == PADDING:
            assert targets[row][t] == [-7] * n
            continue
        place = token - first_token
        seen.append(place)
        for k in range(1, n + 1):
            exists = place + k < len(owner) and owner[place + k] == owner[place]
            assert targets[row][t][k - 1] == (token + k if exists else -7)
    assert sorted(seen) == list(range(len(owner)))
    for row_tokens, row_ids in zip(tokens.tolist(), ids.tolist(), strict=True):
        runs = [list(run) for _, run in itertools.groupby(zip(row_ids, row_tokens, strict=True), key=lambda x: x[0])]
        assert [run[0][0] for run in runs] == list(range(len(runs)))  # 0, 1, .. and padding, if any, last
        for run in runs:
            content = [token for _, token in run]
            assert content == list(range(content[0], content[0] + len(run))) or content == [PADDING] * len(run)
            assert len({owner[token - first_token] for token in content if token != PADDING}) <= 1
        assert all(PADDING not in [token for _, token in run] for run in runs[:-1])
    return tokens, ids


def pieces_of(samples):
    """The (start, length) of the pieces in each bin."""
    return [
        list(zip(samples.piece_starts[a:b].tolist(), samples.piece_lengths[a:b].tolist(), strict=True))
        for a, b in itertools.pairwise(samples.bin_offsets.tolist())
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seq_len, n", [(3, 2), (4, 1), (2, 4), (8, 3)])
def test_every_way_to_cut_a_short_text(tmp_path, mode, seq_len, n):
    for number, lengths in enumerate(all_documents(8)):
        documents = [[length] for length in lengths]
        if number % 3 == 1:  # empty documents in places
            documents = [[0], *documents[:1], [], *documents[1:], [0]]
        data = write_sequences(tmp_path / f"x{number}", documents)
        samples = PackedSamples(data, seq_len, n, seed=0, shuffle=False, mode=mode, cache_dir=tmp_path / "cache")
        check_samples(samples, owners(documents))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seq_len, n", [(1, 1), (3, 2), (5, 4), (30, 2)])
@pytest.mark.parametrize("documents", CASES)
def test_documents_of_several_sequences_and_parts_of_the_data(tmp_path, monkeypatch, documents, mode, seq_len, n):
    monkeypatch.setattr(packing, "SCAN_DOCUMENTS", 3)
    data = write_sequences(tmp_path / "x", documents)
    for first in range(0, len(documents), 3):
        stream = Stream(data, first)
        if stream.n_tokens:
            samples = PackedSamples(stream, seq_len, n, seed=1, mode=mode, cache_dir=tmp_path / "cache")
            check_samples(samples, owners(documents[first:]), first_token=int(stream.tokens[0]))


def test_one_document_a_sample_in_order(write_dataset):
    samples = PackedSamples(write_dataset([2, 0, 7, 3, 6]), 3, 2, seed=0, shuffle=False, mode="document")
    tokens, ids = samples.batch(range(samples.samples_per_epoch))
    assert tokens.tolist() == [
        [0, 1, -1, -1, -1],
        [2, 3, 4, 5, 6],
        [5, 6, 7, 8, -1],
        [8, -1, -1, -1, -1],
        [9, 10, 11, -1, -1],
        [12, 13, 14, 15, 16],
        [15, 16, 17, -1, -1],
    ]
    assert ids.tolist() == [[int(token == -1) for token in row] for row in tokens.tolist()]


def test_best_fit_by_hand(write_dataset):
    """Pieces of 8 positions and shorter ones: 8 | 6 + 2 | 5 + 3 | 4, bins in file order of their longest piece."""
    samples = PackedSamples(write_dataset([5, 2, 12, 3, 6]), 8, 2, seed=0, shuffle=False)
    assert pieces_of(samples) == [[(0, 5), (19, 3)], [(7, 8)], [(15, 4)], [(22, 6), (5, 2)]]
    tokens, ids = samples.batch([0, 1])
    assert tokens.tolist() == [[0, 1, 2, 3, 4, 19, 20, 21, -1, -1], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16]]
    assert ids.tolist() == [[0] * 5 + [1] * 3 + [2] * 2, [0] * 10]


def naive_best_fit_decreasing(lengths, capacity):
    """The room left in each bin, one piece and one bin at a time."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@pytest.mark.parametrize("capacity", [1, 7, 16, 100, 1 << 16])
def test_best_fit_decreasing_equals_the_naive_one(capacity):
    random = np.random.default_rng(capacity)
    for trial in range(30 if capacity < 1 << 16 else 6):
        largest = [capacity, max(1, capacity // 3), max(1, capacity // 10)][trial % 3]
        lengths = random.integers(1, largest + 1, random.integers(1, 300)).astype(np.int32)
        by_length, bins, slots, n_bins = best_fit_decreasing(lengths, capacity)
        assert sorted(by_length.tolist()) == list(range(len(lengths)))
        filled = np.bincount(bins, weights=lengths[by_length], minlength=n_bins)
        assert (filled > 0).all()
        assert sorted((capacity - filled).astype(int).tolist()) == naive_best_fit_decreasing(lengths, capacity)
        for i in range(n_bins):
            assert sorted(slots[bins == i].tolist()) == list(range((bins == i).sum()))


def test_packing_is_tight_and_cuts_no_short_document(write_dataset):
    random = np.random.default_rng(5)
    lengths = np.maximum(1, random.lognormal(3.5, 1.2, 3000)).astype(int).tolist()
    samples = PackedSamples(write_dataset(lengths), 64, 4, seed=0)
    starts, begin = {}, 0
    for length in lengths:
        starts[begin] = length
        begin += length
    pieces = [piece for members in pieces_of(samples) for piece in members]
    assert {start: length for start, length in pieces if starts.get(start, 65) <= 64} == {
        start: length for start, length in starts.items() if length <= 64
    }
    assert all(sum(length for _, length in members) <= 64 for members in pieces_of(samples))
    bound = -(-sum(lengths) // 64)
    assert bound <= samples.samples_per_epoch <= 1.01 * bound
    assert samples.samples_per_epoch == len(naive_best_fit_decreasing([length for _, length in pieces], 64))


@pytest.mark.parametrize("mode", MODES)
def test_order_of_the_epochs(write_dataset, mode):
    data = write_dataset([7, 3, 19, 1, 1, 8, 40, 2, 6, 6, 6, 30])
    samples = PackedSamples(data, 8, 2, seed=3, mode=mode)
    in_order = PackedSamples(data, 8, 2, seed=3, shuffle=False, mode=mode)
    count = samples.samples_per_epoch
    assert count == in_order.samples_per_epoch
    expected = [in_order.get(i) for i in range(count)]
    assert in_order.get(count + 1)[0].tolist() == expected[1][0].tolist()
    orders = set()
    for epoch in range(3):
        rows = samples.batch(range(epoch * count, (epoch + 1) * count))[0].tolist()
        assert sorted(rows) == sorted(tokens.tolist() for tokens, _ in expected)
        orders.add(str(rows))
    assert len(orders) == 3
    starts = in_order.piece_starts[in_order.bin_offsets[:-1]]
    assert (np.diff(starts) > 0).all()  # bins are in file order, the head of a validation set is like the rest
    one = samples.get(count - 1)
    assert one[0].shape == (10,) and [array.shape for array in samples.batch([])] == [(0, 10)] * 2
    tokens, ids = samples.batch([count - 1, 2 * count])  # across epochs, again
    assert np.array_equal(tokens[0], one[0]) and np.array_equal(ids[0], one[1])


def test_identity_and_cache_of_each_kind(write_dataset, tmp_path):
    data = write_dataset([7, 3, 19])
    samples = PackedSamples(data, 8, 2, seed=3)
    assert samples.identity()["packing"] == "best_fit" and json.loads(json.dumps(samples.identity()))
    assert PackedSamples(data, 8, 2, seed=3, mode="document").identity() != samples.identity()
    PackedSamples(Stream(data, 1), 8, 2, seed=3)
    PackedSamples(data, 9, 2, seed=3)
    PackedSamples(data, 8, 1, seed=4)  # as the first
    folder = data.prefix.with_name(data.prefix.name + ".cache")
    assert len([path for path in folder.iterdir() if path.is_dir()]) == 4
    PackedSamples(data, 8, 1, seed=4, cache_dir=tmp_path / "elsewhere")
    assert len(list((tmp_path / "elsewhere").glob("best_fit-8-*/meta.json"))) == 1


def test_bad_input(write_dataset):
    with pytest.raises(UserError, match="no packing 'tight'; choose one of document, best_fit"):
        PackedSamples(write_dataset([5]), 8, 2, seed=0, mode="tight")
    for lengths in ([], [0, 0]):
        with pytest.raises(UserError, match="has no tokens"):
            PackedSamples(write_dataset(lengths), 8, 2, seed=0)
