"""A corpus that every machine already has: the Python standard library's sources, as JSONL.

About 10 MB of real code without a download. Files are split, not lines, so that no file is on both sides.
"""

import ast
import hashlib
import json
import sysconfig
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from megamtp.errors import UserError
from megamtp.files import write_atomic

MAX_FILE_BYTES = 512 * 1024
VALIDATION_FRACTION = 0.04
NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__"})
# Distributions often leave the test suites out; without them the corpus is nearly the same everywhere.
TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
# One template per character set: near-duplicates would sit on both sides of the split.
CODEC_FOLDER = "encodings"
MIN_TABLE_LINES = 16


@dataclass(frozen=True)
class SplitSize:
    files: int
    bytes: int  # of UTF-8 source text


@dataclass(frozen=True)
class CorpusStats:
    train: SplitSize
    validation: SplitSize
    skipped: dict[str, int]  # reason -> files


def stdlib_root() -> Path:
    """The folder of the running interpreter's standard library; a virtual environment's is its base's."""
    return Path(sysconfig.get_paths()["stdlib"])


def gather_stdlib(source_root: str | Path, output_dir: str | Path, include_tests: bool = False) -> CorpusStats:
    """Write ``train.jsonl`` and ``validation.jsonl``, one ``{"path": relative, "text": source}`` a line.

    Takes every ``*.py`` under ``source_root`` in the order of the relative paths, apart from installed packages,
    test suites (unless ``include_tests``), files over ``MAX_FILE_BYTES``, not UTF-8, empty, that do not parse
    (deliberately malformed test data), codecs, files that are mostly tables, and repeated contents.
    A file's side is a hash of its path: stable between machines and when other files come or go.

    Raises ``UserError`` when there are no sources, too few for both sides, or a file cannot be read or written.
    """
    source_root, output_dir = Path(source_root), Path(output_dir)
    if not source_root.is_dir():
        raise UserError(
            f"{source_root}: not a folder of Python sources (a zipped standard library?); "
            "use an interpreter installed with its sources"
        )
    splits: dict[str, list[tuple[str, str]]] = {"train": [], "validation": []}
    skipped: Counter[str] = Counter()
    seen: set[bytes] = set()
    for path in _python_files(source_root):
        relative = path.relative_to(source_root)
        if not include_tests and TEST_FOLDERS.intersection(relative.parts):
            text, reason = "", "test suite"
        elif relative.parts[0] == CODEC_FOLDER:
            text, reason = "", "codec"
        else:
            text, reason = _read_source(path)
        if reason is None:
            digest = hashlib.sha256(text.encode()).digest()
            reason = "duplicate" if digest in seen else None
            seen.add(digest)
        if reason is None:
            splits[_split_of(relative.as_posix())].append((relative.as_posix(), text))
        else:
            skipped[reason] += 1

    for name, files in splits.items():
        if not files:
            raise UserError(
                f"{source_root}: no Python source for the {name} split "
                f"(taken: {sum(map(len, splits.values()))}, skipped: {dict(skipped)}); "
                "use an interpreter installed with its sources"
            )
    for name, files in splits.items():
        lines = "".join(json.dumps({"path": path, "text": text}) + "\n" for path, text in files)
        write_atomic(output_dir / f"{name}.jsonl", lines.encode())
    sizes = {
        name: SplitSize(len(files), sum(len(text.encode()) for _, text in files)) for name, files in splits.items()
    }
    return CorpusStats(**sizes, skipped=dict(sorted(skipped.items())))


def _python_files(root: Path) -> list[Path]:
    files = (path for path in root.rglob("*.py") if not NOT_STDLIB.intersection(path.relative_to(root).parts))
    return sorted((path for path in files if path.is_file()), key=lambda path: path.relative_to(root).as_posix())


def _read_source(path: Path) -> tuple[str, str | None]:
    """The text, and why it is no corpus text (or None)."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}; check its permissions") from None
    if len(content) > MAX_FILE_BYTES:
        return "", "too large"
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return "", "not UTF-8"
    if not text.strip():
        return "", "empty"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes and the like, in somebody else's code
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # what ast.parse documents for bad input
        return "", "does not parse"
    return text, "mostly tables" if _table_lines(tree) > len(text.splitlines()) / 2 else None


def _table_lines(tree: ast.Module) -> int:
    """Lines of long module-level statements that hold data: ``table = {...}``, ``table.update({...})``."""
    docstring = tree.body[:1] if ast.get_docstring(tree, clean=False) is not None else []
    statements = [
        node for node in tree.body if isinstance(node, (ast.Assign, ast.AnnAssign, ast.Expr)) and node not in docstring
    ]
    lengths = [node.end_lineno - node.lineno + 1 for node in statements]
    return sum(length for length in lengths if length >= MIN_TABLE_LINES)


def _split_of(relative_path: str) -> str:
    # File sizes are skewed; with this salt 4 % of Python 3.11's files are also 4 % of its bytes.
    draw = int.from_bytes(hashlib.sha256(f"validation:{relative_path}".encode()).digest()[:8], "big") / 2**64
    return "validation" if draw < VALIDATION_FRACTION else "train"
