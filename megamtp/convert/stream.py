"""From a source to files, a block of rows at a time."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from megamtp.convert.base import Source, row_blocks
from megamtp.convert.safetensors_file import Spec, StreamWriter
from megamtp.convert.verification import Verification
from megamtp.errors import UserError

BLOCK_BYTES = 16 << 20  # of fp32 rows; a few of these are all the memory that a conversion takes


class Item(NamedTuple):
    """A tensor of an output file and the logical tensor that it is made from; rows beyond that one's are zeros."""

    spec: Spec
    name: str  # logical


def shards(items: Iterable[Item], limit: int) -> list[list[Item]]:
    """In order, as many in a file as fit into ``limit`` bytes, and at least one."""
    files: list[list[Item]] = []
    size = 0
    for item in items:
        if not files or size + item.spec.n_bytes > limit:
            files.append([])
            size = 0
        files[-1].append(item)
        size += item.spec.n_bytes
    return files


class Progress:
    """One bar of bytes, written and verified, for several threads."""

    def __init__(self, total: int, what: str):
        self._bar = tqdm(total=total, unit="B", unit_scale=True, desc=what, dynamic_ncols=True)
        self._lock = Lock()

    def add(self, n_bytes: int) -> None:
        with self._lock:
            self._bar.update(n_bytes)

    def close(self) -> None:
        self._bar.close()


def write_items(
    path: Path,
    items: list[Item],
    source: Source,
    progress: Progress,
    verification: Verification,
    metadata: dict[str, str] | None = None,
    hashed: bool = False,
) -> StreamWriter:
    """Write one file, cast block by block. Returns its writer, closed, which tells size and checksum."""
    with StreamWriter(path, [item.spec for item in items], metadata, hashed=hashed) as writer:
        for item in items:
            verification.raise_if_failed()
            for block in _blocks(item, source):
                writer.write(block)
                progress.add(block.nbytes)
    return writer


def _blocks(item: Item, source: Source) -> Iterator[Tensor]:
    shape = source.shape(item.name)
    for start, stop in row_blocks(shape, BLOCK_BYTES, itemsize=4):
        block = source.rows(item.name, start, stop).to(item.spec.dtype).contiguous()
        if block.dtype == torch.float16 and not block.isfinite().all():
            raise UserError(f"{source.path}: {item.name} has values that fp16 cannot hold; use --dtype bf16")
        yield block
    if missing := item.spec.n_bytes - torch.Size(shape).numel() * item.spec.dtype.itemsize:
        yield torch.zeros(missing // item.spec.dtype.itemsize, dtype=item.spec.dtype)
