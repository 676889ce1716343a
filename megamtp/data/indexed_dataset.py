"""Read Megatron's ``.bin/.idx`` pair (MMIDIDX, version 1); ``dataset_writer.py`` writes it.

``PREFIX.bin`` holds the tokens, one sequence after another. ``PREFIX.idx``, little-endian, holds

    9 bytes   magic  "MMIDIDX\\0\\0"
    uint64    version = 1
    uint8     dtype code of the tokens
    uint64    S, the number of sequences
    uint64    D, the number of document indices = documents + 1
    int32[S]  length of each sequence, in tokens
    int64[S]  where each sequence starts in the .bin, in bytes
    int64[D]  document d is sequences [indices[d], indices[d + 1])

Format: Megatron-LM, ``megatron/core/datasets/indexed_dataset.py``.
"""

import functools
import os
import struct
from pathlib import Path

import numpy as np

from megamtp.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
MANIFEST_FORMAT = "megamtp-dataset"
HEADER = struct.Struct("<9sQBQQ")  # "<": no padding between the fields
DTYPE_CODES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
SCAN_ITEMS = 1 << 18  # items per chunk of a scan: they stay in the cache, and memory bounded


def token_dtype(vocab_size: int) -> np.dtype:
    """Megatron's choice of dtype for token ids below ``vocab_size``."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def bin_path(prefix: Path | str) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: Path | str) -> Path:
    return Path(f"{prefix}.idx")


def manifest_path(prefix: Path | str) -> Path:
    """Of the description beside the pair (``manifest.py``)."""
    return Path(f"{prefix}.json")


def refuse_foreign_manifest(path: Path) -> None:
    """``UserError`` for a file that a manifest must not replace: a tokenizer or the text itself, named as one."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        beginning = file.read(256)
    if beginning.strip() and MANIFEST_FORMAT.encode() not in beginning:
        raise UserError(f"{path}: is in the way, it is no data set's manifest; move it or choose another output")


