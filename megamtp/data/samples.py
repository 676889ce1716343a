"""From a dataset to numbered training samples, without a stored permutation.

1. The stream: all documents of the dataset, one after another in file order; n_tokens long.
2. The cuts of epoch e: sample j is ``stream[o + j * s : o + (j + 1) * s + n]`` with s = seq_len and
   n = n_future_tokens. Cuts step by s and overlap by the n tokens that only targets need, so every position of
   an epoch is predicted from once.
3. The offset o = o(seed, e) lies in [0, s): each epoch cuts the documents elsewhere. To make room for it one
   sample fewer is taken than the stream holds (never fewer than one), so that every epoch has equally many;
   where only one sample fits, o is limited to what is left.
4. The order inside an epoch: a seeded bijection of range(samples_per_epoch), computed per index (``Permutation``).
5. The global index g counts over all epochs: epoch e = g // samples_per_epoch, and index g % samples_per_epoch in it.
   All state of the data order is therefore one integer: how many samples are consumed.
6. Without shuffling (validation) o = 0, the order is that of the stream, and every sample that fits is taken.
"""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from megamtp.data.indexed_dataset import IndexedDataset
from megamtp.data.stream import Stream
from megamtp.errors import UserError

PADDING = -1  # in place of a token
ROUNDS = 8
TABLE_BITS = 16  # halves of an index up to this width go through tables: at most 4 MiB for the 8 rounds
KEPT_EPOCHS = 2  # a batch may lie across the border of two


