"""From a dataset to numbered training samples, without a stored permutation.

1. The stream: all documents of the dataset, one after another in file order; n_tokens long.
2. The cuts of epoch e: sample j is ``stream[o + j * s : o + (j + 1) * s + n]`` with s = seq_len and
   n = n_future_tokens. Cuts step by s and overlap by the n tokens that only targets need, so every position of
   an epoch is predicted from once.
3. The offset o = o(seed, e) lies in [0, s): each epoch cuts the documents elsewhere. To make room for it one
   sample fewer is taken than the stream holds (never fewer than one), so that every epoch has equally many;
   where only one sample fits, o is limited to what is left.
4. The order inside an epoch: a seeded bijection of range(samples_per_epoch), computed per index (``permute``).
5. The global index g counts over all epochs: epoch e = g // samples_per_epoch, and index g % samples_per_epoch in it.
   All state of the data order is therefore one integer: how many samples are consumed.
6. Without shuffling (validation) o = 0, the order is that of the stream, and every sample that fits is taken.
"""

import numpy as np

from megamtp.data.indexed_dataset import IndexedDataset
from megamtp.errors import UserError

ROUNDS = 8


class Samples:
    """Samples of ``seq_len + n_future_tokens`` tokens from ``dataset``, numbered over all epochs.

    Raises ``UserError`` when the data is shorter than one sample.
    """

    def __init__(
        self, dataset: IndexedDataset, seq_len: int, n_future_tokens: int, seed: int, shuffle: bool = True
    ) -> None:
        self.dataset = dataset
        self.seq_len = seq_len
        self.n_future_tokens = n_future_tokens
        self.seed = seed
        self.shuffle = shuffle
        fitting = (dataset.n_tokens - n_future_tokens) // seq_len
        if fitting < 1:
            raise UserError(
                f"{dataset.prefix}: a sequence longer than the data: seq_len {seq_len} + {n_future_tokens} future "
                f"tokens, the data has {dataset.n_tokens} tokens; lower data.seq_len or give more data"
            )
        self.samples_per_epoch = max(1, fitting - 1) if shuffle else fitting
        unused = dataset.n_tokens - n_future_tokens - self.samples_per_epoch * seq_len
        self._n_offsets = min(seq_len, unused + 1) if shuffle else 1

    def get(self, global_index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (s + n,) int64 and document ids (s + n,) int32, which count documents from 0 inside the sample."""
        start = self.start(global_index)
        stop = start + self.seq_len + self.n_future_tokens
        return self.dataset.tokens[start:stop].astype(np.int64), self.dataset.document_ids(start, stop)

    def start(self, global_index: int) -> int:
        """Where in the stream the sample begins, in tokens."""
        if global_index < 0:
            raise IndexError(f"sample {global_index}")
        epoch, index = divmod(global_index, self.samples_per_epoch)
        if not self.shuffle:
            return index * self.seq_len
        # The seed is mixed before the epoch is added, or epoch e + 1 of a seed would be epoch e of the next.
        key, offset = _splitmix(int(_splitmix(self.seed, 1)[0]) + epoch, 2)
        index = permute(np.array([index], np.uint64), self.samples_per_epoch, int(key))[0]
        return int(offset) % self._n_offsets + int(index) * self.seq_len


def permute(indices: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where a keyed bijection of range(size) sends ``indices``: uint64 (m,) below ``size`` -> uint64 (m,).

    A balanced Feistel network permutes the 2w-bit numbers, 4^w >= size; a value that lands outside range(size)
    is sent through again until it lands inside ("cycle-walking", fewer than 4 rounds of it expected). Integer
    arithmetic only: the order is the same under every numpy and on every machine.
    """
    w = max(1, ((size - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(w), np.uint64((1 << w) - 1)
    round_keys = _splitmix(key, ROUNDS)

    def feistel(values: np.ndarray) -> np.ndarray:
        left, right = values >> shift, values & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        return left << shift | right

    values = feistel(indices)
    while (outside := values >= size).any():
        values[outside] = feistel(values[outside])
    return values


def _splitmix(seed: int, n: int) -> np.ndarray:
    """The first ``n`` outputs, uint64, of the generator SplitMix64 (Steele et al. 2014)."""
    return _mix(np.uint64(seed % 2**64) + np.uint64(0x9E3779B97F4A7C15) * np.arange(1, n + 1, dtype=np.uint64))


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer, a bijection of 64 bits. Arrays only: numpy warns when a scalar overflows."""
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return z ^ z >> np.uint64(31)