class IndexedDataset:
    """Read a pair without loading it (memory-mapped); the whole index is checked first.

    Raises ``UserError`` when a file is missing, foreign or truncated, or sequences are not stored one after another.

    dtype: of the stored tokens.                    tokens: (n_tokens,) the whole stream, in file order.
    lengths: (S,) int32, tokens per sequence.       pointers: (S,) int64, bytes into the .bin.
    document_indices: (documents + 1,) int64, sequences where documents start, and S.
    """

    def __init__(self, prefix: Path | str):
        self.prefix = Path(prefix)
        path = idx_path(prefix)
        size = _file_size(path)
        with open(path, "rb") as file:
            header = file.read(HEADER.size)
        if header[: len(MAGIC)] != MAGIC:
            raise UserError(f"{path}: not a Megatron .idx file; write the data with tools/preprocess_data.py")
        if size < HEADER.size:
            raise UserError(f"{path}: truncated inside its header; copy or write it again")
        _, version, code, n_sequences, n_indices = HEADER.unpack(header)
        if version != VERSION:
            raise UserError(f"{path}: version {version}, only version {VERSION} can be read; write it again")
        self.dtype = np.dtype(DTYPE_CODES.get(code, "V1"))
        if self.dtype.kind not in "iu":
            kind = "unknown" if self.dtype.kind == "V" else str(self.dtype)
            raise UserError(f"{path}: dtype code {code} ({kind}) is not an integer type; tokens must be integers")
        pointers_at = HEADER.size + 4 * n_sequences
        documents_at = pointers_at + 8 * n_sequences
        _check_idx_size(path, size, documents_at + 8 * n_indices, n_sequences)

        index = np.memmap(path, np.uint8, mode="r")
        self.lengths = np.frombuffer(index, "<i4", n_sequences, HEADER.size)
        self.pointers = np.frombuffer(index, "<i8", n_sequences, pointers_at)
        self.document_indices = np.frombuffer(index, "<i8", n_indices, documents_at)
        self.n_tokens = self._check_sequences(path)
        self._check_documents(path)
        self._check_bin_size(path)
        # An empty file cannot be mapped.
        self.tokens = np.memmap(bin_path(prefix), self.dtype, mode="r") if self.n_tokens else np.empty(0, self.dtype)

    def __len__(self) -> int:
        """The number of sequences (which is the number of documents in files written here)."""
        return len(self.lengths)

    def __getitem__(self, i: int) -> np.ndarray:
        """The tokens of sequence ``i``, a read-only view (length,)."""
        start = int(self.pointers[i]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[i])]

    @property
    def n_documents(self) -> int:
        return len(self.document_indices) - 1

    @functools.cached_property
    def document_offsets(self) -> np.ndarray:
        """(documents + 1,) int64: the token where each document starts, then ``n_tokens``."""
        starts = np.append(self.pointers // self.dtype.itemsize, self.n_tokens)
        return starts[self.document_indices]

    def max_token(self, rank: int = 0, size: int = 1) -> int:
        """The largest token id (-1 where there is none): scans the ``.bin``. ``UserError`` for a negative id.

        Of several processes that share the scan, process ``rank`` of ``size`` looks at every ``size``-th piece.
        """
        largest = -1
        for start in range(rank * SCAN_ITEMS, self.n_tokens, size * SCAN_ITEMS):
            chunk = self.tokens[start : start + SCAN_ITEMS]
            if (smallest := int(chunk.min())) < 0:
                raise UserError(f"{bin_path(self.prefix)}: token {smallest} is negative; preprocess the data again")
            largest = max(largest, int(chunk.max()))
        return largest

    def _check_sequences(self, path: Path) -> int:
        """Lengths and pointers describe sequences one after another. Returns the number of tokens."""
        n_tokens = 0
        for first in range(0, len(self), SCAN_ITEMS):
            lengths = self.lengths[first : first + SCAN_ITEMS]
            pointers = self.pointers[first : first + SCAN_ITEMS]
            if lengths.min() < 0:
                raise UserError(
                    f"{path}: sequence {first + int(lengths.argmin())} has a negative length, the file is "
                    "damaged; copy or write it again"
                )
            ends = n_tokens + np.cumsum(lengths, dtype=np.int64)
            wrong = pointers != (ends - lengths) * self.dtype.itemsize
            if wrong.any():
                raise UserError(
                    f"{path}: sequence {first + int(wrong.argmax())} does not follow the one before it in the .bin; "
                    "only contiguous data can be read, write it again in order"
                )
            n_tokens = int(ends[-1])
        return n_tokens

    def _check_documents(self, path: Path) -> None:
        indices = self.document_indices
        ordered = all(
            np.all(np.diff(indices[first : first + SCAN_ITEMS + 1]) >= 0)
            for first in range(0, len(indices), SCAN_ITEMS)
        )
        if not (ordered and len(indices) and indices[0] == 0 and indices[-1] == len(self)):
            raise UserError(
                f"{path}: the document indices do not rise from 0 to the {len(self)} sequences, "
                "the file is damaged; copy or write it again"
            )

    def _check_bin_size(self, path: Path) -> None:
        size, expected = _file_size(bin_path(self.prefix)), self.n_tokens * self.dtype.itemsize
        if size != expected:
            what = "is truncated" if size < expected else "belongs to another .idx"
            raise UserError(
                f"{bin_path(self.prefix)}: {what}: {size} bytes, {path.name} describes {expected}; "
                "copy or write both files again"
            )


def _file_size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise UserError(
            f"{path}: cannot read the data: {error.strerror}; name it by its path without .bin or .idx"
        ) from None


def _check_idx_size(path: Path, size: int, expected: int, n_sequences: int) -> None:
    if size == expected + n_sequences > expected:
        raise UserError(f"{path}: multimodal data (a mode per sequence) cannot be read; write it as text only")
    if size != expected:
        what = "truncated" if size < expected else "damaged"
        raise UserError(
            f"{path}: {what}: {size} bytes, its {n_sequences} sequences take {expected}; copy or write it again"
        )