class Samples:
    """Samples of ``seq_len + n_future_tokens`` tokens from a stream (or a whole dataset), numbered over all epochs.

    Raises ``UserError`` when the data is shorter than one sample.
    """

    def __init__(
        self, data: IndexedDataset | Stream, seq_len: int, n_future_tokens: int, seed: int, shuffle: bool = True
    ) -> None:
        self.stream = data if isinstance(data, Stream) else Stream(data)
        self.dataset = self.stream.dataset
        self.seq_len = seq_len
        self.n_future_tokens = n_future_tokens
        self.seed = seed
        self.shuffle = shuffle
        n_tokens, width = self.stream.n_tokens, seq_len + n_future_tokens
        fitting = (n_tokens - n_future_tokens) // seq_len
        if fitting < 1:
            raise UserError(
                f"{self.stream.name}: a sequence longer than the data: seq_len {seq_len} + {n_future_tokens} future "
                f"tokens, the data has {n_tokens} tokens; lower data.seq_len or give more data"
            )
        self.samples_per_epoch = max(1, fitting - 1) if shuffle else fitting
        unused = n_tokens - n_future_tokens - self.samples_per_epoch * seq_len
        self._n_offsets = min(seq_len, unused + 1) if shuffle else 1
        self._order = EpochOrder(self.samples_per_epoch, seed, shuffle)
        self._cuts = np.lib.stride_tricks.sliding_window_view(self.stream.tokens, width)  # a view: row i begins at i

    def batch(self, global_indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (b, s + n) int64 and document ids (b, s + n) int32, which count documents from 0 in each sample."""
        starts = self._starts(global_indices)
        self.stream.read_ahead(starts, self.seq_len + self.n_future_tokens)
        ids = self.stream.document_ids(starts, self.seq_len + self.n_future_tokens)
        return self._cuts[starts].astype(np.int64), ids

    def get(self, global_index: int) -> tuple[np.ndarray, np.ndarray]:
        """One sample: tokens (s + n,) int64 and document ids (s + n,) int32."""
        tokens, ids = self.batch([global_index])
        return tokens[0], ids[0]

    def start(self, global_index: int) -> int:
        """Where in the stream the sample begins, in tokens."""
        return int(self._starts([global_index])[0])

    def identity(self) -> dict[str, Any]:
        """Plain values that fix which tokens each global index stands for: part of a checkpoint."""
        return {"packing": "stream", **identity(self)}

    def _starts(self, global_indices: Sequence[int] | np.ndarray) -> np.ndarray:
        indices, random = self._order.locate(global_indices)
        return indices * self.seq_len + (random % np.uint64(self._n_offsets)).astype(np.int64)


class EpochOrder:
    """The order of the ``size`` samples of every epoch (steps 4 and 5 above): a seeded bijection, or none."""

    def __init__(self, size: int, seed: int, shuffle: bool) -> None:
        self.size = size
        self.seed = seed
        self.shuffle = shuffle
        self._epochs: dict[int, tuple[Permutation, np.uint64]] = {}

    def locate(self, global_indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Index inside the epoch (m,) int64, and the epoch's random number (m,) uint64, of each global index (m,).

        Raises ``IndexError`` for a negative one.
        """
        wanted = np.asarray(global_indices, dtype=np.int64)
        if wanted.size and wanted.min() < 0:
            raise IndexError(f"sample {wanted.min()}")
        epochs, indices = np.divmod(wanted, self.size)
        random = np.zeros(len(wanted), dtype=np.uint64)
        if self.shuffle:
            for epoch in set(epochs.tolist()):
                permutation, number = self._epoch(epoch)
                here = epochs == epoch
                indices[here] = permutation(indices[here])
                random[here] = number
        return indices, random

    def _epoch(self, epoch: int) -> tuple["Permutation", np.uint64]:
        if epoch not in self._epochs:
            # The seed is mixed before the epoch is added, or epoch e + 1 of a seed would be epoch e of the next.
            key, number = _splitmix(int(_splitmix(self.seed, 1)[0]) + epoch, 2)
            recent = list(self._epochs.items())[-(KEPT_EPOCHS - 1) :]
            self._epochs = {**dict(recent), epoch: (Permutation(self.size, int(key)), number)}
        return self._epochs[epoch]


class Permutation:
    """A keyed bijection of range(size): int64 (m,) below ``size`` -> int64 (m,).

    A balanced Feistel network permutes the 2w-bit numbers, 4^w >= size; a value that lands outside range(size)
    is sent through again until it lands inside ("cycle-walking", fewer than 4 rounds of it expected). Integer
    arithmetic only: the order is the same under every numpy and on every machine.
    """

    def __init__(self, size: int, key: int) -> None:
        self.size = size
        self._width = max(1, ((size - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._width) - 1
        self._keys = _splitmix(key, ROUNDS)
        self._tables: list[np.ndarray] = []  # what each round makes of every half, where the halves are few
        if self._width <= TABLE_BITS:
            halves = np.arange(1 << self._width)
            self._tables = [self._round(i, halves) for i in range(ROUNDS)]

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        values = self._feistel(indices)
        outside = np.flatnonzero(values >= self.size)
        walking = values[outside]
        while len(outside):
            walking = self._feistel(walking)
            values[outside] = walking
            still = walking >= self.size
            outside, walking = outside[still], walking[still]
        return values

    def _feistel(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._width, values & self._mask
        for i in range(ROUNDS):
            mixed = self._tables[i][right] if self._tables else self._round(i, right)
            left, right = right, left ^ mixed
        return left << self._width | right

    def _round(self, i: int, right: np.ndarray) -> np.ndarray:
        return (_mix(right.astype(np.uint64) ^ self._keys[i]) & np.uint64(self._mask)).astype(np.int64)


def permute(indices: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where ``Permutation(size, key)`` sends ``indices``: uint64 (m,) below ``size`` -> uint64 (m,)."""
    return Permutation(size, key)(indices.astype(np.int64)).astype(np.uint64)


def identity(samples: Any) -> dict[str, Any]:
    """What every kind of samples has in its ``identity()``."""
    # Two corpora may well have equally many tokens (synthetic ones do): 64 short cuts tell them apart.
    tokens = samples.stream.tokens
    cuts = [tokens[start : start + 64] for start in range(0, len(tokens), -(-len(tokens) // 64))]
    return {
        "seed": samples.seed,
        "shuffle": samples.shuffle,
        "seq_len": samples.seq_len,
        "n_future_tokens": samples.n_future_tokens,
        "n_tokens": samples.stream.n_tokens,
        "samples_per_epoch": samples.samples_per_epoch,
        "sampled_tokens_crc32": zlib.crc32(np.concatenate(cuts).astype("<i8").tobytes()),
    }


def _splitmix(seed: int, n: int) -> np.ndarray:
    """The first ``n`` outputs, uint64, of the generator SplitMix64 (Steele et al. 2014)."""
    return _mix(np.uint64(seed % 2**64) + np.uint64(0x9E3779B97F4A7C15) * np.arange(1, n + 1, dtype=np.uint64))


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer, a bijection of 64 bits. Arrays only: numpy warns when a scalar overflows."""
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return z ^ z >> np.uint64(31)
