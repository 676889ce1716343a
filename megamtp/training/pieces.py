"""Pieces of logical tensors in files: how any layout reads what any other has written.

A logical tensor counts as a matrix whose columns are its last dimension; a 1-D tensor is one row. A piece is a
run of a band of columns: the elements [start, stop) of the columns [c0, c1), counted row by row inside the band,
so that element (r, c) is number r * (c1 - c0) + c - c0. Tensor parallelism gives a rank rows (all columns) or a
band, and ZeRO cuts the rank's share into runs that begin and end anywhere, in the middle of a row too.
"""

import hashlib
import json
import os
import struct
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megamtp.engine.fragments import Fragment
from megamtp.errors import UserError

READ_BYTES = 1 << 20


class Rectangle(NamedTuple):
    """Elements [top, bottom) x [left, right) of a logical matrix, and where they lie in the flat tensor of a run."""

    top: int
    bottom: int
    left: int
    right: int
    offset: int  # of the first element
    stride: int  # from one row to the next

    def cut(self, other: "Rectangle") -> "Rectangle | None":
        """What both hold, as it lies in this one's run; none where they are disjoint."""
        top, bottom = max(self.top, other.top), min(self.bottom, other.bottom)
        left, right = max(self.left, other.left), min(self.right, other.right)
        if top >= bottom or left >= right:
            return None
        offset = self.offset + (top - self.top) * self.stride + left - self.left
        return Rectangle(top, bottom, left, right, offset, self.stride)

    def view(self, flat) -> Tensor:
        """(bottom - top, right - left), of a flat contiguous tensor or of a file's slice, which reads no more."""
        rows, columns = self.bottom - self.top, self.right - self.left
        end = self.offset + (rows - 1) * self.stride + columns
        return flat[self.offset : end].as_strided((rows, columns), (self.stride, 1))


