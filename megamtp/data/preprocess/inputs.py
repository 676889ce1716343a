"""Which files are read, and how they are cut into units that workers, and nodes, share out by bytes."""

import glob
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megamtp.errors import UserError

FOLDER_PATTERNS = ("*.jsonl", "*.jsonl.gz", "*.jsonl.zst", "*.parquet")
UNIT_BYTES = 1 << 21


@dataclass(frozen=True)
class Unit:
    """A piece of one file: the lines that begin in [start, stop), a whole compressed file, or a Parquet row group."""

    file: Path
    start: int  # bytes on disk
    stop: int
    row_group: int | None = None

    @property
    def n_bytes(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"{self.file}, byte {self.start}"


def find_files(inputs: Iterable[Path | str]) -> list[Path]:
    """Files named by files, folders (searched for ``FOLDER_PATTERNS``) and globs.

    Inputs keep their order, the files of one input are sorted. Raises ``UserError`` for an input that names
    nothing and for a file that is named twice.
    """
    files: list[Path] = []
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            found = sorted(file for pattern in FOLDER_PATTERNS for file in path.rglob(pattern))
        elif path.is_file():
            found = [path]
        else:
            found = sorted(Path(name) for name in glob.glob(str(given), recursive=True) if Path(name).is_file())
        if not found:
            raise UserError(f"{given}: no such file, and no {' or '.join(FOLDER_PATTERNS)} found there; check the path")
        files += found
    seen: set[Path] = set()
    for file in files:
        if (resolved := file.resolve()) in seen:
            raise UserError(f"{file}: given twice, its documents would count twice; give it once")
        seen.add(resolved)
    return files


def plan_units(
    files: Iterable[Path], shard: int = 0, n_shards: int = 1, unit_bytes: int | None = None
) -> Iterator[Unit]:
    """The units of shard ``shard`` of ``n_shards``; the shards together, in order, are all documents in order.

    All bytes of all files, one after another, are cut evenly. What cannot be cut belongs to the shard in which it
    begins. Raises ``UserError`` for a Parquet file that cannot be read.
    """
    files = list(files)
    sizes = [_size(file) for file in files]
    first, last = (sum(sizes) * cut // n_shards for cut in (shard, shard + 1))
    position = 0
    for file, size in zip(files, sizes, strict=True):
        begin, end = first - position, last - position  # of the shard, in this file
        position += size
        if file.suffix in (".gz", ".zst", ".parquet"):
            pieces = _whole_pieces(file, size)
            yield from (piece for piece in pieces if begin <= piece.start < end)
        else:
            cuts = [*range(max(begin, 0), min(end, size), unit_bytes or UNIT_BYTES), min(end, size)]
            yield from (Unit(file, start, stop) for start, stop in zip(cuts, cuts[1:], strict=False))


def shard_bytes(files: Iterable[Path], shard: int = 0, n_shards: int = 1) -> int:
    """How many bytes the units of a shard have together."""
    return sum(unit.n_bytes for unit in plan_units(files, shard, n_shards, unit_bytes=1 << 40))


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise UserError(f"{file}: cannot read: {error.strerror}; check the path") from None


def _whole_pieces(file: Path, size: int) -> list[Unit]:
    if file.suffix != ".parquet":
        return [Unit(file, 0, size)] if size else []
    count = open_parquet(file).num_row_groups
    return [Unit(file, size * i // count, size * (i + 1) // count, row_group=i) for i in range(count)]


def open_parquet(file: Path):
    """A ``pyarrow.parquet.ParquetFile``. ``UserError`` without pyarrow and for what is no Parquet file."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"{file}: reading Parquet needs the package pyarrow; pip install pyarrow") from None
    try:
        return parquet.ParquetFile(file)
    except (ArrowException, OSError) as error:
        raise UserError(f"{file}: cannot read: {' '.join(str(error).split())}; copy the file again") from None
