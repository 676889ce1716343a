"""Safetensors files of any size: mapped for reading, streamed for writing.

The format (https://github.com/huggingface/safetensors): the header's length in 8 bytes, little-endian; the header,
JSON padded with spaces to a multiple of 8: by name ``dtype``, ``shape`` and ``data_offsets``, which count from the
header's end; the data, without holes. The library writes whole tensors that are in memory, and no other way.
"""

import hashlib
import json
import math
import mmap
import os
import struct
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megamtp.errors import UserError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {dtype: code for code, dtype in DTYPES.items()}
LENGTH = struct.Struct("<Q")
SYNC_BYTES = 128 << 20  # written between two syncs
LARGEST_HEADER = 100_000_000  # the library's limit


class Spec(NamedTuple):
    """One tensor of a file that is to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def map_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file as a read-only view of the mapped file: nothing is read until it is used.

    ``UserError`` for a file that is missing, cut short or not of this format, and for a dtype that no weight has.
    """
    again = "copy the file again"
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < LENGTH.size:
                raise UserError(f"{path}: has {size} bytes, this is no safetensors file; {again}")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}; {again}") from None
    (length,) = LENGTH.unpack_from(mapped)
    begin = LENGTH.size + length
    if length > LARGEST_HEADER or begin > size:
        raise UserError(f"{path}: cut short, or no safetensors file; {again}")
    try:
        header = json.loads(mapped[LENGTH.size : begin])
        header.pop("__metadata__", None)
        entries = [(name, e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in header.items()]
        end = max((entry[-1] for entry in entries), default=0)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: no safetensors file, its header cannot be read ({error!r}); {again}") from None
    if begin + end != size:
        raise UserError(f"{path}: has {size} bytes, its header speaks of {begin + end}; {again}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable")  # and nobody writes to these tensors
        data = torch.frombuffer(mapped, dtype=torch.uint8)
    tensors = {}
    for name, code, shape, start, stop in entries:
        if code not in DTYPES:
            raise UserError(f"{path}: {name} is stored as {code}; save the weights as one of {', '.join(DTYPES)}")
        dtype = DTYPES[code]
        if not 0 <= start <= stop or stop - start != math.prod(shape) * dtype.itemsize:
            raise UserError(f"{path}: {name} has {stop - start} bytes for shape {list(shape)} as {code}; {again}")
        raw = data[begin + start : begin + stop]
        if (begin + start) % dtype.itemsize:
            raw = raw.clone()  # the format allows it, PyTorch cannot view it
        tensors[name] = raw.view(dtype).view(shape)
    return tensors


class StreamWriter:
    """Writes the data of ``specs`` one after another, in pieces of any size. Use in ``with``; ends synced.

    Raises ``OSError`` where the file cannot be written, and ``ValueError`` where other data came than was announced.
    """

    def __init__(self, path: Path, specs: list[Spec], metadata: Mapping[str, str] | None = None, *, hashed=False):
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        offset = 0
        for spec in specs:
            offsets = [offset, offset + spec.n_bytes]
            header[spec.name] = {"dtype": CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
            offset = offsets[1]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.path, self.bytes = path, LENGTH.size + len(text) + offset
        self._left, self._sha256 = self.bytes, hashlib.sha256() if hashed else None
        self._thread, self._unsynced = ThreadPoolExecutor(1), 0
        self._syncing: Future | None = None
        self._file = open(path, "xb", buffering=0)
        self._write(memoryview(LENGTH.pack(len(text)) + text))

    @property
    def sha256(self) -> str:
        """Of all that was written; only with ``hashed``."""
        return self._sha256.hexdigest()

    def write(self, values: Tensor) -> None:
        """The next elements, contiguous and in the dtype announced."""
        # NumPy has no bfloat16, and the buffer protocol knows none.
        self._write(memoryview(values.view(-1).view(torch.uint8).numpy()))

    def _write(self, data: memoryview) -> None:
        self._left -= len(data)
        if self._sha256:
            self._sha256.update(data)
        while data:
            n = self._file.write(data)
            data = data[n:]
            self._unsynced += n
        if self._unsynced >= SYNC_BYTES and (self._syncing is None or self._syncing.done()):
            self._raise_if_not_synced()
            # The disk begins now: left to the kernel, it would wait for gigabytes, and the last sync for all of them.
            self._syncing, self._unsynced = self._thread.submit(os.fdatasync, self._file.fileno()), 0

    def _raise_if_not_synced(self) -> None:
        """A failure is told once: the sync at the end would not see it again."""
        if self._syncing is not None:
            self._syncing.result()

    def __enter__(self) -> "StreamWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            self._thread.shutdown()  # waits for a sync that runs
            if kind is None:
                self._raise_if_not_synced()
                if self._left:
                    raise ValueError(f"{self.path}: {self._left} bytes fewer than announced")
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