class Run(NamedTuple):
    """Elements [start, stop) of the columns [left, right) of a logical matrix, counted inside that band."""

    left: int
    right: int
    start: int
    stop: int

    @classmethod
    def of_fragment(cls, fragment: Fragment) -> "Run":
        size = next(iter(fragment.tensors.values())).numel()
        return cls(*(fragment.columns or (0, fragment.shape[-1])), fragment.start, fragment.start + size)

    @classmethod
    def of_piece(cls, piece: dict[str, Any]) -> "Run":
        return cls(*piece["columns"], piece["start"], piece["stop"])

    @property
    def size(self) -> int:
        return self.stop - self.start

    def rectangles(self) -> list[Rectangle]:
        """At most three: what is left of the first row, whole rows, the beginning of the last row."""
        width = self.right - self.left
        first, last = -(-self.start // width) * width, self.stop // width * width
        borders = [self.start, first, last, self.stop] if first <= last else [self.start, self.stop]
        found = []
        for low, high in pairwise(borders):
            if low < high:
                left, right = self.left + low % width, self.left + (high - 1) % width + 1
                rows = low // width, -(-high // width)
                found.append(Rectangle(*rows, left, right, low - self.start, right - left))
        return found

    def shared(self, stored: "Run") -> list[tuple[Rectangle, Rectangle]]:
        """What both runs hold: pairs of equal rectangles, as they lie in this run and in ``stored``."""
        ours, theirs = self.right - self.left, stored.right - stored.left
        if (
            max(self.left, stored.left) >= min(self.right, stored.right)
            or self.start // ours > (stored.stop - 1) // theirs
            or stored.start // theirs > (self.stop - 1) // ours
        ):
            return []  # most pieces of a tensor, when there are a thousand ranks
        pairs = ((a.cut(b), b.cut(a)) for a, b in product(self.rectangles(), stored.rectangles()))
        return [pair for pair in pairs if pair[0]]

    def flaw(self, rectangles: Iterable[Rectangle]) -> str | None:
        """What keeps the rectangles, all inside this run, from holding each of its elements once; none if they do."""
        width = self.right - self.left
        columns = np.arange(width)
        # Every column of a run is one interval of rows; filled from the top, it must be full in the end.
        filled = self.start // width + (columns < self.start % width)
        full = self.stop // width + (columns < self.stop % width)
        for rectangle in sorted(rectangles):
            below = filled[rectangle.left - self.left : rectangle.right - self.left]
            if (below > rectangle.top).any():
                return "there twice"
            if (below < rectangle.top).any():
                return "not wholly there"
            below[:] = rectangle.bottom
        return None if (filled == full).all() else "not wholly there"


def write_pieces(path: Path, fragments: Iterable[Fragment]) -> dict[str, Any]:
    """Write those that this rank owns, maybe none, and sync. Returns the file's entry for ``merge_pieces``.

    Raises ``OSError`` where the file cannot be written.
    """
    tensors, pieces = {}, []
    for fragment in fragments:
        run = Run.of_fragment(fragment)
        if not fragment.is_owner or not run.size:
            continue
        for kind, tensor in fragment.tensors.items():
            tensors[piece_key(kind, fragment.name, run)] = tensor.detach().cpu()
        piece = {"file": path.name, "columns": [run.left, run.right], "start": run.start, "stop": run.stop}
        pieces.append((fragment.name, list(fragment.shape), piece))
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # what a full disk becomes
        raise OSError(f"{path}: not written: {error}") from error
    with open(path, "rb+") as file:
        # safetensors leaves the data in the page cache.
        os.fsync(file.fileno())
    whole, weights = _checksums(path, moments := _moments_range(path))
    entry = {"file": path.name, "bytes": path.stat().st_size, "sha256": whole, "pieces": pieces}
    if moments:  # who reads the weights alone need not read the rest to check them
        entry["weights"] = {"without": list(moments), "sha256": weights}
    return entry


def merge_pieces(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest's ``tensors``, from all ranks' entries: by name the logical shape and the pieces."""
    tensors: dict[str, Any] = {}
    for entry in entries:
        for name, shape, piece in entry["pieces"]:
            tensors.setdefault(name, {"shape": shape, "pieces": []})["pieces"].append(piece)
    return tensors


class _Source(NamedTuple):
    fragment: Fragment
    stored: Run
    pairs: list[tuple[Rectangle, Rectangle]]


def find_pieces(folder: Path, tensors: dict[str, Any], wanted: Iterable[Fragment]) -> dict[str, list[_Source]]:
    """What to read for ``wanted``, by file. ``tensors`` is the manifest's; no tensor is touched.

    Raises ``UserError`` where the pieces do not hold every wanted element exactly once.
    """
    files = defaultdict(list)
    for fragment in wanted:
        run = Run.of_fragment(fragment)
        if not run.size:
            continue
        found = []
        for piece in tensors[fragment.name]["pieces"]:
            stored = Run.of_piece(piece)
            if pairs := run.shared(stored):
                files[piece["file"]].append(_Source(fragment, stored, pairs))
                found += [ours for ours, _ in pairs]
        if flaw := run.flaw(found):
            raise UserError(
                f"{folder}: {fragment.name} [{run.start}, {run.stop}) of columns [{run.left}, {run.right}) "
                f"is {flaw}; use an earlier checkpoint"
            )
    return files


@torch.no_grad()
def read_pieces(folder: Path, tensors: dict[str, Any], wanted: Iterable[Fragment]) -> None:
    """Fill the tensors of ``wanted`` from the files that hold a part of them, each opened once.

    Files are mapped: of whole rows of which only some columns are wanted, the others are left on disk as far as
    they fill pages. Raises ``UserError`` as ``find_pieces`` does, and for a file that is not what the manifest says.
    """
    for file, sources in sorted(find_pieces(folder, tensors, wanted).items()):
        try:
            with safe_open(folder / file, "pt") as handle:
                for fragment, stored, pairs in sources:
                    for kind, tensor in fragment.tensors.items():
                        flat = handle.get_slice(piece_key(kind, fragment.name, stored))
                        if flat.get_shape() != [stored.size]:  # a slice would silently be short
                            raise SafetensorError(f"{fragment.name}: {flat.get_shape()}, expected {[stored.size]}")
                        for ours, theirs in pairs:
                            ours.view(tensor).copy_(theirs.view(flat))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / file}: cannot be read: {error}; use an earlier checkpoint") from None


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksums(path: Path, moments: tuple[int, int] | None) -> tuple[str, str]:
    """SHA-256 of the file, and of the file without the bytes [moments[0], moments[1]); it is read once."""
    whole, weights = hashlib.sha256(), hashlib.sha256()
    first, last = moments or (0, 0)
    with open(path, "rb", buffering=0) as file:
        buffer, at = memoryview(bytearray(READ_BYTES)), 0
        while n := file.readinto(buffer):
            whole.update(buffer[:n])
            weights.update(buffer[: min(n, max(0, first - at))])
            weights.update(buffer[min(n, max(0, last - at)) : n])
            at += n
    return whole.hexdigest(), weights.hexdigest()


def _moments_range(path: Path) -> tuple[int, int] | None:
    """Where a file of ``write_pieces`` holds its moments: one range, as safetensors sorts by name; else None."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    weights, moments = [], []
    for key, entry in header.items():
        if key != "__metadata__":
            (weights if key.startswith("weight/") else moments).append(entry["data_offsets"])
    first, last = min(moments, default=[0])[0], max(moments, default=[0])[-1]
    if first == last or any(start < last and first < stop for start, stop in weights):
        return None
    return 8 + length + first, 8 + length + last


def piece_key(kind: str, name: str, run: Run) -> str:
    """Name of a piece inside its file; ``kind`` is "weight", "exp_avg" or "exp_avg_sq"."""
    return f"{kind}/{name}/{run.left}-{run.right}/{run.start}"
