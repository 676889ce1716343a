"""Documents out of JSONL: one JSON object per line, the text under one key; plain or gzip."""

import glob
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from megamtp.errors import UserError

FOLDER_PATTERNS = ("*.jsonl", "*.jsonl.gz")


def find_files(inputs: Iterable[Path | str]) -> list[Path]:
    """Files named by files, folders (searched for ``*.jsonl`` and ``*.jsonl.gz``) and globs.

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


def iterate_documents(files: Iterable[Path | str], text_key: str = "text") -> Iterator[tuple[str, int]]:
    """Yield (text, bytes): the document, and how many bytes were read from disk since the one before.

    Blank lines are skipped. Raises ``UserError`` with file:line for a malformed line.
    """
    for file in files:
        done = 0
        for number, line, position in _lines(Path(file)):
            if line.strip():
                yield _text(line, text_key, f"{file}:{number}"), position - done
                done = position


def _lines(path: Path) -> Iterator[tuple[int, bytes, int]]:
    """Number, content and position on disk after each line. Read as bytes: str would also split at U+2028."""
    try:
        with open(path, "rb") as raw:
            compressed = path.suffix == ".gz"
            position = 0
            for number, line in enumerate(gzip.open(raw) if compressed else raw, start=1):
                position = raw.tell() if compressed else position + len(line)
                yield number, line, position
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot read: {error}; copy the file again") from None


def _text(line: bytes, text_key: str, where: str) -> str:
    try:
        document = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start} of the line; convert or remove it") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON: {error}; repair or remove the line") from None
    if not isinstance(document, dict) or not isinstance(text := document.get(text_key), str):
        found = f"keys {list(document)[:8]}" if isinstance(document, dict) else type(document).__name__
        raise UserError(f"{where}: no text under key {text_key!r} (found {found}); give the right --text-key")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where}: the text holds half a surrogate pair; repair or remove the line") from None
    return text
