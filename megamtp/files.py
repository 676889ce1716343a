"""Files that appear under their name only when they are whole.

Bytes go to a temporary name in the same folder; file, rename and folder are synced in that order, so
that neither a crash nor a power cut leaves a file that looks complete and is not.
"""

import os
import uuid
from pathlib import Path
from typing import BinaryIO

from megamtp.errors import UserError

BUFFER_BYTES = 1 << 22


def open_temporary(path: Path) -> BinaryIO:
    """Open a new temporary file beside ``path``, creating the folder. ``UserError`` where that is impossible."""
    # The name is unique, or two writers of one output would write into each other's file.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(temporary, "xb", buffering=BUFFER_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot write here: {error.strerror}; choose another output") from None


def publish(file: BinaryIO, path: Path) -> None:
    """Give a file of ``open_temporary`` its name, replacing what is there."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.replace(file.name, path)
    sync_folder(path.parent)


def discard(file: BinaryIO) -> None:
    """Close and remove a file of ``open_temporary``; nothing happens once it is published."""
    try:
        file.close()  # flushes, which a full disk refuses
    finally:
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


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
