"""Files that appear under their name only when they are whole.

Bytes go to a temporary name in the same folder; file, rename and folder are synced in that order, so
that neither a crash nor a power cut leaves a file that looks complete and is not.
"""

import contextlib
import errno
import fcntl
import glob
import os
import uuid
from pathlib import Path
from typing import BinaryIO

from megamtp.errors import RunFailure, UserError

BUFFER_BYTES = 1 << 22


def open_temporary(path: Path) -> BinaryIO:
    """Open a new temporary file beside ``path``, creating the folder. ``UserError`` where that is impossible."""
    # The name is unique, or two writers of one output would write into each other's file.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(temporary, "xb", buffering=BUFFER_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot write here: {error.strerror}; choose another output") from None
    with contextlib.suppress(OSError):  # a file system without locks: a left-over stays until someone removes it
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return file


def remove_leftovers(path: Path) -> list[Path]:
    """Remove temporary files of ``path`` whose writer was killed. Returns those that a living writer still locks."""
    alive = []
    for leftover in path.parent.glob(f"{glob.escape(path.name)}.????????.tmp"):
        try:
            with open(leftover, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink()
        except BlockingIOError:
            alive.append(leftover)
        except OSError:
            continue  # gone meanwhile, or a file system without locks: it stays until someone removes it
    return alive


def sync(file: BinaryIO) -> None:
    """Bring all that was written to the disk, which may turn out to be full."""
    file.flush()
    os.fsync(file.fileno())


def publish(file: BinaryIO, path: Path) -> None:
    """Give a file of ``open_temporary`` its name, replacing what is there."""
    sync(file)
    file.close()
    os.replace(file.name, path)
    sync_folder(path.parent)


def discard(file: BinaryIO) -> None:
    """Close and remove a file of ``open_temporary``; nothing happens once it is published."""
    with contextlib.suppress(OSError):  # closing flushes, which a full disk refuses; the file goes anyway
        file.close()
    Path(file.name).unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove ``path`` if it is there, durably."""
    if path.exists():
        path.unlink()
        sync_folder(path.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a whole small file."""
    file = open_temporary(path)
    try:
        file.write(data)
        publish(file, path)
    finally:
        discard(file)


def write_failure(path: Path | str, error: OSError) -> RunFailure:
    """What to tell of an ``OSError`` while files are written."""
    advice = {errno.ENOSPC: "free some space", errno.EDQUOT: "raise the quota"}.get(error.errno, "mend that")
    return RunFailure(f"{path}: cannot write: {error.strerror or error}; {advice} and run it again")


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
