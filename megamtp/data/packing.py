"""Samples that keep documents whole: one document each, or several packed together.

1. Documents are cut into pieces of s = seq_len positions and a shorter rest; a document of at most s tokens is one
   piece. Every position of every document lies in exactly one piece.
2. Pieces are put into bins of s positions. "document": one piece a bin, in file order. "best_fit": best-fit
   decreasing, the longest pieces first, each into the fullest bin that still has room (Ding et al. 2024, "Fewer
   Truncations Improve Language Modeling", arXiv:2404.10830).
3. A bin is a sample of s + n tokens. A piece of s positions is followed by up to n further tokens of its document,
   which only serve as targets; what is left of the sample is padding. So each position's k-th target is the true
   k-th next token of its document wherever that exists, and otherwise lies in another document or in padding.
4. The order of an epoch is that of ``samples.py``: a seeded bijection of all bins; without shuffling, in order.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megamtp.data.index_cache import open_or_build
from megamtp.data.indexed_dataset import IndexedDataset
from megamtp.data.samples import PADDING, EpochOrder, identity
from megamtp.data.stream import Stream
from megamtp.errors import UserError

MODES = ("document", "best_fit")
FORMAT = 1  # of the cached arrays; raise it when the packing changes
SCAN_DOCUMENTS = 1 << 22  # documents per chunk of a scan: temporary arrays stay small


class PackedSamples:
    """Samples of ``seq_len + n_future_tokens`` tokens that hold whole documents, numbered over all epochs.

    The packing is kept in ``cache_dir`` (default: ``PREFIX.cache``) and memory-mapped. ``UserError`` for data without
    tokens, an unknown mode, or a cache folder that cannot be written.
    """

    def __init__(
        self,
        data: IndexedDataset | Stream,
        seq_len: int,
        n_future_tokens: int,
        seed: int,
        shuffle: bool = True,
        mode: str = "best_fit",
        cache_dir: Path | str | None = None,
    ) -> None:
        self.stream = data if isinstance(data, Stream) else Stream(data)
        self.dataset = self.stream.dataset
        self.seq_len = seq_len
        self.n_future_tokens = n_future_tokens
        self.seed = seed
        self.shuffle = shuffle
        self.mode = mode
        if mode not in MODES:
            raise UserError(f"{self.stream.name}: no packing {mode!r}; choose one of {', '.join(MODES)}")
        if not self.stream.n_tokens:
            raise UserError(f"{self.stream.name}: the data has no tokens; give data with documents")
        folder = Path(cache_dir if cache_dir is not None else f"{self.dataset.prefix}.cache")
        name = f"{mode}-{seq_len}-{fingerprint(self.stream, seq_len, mode)[:16]}"
        packed = open_or_build(folder, name, lambda: pack(self.stream, seq_len, mode))
        self.piece_starts = np.asarray(packed["piece_starts"])  # (pieces,) int64, tokens of the stream, bin by bin
        self.piece_lengths = np.asarray(packed["piece_lengths"])  # (pieces,) int32
        self.bin_offsets = np.asarray(packed["bin_offsets"])  # (bins + 1,) int64, pieces
        self.samples_per_epoch = len(self.bin_offsets) - 1
        self._order = EpochOrder(self.samples_per_epoch, seed, shuffle)

    def batch(self, global_indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (b, s + n) int64, -1 for padding, and document ids (b, s + n) int32.

        The ids number the pieces of each sample from 0; padding has the next one.
        """
        bins, _ = self._order.locate(global_indices)
        rows, width = len(bins), self.seq_len + self.n_future_tokens
        n_pieces = self.bin_offsets[bins + 1] - self.bin_offsets[bins]
        row_begins = np.cumsum(n_pieces) - n_pieces  # where the pieces of each row begin in what follows
        row = np.repeat(np.arange(rows), n_pieces)
        number = np.arange(len(row)) - row_begins[row]
        pieces = self.bin_offsets[bins][row] + number
        starts, lengths = self.piece_starts[pieces], self.piece_lengths[pieces].astype(np.int64)
        full = np.flatnonzero(lengths == self.seq_len)
        lengths[full] += self._further_tokens(starts[full] + self.seq_len)
        self.stream.read_ahead(starts, lengths)

        # Runs of the flat batch: the pieces of each row, then its padding.
        run, padding_run = np.arange(len(row)) + row, row_begins + n_pieces + np.arange(rows)
        run_lengths = np.empty(len(row) + rows, dtype=np.int64)
        run_lengths[run] = lengths
        run_lengths[padding_run] = width - np.add.reduceat(lengths, row_begins)
        ids = np.empty(len(run_lengths), dtype=np.int32)
        ids[run], ids[padding_run] = number, n_pieces
        shift = np.zeros(len(run_lengths), dtype=np.int64)  # from a place in the batch to one in the stream
        shift[run] = starts - (np.cumsum(run_lengths) - run_lengths)[run]

        ids = np.repeat(ids, run_lengths).reshape(rows, width)
        padding = ids == n_pieces[:, None]
        places = np.repeat(shift, run_lengths).reshape(rows, width) + np.arange(rows * width).reshape(rows, width)
        places[padding] = 0
        tokens = self.stream.tokens[places].astype(np.int64)
        tokens[padding] = PADDING
        return tokens, ids

    def get(self, global_index: int) -> tuple[np.ndarray, np.ndarray]:
        """One sample: tokens (s + n,) int64 and document ids (s + n,) int32."""
        tokens, ids = self.batch([global_index])
        return tokens[0], ids[0]

    def identity(self) -> dict[str, Any]:
        """Plain values that fix which tokens each global index stands for: part of a checkpoint."""
        return {"packing": self.mode, **identity(self)}

    def _further_tokens(self, ends: np.ndarray) -> np.ndarray:
        """How many of the n tokens from ``ends`` on belong to the document of the token before: (m,) int64."""
        if not len(ends):
            return ends
        ids = self.stream.document_ids(ends - 1, self.n_future_tokens + 1)
        return np.minimum((ids[:, 1:] == 0).sum(axis=1), self.stream.n_tokens - ends)


