"""A folder that appears under its name only when all of it is on disk, and files copied into one."""

import contextlib
import fcntl
import glob
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from megamtp.errors import UserError
from megamtp.files import sync_folder, write_failure

OLD = "replaced"


@contextlib.contextmanager
def new_folder(path: Path, force: bool, may_replace: Callable[[Path], bool], source: Path, n_bytes: int):
    """Yield a temporary folder beside ``path``; it gets the name ``path`` when the body ends well, and goes else.

    Every file is synced before. What is at ``path`` is replaced with ``force`` alone, where ``may_replace`` knows it
    for the same kind of output, and at the very end. Left-overs of killed writers are removed first. ``n_bytes`` will
    be written. Raises ``UserError`` for an output that cannot be, ``RunFailure`` where the disk fails.
    """
    path = Path(os.path.realpath(path))  # or a link would be replaced, and not what it points to
    real_source = Path(os.path.realpath(source))
    if path == real_source or path in real_source.parents:
        raise UserError(f"{path}: holds the source itself; choose another output")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        _require_free(path, force, may_replace)
        free = shutil.disk_usage(path.parent).free
        if free < n_bytes:
            raise UserError(f"{path}: needs {n_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; free some space")
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        temporary.mkdir()
    except OSError as error:
        raise UserError(f"{path}: cannot write here: {error.strerror}; choose another output") from None
    try:
        with _locked(temporary):
            yield temporary
            _sync_all(temporary)
            _publish(temporary, path, force, may_replace)
    except OSError as error:
        raise write_failure(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # nothing is there once it is published


def _require_free(path: Path, force: bool, may_replace: Callable[[Path], bool]) -> None:
    if not os.path.lexists(path):
        return
    if not force:
        raise UserError(f"{path}: exists already; choose another output, or replace it with --force")
    if not path.is_dir() or any(path.iterdir()) and not may_replace(path):
        raise UserError(f"{path}: is not the output of an earlier conversion; --force does not replace it, remove it")


def _publish(temporary: Path, path: Path, force: bool, may_replace: Callable[[Path], bool]) -> None:
    _require_free(path, force, may_replace)  # hours may have passed
    old = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.{OLD}")
    if path.exists():
        path.rename(old)
    temporary.rename(path)
    sync_folder(path.parent)
    if old.exists():
        shutil.rmtree(old)


def _remove_leftovers(path: Path) -> None:
    """Of writers that were killed; one that lives holds a lock."""
    pattern = f"{glob.escape(path.name)}.????????"
    for old in path.parent.glob(f"{pattern}.{OLD}"):
        if path.exists():
            shutil.rmtree(old)
        else:  # killed between two renames: the new folder has lost its chance, the old one gets its name back
            old.rename(path)
    for leftover in path.parent.glob(f"{pattern}.tmp"):
        if leftover.is_dir():
            with contextlib.suppress(BlockingIOError), _locked(leftover):
                shutil.rmtree(leftover)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """``BlockingIOError`` where another process holds the lock."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _sync_all(folder: Path) -> None:
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            with open(Path(parent) / name, "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(parent))
