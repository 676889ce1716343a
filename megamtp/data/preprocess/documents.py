"""Documents out of files: JSONL (one object per line, the text under one key), plain, gzip or zstd, and Parquet."""

import contextlib
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from megamtp.data.preprocess.inputs import Unit, open_parquet, plan_units
from megamtp.errors import UserError

ROWS = 64  # of a Parquet file that are in memory at a time

BUFFER_BYTES = 1 << 20  # lines are often longer than Python's own 8 KiB

Skip = Callable[[Callable[[], str]], None]  # gets what describes a malformed document, and may raise instead


def iterate_documents(files: Iterable[Path | str], text_key: str = "text") -> Iterator[tuple[str, int]]:
    """Yield (text, bytes): the document, and how many bytes were read from disk since the one before.

    Blank lines are skipped. Raises ``UserError`` with file:line for a malformed line.
    """
    for unit in plan_units(map(Path, files)):
        yield from read_documents(unit, text_key)


def read_documents(unit: Unit, text_key: str, skip: Skip | None = None) -> Iterator[tuple[str, int]]:
    """The documents of ``unit`` as ``iterate_documents`` yields them; malformed ones go to ``skip`` if it is given.

    A file that cannot be decompressed to its end is a ``UserError`` in any case.
    """
    rows = _rows(unit, text_key) if unit.row_group is not None else _lines(unit)
    parse = _text_of_row if unit.row_group is not None else _JsonText(text_key)
    done = unit.start
    for row, position, where in rows:
        try:
            text = parse(row)
        except ValueError as error:
            message = str(error)
            if skip is None:
                raise UserError(f"{where()}: {message}") from None
            skip(lambda where=where, message=message: f"{where()}: {message}")
            continue
        if text is not None:
            position = min(position, unit.stop)  # the rest of the last line lies in the next unit
            yield text, position - done
            done = position


def _lines(unit: Unit) -> Iterator[tuple[bytes, int, Callable[[], str]]]:
    """(line, position on disk behind it, what tells file:line). As bytes: str would also split at U+2028."""
    file = unit.file
    try:
        with open(file, "rb", buffering=BUFFER_BYTES) as raw:
            if file.suffix in (".gz", ".zst"):
                lines = BufferedReader(_decompressed(raw, file), BUFFER_BYTES)
                for number, line in enumerate(lines, start=1):
                    yield line, raw.tell(), lambda number=number: f"{file}:{number}"
            elif _seek_line(raw, unit):
                end = raw.tell()
                while end < unit.stop and (line := raw.readline()):
                    start, end = end, end + len(line)
                    yield line, end, lambda start=start: f"{file}:{_line_number(file, start)}"
    except _decompression_errors() as error:
        raise UserError(f"{file}: cannot read: {error}; copy the file again") from None


def _seek_line(raw: BinaryIO, unit: Unit) -> bool:
    """Go to the first line that begins in the unit; False where none does. Never reads past the unit."""
    if unit.start == 0:
        return True
    position = unit.start - 1  # a newline here begins a line at the unit's start
    raw.seek(position)
    while position < unit.stop - 1:
        block = raw.read(min(1 << 16, unit.stop - 1 - position))
        if not block:
            return False
        if (newline := block.find(b"\n")) >= 0:
            raw.seek(position + newline + 1)
            return True
        position += len(block)
    return False


def _decompressed(raw: BinaryIO, file: Path) -> BinaryIO:
    if file.suffix == ".gz":
        return gzip.open(raw)
    zstd = _zstd()
    if zstd is None:
        raise UserError(f"{file}: reading zstd needs the package backports.zstd; pip install backports.zstd")
    # Long-range mode compresses with windows that are refused by default.
    return zstd.open(raw, options={zstd.DecompressionParameter.window_log_max: 31})


def _zstd():
    try:
        from compression import zstd  # Python 3.14
    except ImportError:
        try:
            from backports import zstd
        except ImportError:
            return None
    return zstd


def _decompression_errors() -> tuple[type[Exception], ...]:
    zstd = _zstd()
    return (OSError, EOFError, zlib.error, *([zstd.ZstdError] if zstd else []))


def _line_number(file: Path, position: int) -> int:
    number = 1
    with open(file, "rb") as raw:
        while position > 0 and (block := raw.read(min(1 << 20, position))):
            number += block.count(b"\n")
            position -= len(block)
    return number


class _JsonText:
    """The text of a line, None for a blank one. ``ValueError`` says in a few words what is wrong with it."""

    def __init__(self, text_key: str):
        self.text_key = text_key
        try:
            import orjson  # takes a third less time
        except ImportError:
            orjson = None
        self._orjson = orjson

    def __call__(self, line: bytes) -> str | None:
        if self._orjson:
            with contextlib.suppress(ValueError, TypeError, KeyError):  # json takes more, and tells what is wrong
                text = self._orjson.loads(line)[self.text_key]
                if isinstance(text, str):
                    return text
        return self._careful(line) if line.strip() else None

    def _careful(self, line: bytes) -> str:
        try:
            document = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 at byte {error.start} of the line; convert or remove it") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not valid JSON: {error}; repair or remove the line") from None
        if not isinstance(document, dict) or not isinstance(text := document.get(self.text_key), str):
            found = f"keys {list(document)[:8]}" if isinstance(document, dict) else type(document).__name__
            raise ValueError(f"no text under key {self.text_key!r} (found {found}); give the right --text-key")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("the text holds half a surrogate pair; repair or remove the line") from None
        return text


def _rows(unit: Unit, text_key: str) -> Iterator[tuple[Any, int, Callable[[], str]]]:
    """(value, position on disk, what tells file:row, counted from 1) of a row group's text column."""
    file = open_parquet(unit.file)
    from pyarrow import ArrowException

    if text_key not in file.schema_arrow.names:
        raise UserError(f"{unit.file}: no column {text_key!r} (found {file.schema_arrow.names[:8]}); give --text-key")
    before = sum(file.metadata.row_group(i).num_rows for i in range(unit.row_group))
    count = file.metadata.row_group(unit.row_group).num_rows
    done = 0
    try:
        for batch in file.iter_batches(ROWS, row_groups=[unit.row_group], columns=[text_key], use_threads=False):
            for value in batch.column(0):
                done += 1
                position = unit.start + unit.n_bytes * done // count
                yield value, position, lambda row=before + done: f"{unit.file}, row {row}"
    except (ArrowException, OSError) as error:
        raise UserError(f"{unit.file}: cannot read: {' '.join(str(error).split())}; copy the file again") from None


def _text_of_row(value: Any) -> str:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start} of the text; convert or remove it") from None
    if isinstance(text, bytes):
        raise ValueError("holds bytes, not text; cast the column to a string")
    if not isinstance(text, str):
        raise ValueError(f"no text (found {type(text).__name__}); remove the row or give the right --text-key")
    return text
