"""A run of documents of a dataset, seen as one stream of tokens, and where the documents begin in it."""

import functools
import mmap

import numpy as np

from megamtp.data.indexed_dataset import IndexedDataset
from megamtp.errors import UserError

MAX_COARSE = 1 << 18  # entries of the first level of the search: 2 MiB


class Stream:
    """Documents [first_document, last_document) of ``dataset`` (default: all), one after another in file order.

    tokens: (n_tokens,) view of the memory map.     n_tokens, n_documents: of this run.
    All positions are tokens counted from the start of the run. Raises ``UserError`` for documents it does not have.
    """

    def __init__(self, dataset: IndexedDataset, first_document: int = 0, last_document: int | None = None) -> None:
        last_document = dataset.n_documents if last_document is None else last_document
        if not 0 <= first_document <= last_document <= dataset.n_documents:
            raise UserError(
                f"{dataset.prefix}: no documents [{first_document}, {last_document}), it has {dataset.n_documents}; "
                "choose a range inside"
            )
        self.dataset = dataset
        self.first_document = first_document
        self.last_document = last_document
        self.n_documents = last_document - first_document
        self._first_token = 0
        begin, end = self.document_starts(np.array([0, self.n_documents]))
        self._first_token = int(begin)
        self.n_tokens = int(end - begin)
        # A plain array: each slice of a np.memmap costs microseconds.
        self.tokens = np.asarray(dataset.tokens)[begin:end]
        self._map = dataset.tokens.base if isinstance(dataset.tokens.base, mmap.mmap) else None  # None: no tokens

    @property
    def name(self) -> str:
        return str(self.dataset.prefix)

    def split(self, validation_fraction: float) -> tuple["Stream", "Stream"]:
        """Training and validation part, cut at the document boundary nearest to (1 - fraction) of the tokens.

        Raises ``UserError`` when one of them would hold no token.
        """
        if not 0 < validation_fraction < 1:
            raise UserError(
                f"{self.name}: a validation fraction of {validation_fraction}; choose one between 0 and 1, exclusive"
            )
        cut = boundary = 0
        if self.n_tokens:
            wanted = round((1 - validation_fraction) * self.n_tokens)
            beyond = int(self._count_starts_up_to(np.array([min(wanted, self.n_tokens - 1)]))[0])
            below, above = self.document_starts(np.array([beyond - 1, beyond])).tolist()
            cut, boundary = (beyond - 1, below) if wanted - below <= above - wanted else (beyond, above)
        if not 0 < boundary < self.n_tokens:
            raise UserError(
                f"{self.name}: a validation fraction of {validation_fraction} leaves one part of the "
                f"{self.n_documents} documents ({self.n_tokens} tokens) empty; choose another or give validation data"
            )
        cut += self.first_document
        return Stream(self.dataset, self.first_document, cut), Stream(self.dataset, cut, self.last_document)

    def document_starts(self, documents: np.ndarray | range) -> np.ndarray:
        """Where documents begin: numbers in [0, n_documents] (m,) -> int64 (m,); the last is ``n_tokens``."""
        indices, pointers = self.dataset.document_indices, self.dataset.pointers
        if isinstance(documents, range):
            sequences = indices[self.first_document + documents.start : self.first_document + documents.stop]
        else:
            # Fancy indexing, not np.take: the fields are unaligned, and take copies all of them at each call.
            sequences = indices[self.first_document + documents]
        if not len(pointers):
            return np.zeros(len(sequences), dtype=np.int64)
        inside = np.minimum(sequences, len(pointers) - 1)
        starts = pointers[inside] // self.dataset.dtype.itemsize
        return np.where(sequences == inside, starts, self.dataset.n_tokens) - self._first_token

    def document_ids(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Which document each token of the cuts [start, start + length) belongs to: int64 (m,) -> int32 (m, length).

        Documents count from 0 at the start of each cut; empty ones are not counted.
        What lies beyond the end of the stream counts as its last document.
        """
        starts = np.asarray(starts, dtype=np.int64)
        rows = len(starts)
        # The documents of a cut: from the one that holds its first token to the last that begins inside.
        lasts = np.minimum(starts + (length - 1), self.n_tokens - 1)
        counts = self._count_starts_up_to(np.concatenate([starts, lasts]))
        first, n_documents = counts[:rows] - 1, counts[rows:] - counts[:rows] + 1
        row_begins = np.cumsum(n_documents) - n_documents  # (m,) where the documents of each row begin in what follows
        row = np.repeat(np.arange(rows), n_documents)
        documents = np.arange(len(row)) + (first - row_begins)[row]
        begins = np.maximum(self.document_starts(documents) - starts[row], 0) + row * length
        run_lengths = np.append(begins[1:], rows * length) - begins  # 0: an empty document
        number = np.cumsum(run_lengths > 0, dtype=np.int32)
        ids = number - number[row_begins][row]
        return np.repeat(ids, run_lengths).reshape(rows, length)

    def read_ahead(self, starts: np.ndarray, length: int | np.ndarray) -> None:
        """Have the kernel fetch the cuts [start, start + length) from disk, all at once: int64 (m,).

        Without it page faults fetch them one after another, each with neighbours that a random order never uses.
        """
        if self._map is None:
            return
        itemsize = self.dataset.dtype.itemsize
        begins = (self._first_token + starts) * itemsize
        aligned = begins // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        sizes = begins - aligned + length * itemsize
        for begin, size in zip(aligned.tolist(), sizes.tolist(), strict=True):
            self._map.madvise(mmap.MADV_WILLNEED, begin, size)

    def _count_starts_up_to(self, positions: np.ndarray) -> np.ndarray:
        """How many documents begin at or before each position in [0, n_tokens): int64 (m,) -> int64 (m,).

        ``np.searchsorted`` over the whole field would copy it (it is unaligned): search a small sample of it, then
        halve the block between two samples, for all positions at once.
        """
        coarse, step = self._coarse_starts
        low = (np.searchsorted(coarse, positions, side="right") - 1) * step
        while step > 1:  # document `low` begins at or before the position, `low + step` after it or not at all
            step //= 2
            middle = low + step
            begins = self.document_starts(np.minimum(middle, self.n_documents))
            low = np.where(begins <= positions, middle, low)
        return low + 1

    @functools.cached_property
    def _coarse_starts(self) -> tuple[np.ndarray, int]:
        """The start of every ``stride``-th document, aligned and in memory; stride is a power of two."""
        stride = 1
        while self.n_documents > MAX_COARSE * stride:
            stride *= 2
        return self.document_starts(np.arange(0, self.n_documents, stride)), stride
