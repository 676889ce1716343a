"""Write Megatron's ``.bin/.idx`` pair (``indexed_dataset.py`` describes it) in bounded memory.

Tokens go straight into the ``.bin``; lengths and document boundaries wait in anonymous temporary files beside it,
since the ``.idx`` begins with counts that are known only at the end.
"""

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from megamtp.data.indexed_dataset import (
    DTYPE_CODES,
    HEADER,
    MAGIC,
    SCAN_ITEMS,
    VERSION,
    IndexedDataset,
    bin_path,
    idx_path,
    manifest_path,
    refuse_foreign_manifest,
)
from megamtp.errors import UserError
from megamtp.files import discard, open_temporary, publish, remove, remove_leftovers, sync

CHUNK_BYTES = 1 << 30  # of a .bin under one checksum: many readers can share the checking of a large file


class WrittenPair(NamedTuple):
    """What a finished pair holds; checksums are SHA-256 in hex, of each ``chunk_bytes`` for the ``.bin``."""

    sequences: int
    documents: int
    tokens: int
    max_token: int  # -1 where there is none
    dtype: str
    bin_bytes: int
    idx_bytes: int
    chunk_bytes: int
    bin_sha256: list[str]
    idx_sha256: str


class IndexedDatasetWriter:
    """Write a pair. A context manager: it finalizes on success, and leaves nothing behind otherwise.

        with IndexedDatasetWriter("corpus", token_dtype(vocab_size)) as writer:
            writer.add_document([5, 7, 2])

    The pair replaces an older one of the same prefix, at the end. ``written`` then tells what it holds.
    """

    written: WrittenPair

    def __init__(self, prefix: Path | str, dtype: npt.DTypeLike):
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype)
        codes = {np.dtype(name): code for code, name in DTYPE_CODES.items() if np.dtype(name).kind in "iu"}
        if self.dtype not in codes:
            raise UserError(f"{prefix}: tokens cannot be stored as {self.dtype}; use {', '.join(map(str, codes))}")
        self._code = codes[self.dtype]
        self._range = np.iinfo(self.dtype)
        self.n_tokens = self.n_sequences = self.n_documents = 0
        self._max_token = -1
        refuse_foreign_manifest(manifest_path(prefix))
        if alive := remove_leftovers(bin_path(prefix)):
            raise UserError(
                f"{prefix}: another process is writing it ({alive[0].name}); wait, or choose another output"
            )
        remove_leftovers(idx_path(prefix))
        remove_leftovers(manifest_path(prefix))
        self._bin = _Hashed(open_temporary(bin_path(prefix)), CHUNK_BYTES)
        try:
            self._lengths = _Spool("<i4", self.prefix.parent)
            self._boundaries = _Spool("<i8", self.prefix.parent)  # sequences before the end of each document
        except OSError:
            discard(self._bin.file)
            raise

    def add_document(self, tokens: npt.ArrayLike) -> None:
        """Append one document of token ids (length,), perhaps none. ``UserError`` for ids the dtype cannot hold."""
        ids = np.asarray(tokens)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise UserError(
                f"{self.prefix}: document {self.n_documents} is {ids.dtype} of shape {ids.shape}; "
                "give a flat list of integer token ids"
            )
        if ids.size > np.iinfo(np.int32).max:
            raise UserError(
                f"{self.prefix}: document {self.n_documents} has {ids.size} tokens, "
                f"the format holds {np.iinfo(np.int32).max}; split it"
            )
        if ids.size and not 0 <= (low := ids.min()) <= (high := ids.max()) <= self._range.max:
            raise UserError(
                f"{self.prefix}: document {self.n_documents} has token {low if low < 0 else high}, outside "
                f"0..{self._range.max} of {self.dtype}; choose the dtype with token_dtype(vocab_size)"
            )
        self.add_documents(ids.astype(self.dtype), np.array([ids.size], np.int32))

    def add_documents(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append many: ``tokens`` (sum of lengths,) in the writer's dtype, one document after another."""
        self._add_tokens(tokens)
        self._add_documents_of(lengths, np.arange(1, len(lengths) + 1))

    def add_dataset(self, dataset: IndexedDataset, on_bytes: Callable[[int], object] = lambda n: None) -> None:
        """Append all of another pair's documents, as they are cut into sequences there; ``on_bytes`` hears of it."""
        for chunk in _chunks(dataset.tokens):
            self._add_tokens(chunk)
            on_bytes(chunk.nbytes)
        base = self.n_sequences
        for lengths in _chunks(dataset.lengths):
            self._lengths.write(lengths)
        for ends in _chunks(dataset.document_indices[1:]):
            self._boundaries.write(ends + base)
        self.n_sequences += len(dataset)
        self.n_documents += dataset.n_documents

    def _add_tokens(self, tokens: np.ndarray) -> None:
        if tokens.size:
            self._bin.write(tokens.astype(self.dtype, copy=False).data)
            self._max_token = max(self._max_token, int(tokens.max()))
            self.n_tokens += tokens.size

    def _add_documents_of(self, lengths: np.ndarray, ends: np.ndarray) -> None:
        self._lengths.write(lengths)
        self._boundaries.write(ends + self.n_sequences)
        self.n_sequences += len(lengths)
        self.n_documents += len(ends)

    def finalize(self) -> WrittenPair:
        """Publish the ``.bin``, then the ``.idx``, whose presence makes the pair complete."""
        index = _Hashed(open_temporary(idx_path(self.prefix)))
        try:
            index.write(HEADER.pack(MAGIC, VERSION, self._code, self.n_sequences, self.n_documents + 1))
            for lengths in self._lengths.read():
                index.write(lengths.data)
            position = 0  # in bytes
            for lengths in self._lengths.read():
                ends = position + np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
                index.write((ends - lengths.astype(np.int64) * self.dtype.itemsize).astype("<i8", copy=False).data)
                position = int(ends[-1])
            index.write(bytes(8))  # the first document starts at sequence 0
            for boundaries in self._boundaries.read():
                index.write(boundaries.data)
            # A disk that is full takes nothing away: all is written before an older pair goes.
            sync(self._bin.file)
            sync(index.file)
            # An older manifest and .idx must go first: beside the new .bin they would make a pair that looks complete.
            remove(manifest_path(self.prefix))
            remove(idx_path(self.prefix))
            publish(self._bin.file, bin_path(self.prefix))
            publish(index.file, idx_path(self.prefix))
        finally:
            discard(index.file)
        self.written = WrittenPair(
            sequences=self.n_sequences,
            documents=self.n_documents,
            tokens=self.n_tokens,
            max_token=self._max_token,
            dtype=str(self.dtype),
            bin_bytes=self._bin.n_bytes,
            idx_bytes=index.n_bytes,
            chunk_bytes=CHUNK_BYTES,
            bin_sha256=self._bin.sha256(),
            idx_sha256=index.sha256()[0],
        )
        return self.written

    def __enter__(self) -> "IndexedDatasetWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        try:
            if kind is None:
                self.finalize()
        finally:
            discard(self._bin.file)
            self._lengths.close()
            self._boundaries.close()


class _Hashed:
    """A file that is hashed while it is written: SHA-256 of each ``chunk_bytes``, or of all of it."""

    def __init__(self, file: BinaryIO, chunk_bytes: int | None = None):
        self.file, self.n_bytes = file, 0
        self._chunk_bytes = chunk_bytes
        self._hashes = [hashlib.sha256()]

    def write(self, data: bytes | memoryview) -> None:
        if not len(data):
            return  # an empty array cannot be cast
        data = memoryview(data).cast("B")
        self.file.write(data)
        while len(data):
            room = len(data)
            if self._chunk_bytes:
                room = self._chunk_bytes * len(self._hashes) - self.n_bytes
                if not room:
                    self._hashes.append(hashlib.sha256())
                    room = self._chunk_bytes
            self._hashes[-1].update(data[:room])
            self.n_bytes += len(data[:room])
            data = data[room:]

    def sha256(self) -> list[str]:
        return [sha256.hexdigest() for sha256 in self._hashes]


class _Spool:
    """An array that grows on disk and is read back in order; gone with the process, however that ends."""

    def __init__(self, dtype: str, folder: Path):
        self._dtype = np.dtype(dtype)
        self._file = tempfile.TemporaryFile(dir=folder, buffering=1 << 16)

    def write(self, values: np.ndarray) -> None:
        self._file.write(values.astype(self._dtype, copy=False).data)

    def read(self) -> Iterator[np.ndarray]:
        self._file.seek(0)
        while data := self._file.read(SCAN_ITEMS * self._dtype.itemsize):
            yield np.frombuffer(data, self._dtype)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # closing flushes, which a full disk refuses
            self._file.close()


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(array), SCAN_ITEMS):
        yield array[start : start + SCAN_ITEMS]