def fingerprint(stream: Stream, seq_len: int, mode: str) -> str:
    """SHA-256 of all that fixes the packing: the length of every document, mode and seq_len."""
    digest = hashlib.sha256(json.dumps([FORMAT, mode, seq_len, stream.n_documents]).encode())
    for bounds in _document_bounds(stream):
        digest.update(np.diff(bounds).astype("<i8", copy=False).data)
    return digest.hexdigest()


def pack(stream: Stream, seq_len: int, mode: str) -> dict[str, np.ndarray]:
    """piece_starts (pieces,) int64 in tokens of the stream, piece_lengths int32, bin_offsets (bins + 1,) int64.

    Pieces are stored bin by bin, the longest of a bin first; bins in the order of their first piece in the stream.
    """
    starts, lengths = cut_into_pieces(stream, seq_len)
    if mode == "document":
        return {"piece_starts": starts, "piece_lengths": lengths, "bin_offsets": np.arange(len(starts) + 1)}
    by_length, bins, slots, n_bins = best_fit_decreasing(lengths, seq_len)
    starts, lengths = starts[by_length], lengths[by_length]
    # The first of a validation set must be like the rest: file order, not longest first.
    opening = np.empty(n_bins, dtype=np.int64)
    opening[bins[slots == 0]] = starts[slots == 0]
    renumbered = np.empty(n_bins, dtype=bins.dtype)
    renumbered[np.argsort(opening)] = np.arange(n_bins)
    bins = renumbered[bins]
    offsets = np.zeros(n_bins + 1, dtype=np.int64)
    np.cumsum(np.bincount(bins, minlength=n_bins), out=offsets[1:])
    places = offsets[bins] + slots
    piece_starts, piece_lengths = np.empty_like(starts), np.empty_like(lengths)
    piece_starts[places], piece_lengths[places] = starts, lengths
    return {"piece_starts": piece_starts, "piece_lengths": piece_lengths, "bin_offsets": offsets}


def cut_into_pieces(stream: Stream, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts (pieces,) int64 and lengths (pieces,) int32 of the pieces of all documents, in file order."""
    starts, lengths = [], []
    for bounds in _document_bounds(stream):
        n_pieces = -(-np.diff(bounds) // seq_len)  # none of an empty document
        document = np.repeat(np.arange(len(n_pieces)), n_pieces)
        number = np.arange(len(document)) - (np.cumsum(n_pieces) - n_pieces)[document]
        starts.append(bounds[document] + number * seq_len)
        lengths.append(np.minimum(bounds[document + 1] - starts[-1], seq_len).astype(np.int32))
    return np.concatenate(starts), np.concatenate(lengths)


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Put pieces of 1..``capacity`` positions, the longest first, each into the fullest bin with room for it.

    lengths (p,) -> the pieces sorted by length (p,), the bin (p,) and the place in its bin (p,) of each of these, and
    the number of bins. All pieces of one length and all bins with one room are handled at once: having taken one
    piece, the fullest bin with room is still the fullest, so it takes as many as it can. Time O(p + capacity^2).
    """
    dtype = np.int32 if len(lengths) <= np.iinfo(np.int32).max else np.int64
    # A stable sort of 16 bits is a radix sort, ten times as fast.
    by_length = np.argsort(lengths.astype(np.uint16) if capacity < 1 << 16 else lengths, kind="stable")
    counts = np.bincount(lengths, minlength=capacity + 1)
    ends = np.cumsum(counts)
    bins, slots = np.empty(len(lengths), dtype), np.empty(len(lengths), dtype)
    held = np.zeros(len(lengths), dtype)  # pieces in each bin
    n_bins = 0
    open_bins: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]  # by room left
    rooms = 0  # bit r is set where open_bins[r] has bins

    for length in np.flatnonzero(counts)[::-1].tolist():
        place, end = int(ends[length] - counts[length]), int(ends[length])
        while place < end:
            wide_enough = rooms >> length
            room = length + (wide_enough & -wide_enough).bit_length() - 1 if wide_enough else capacity
            each = room // length
            wanted = -(-(end - place) // each)
            if wide_enough:
                found = np.concatenate(open_bins[room])
                taken, left = found[:wanted], found[wanted:]
                open_bins[room] = [left] if len(left) else []
                rooms ^= 0 if len(left) else 1 << room
            else:
                taken = np.arange(n_bins, n_bins + wanted, dtype=dtype)
                n_bins += wanted
            n_pieces = min(end - place, len(taken) * each)
            number = np.tile(np.arange(each, dtype=dtype), len(taken))[:n_pieces]
            bins[place : place + n_pieces] = np.repeat(taken, each)[:n_pieces]
            slots[place : place + n_pieces] = np.repeat(held[taken], each)[:n_pieces] + number
            place += n_pieces
            whole, rest = divmod(n_pieces, each)
            for members, received in ((taken[:whole], each), (taken[whole:], rest)):
                held[members] += received
                if len(members) and (room_left := room - received * length):
                    open_bins[room_left].append(members)
                    rooms |= 1 << room_left
    return by_length, bins, slots, n_bins


def _document_bounds(stream: Stream):
    """Where documents begin, chunk by chunk, each with the end of its last: yields (chunk + 1,) int64."""
    for first in range(0, stream.n_documents, SCAN_DOCUMENTS):
        yield stream.document_starts(range(first, min(first + SCAN_DOCUMENTS, stream.n_documents) + 1))
