"""Arrays that take long to build, on disk: built by one process per node, memory-mapped by all.

An entry is a folder of ``.npy`` files and a ``meta.json`` with their shapes. It is built under an exclusive lock in a
temporary folder and renamed, so that what is there under its name is whole:

- the ranks of a node wait for the lock, then find the entry; no collective, so node-local disks do as well;
- a builder that is killed loses its lock with its life; the next one removes what it left;
- nodes that share a disk on which locks do not reach across may all build: the first rename wins.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from megamtp.errors import UserError
from megamtp.files import sync_folder

META = "meta.json"
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # e.g. Lustre mounted without flock
TAKEN = (errno.EEXIST, errno.ENOTEMPTY)

Arrays = dict[str, np.ndarray]


def open_or_build(folder: Path, name: str, build: Callable[[], Arrays]) -> Arrays:
    """The arrays of entry ``name`` in ``folder``, memory-mapped read-only; ``build`` makes them where it is missing.

    A damaged entry is built again, with a line on stderr. ``UserError`` when the folder must be written and cannot.
    """
    entry = folder / name
    if entry.exists() and (arrays := _open(entry)) is not None:
        return arrays
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / f"{name}.lock") as locked:
            if entry.exists():
                if (arrays := _open(entry)) is not None:
                    return arrays
                print(f"{entry}: damaged, building it again", file=sys.stderr)
                _set_aside(entry)
            _install(entry, build, remove_left_overs=locked)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot keep the packing of the data here: {error.strerror or error}; "
            "set data.cache_dir to a folder that can be written and has room"
        ) from error
    arrays = _open(entry)
    if arrays is None:
        raise UserError(f"{entry}: damaged right after it was written; check the disk or set data.cache_dir")
    return arrays


def _open(entry: Path) -> Arrays | None:
    """None when the entry is not whole: checks sizes and shapes, not the contents."""
    try:
        meta = json.loads((entry / META).read_bytes())
        arrays = {}
        for key, expected in meta["arrays"].items():
            path = entry / f"{key}.npy"
            arrays[key] = np.load(path, mmap_mode="r", allow_pickle=False)
            if path.stat().st_size != expected["bytes"] or _describe(arrays[key]) != expected["array"]:
                return None
        return arrays
    except PermissionError as error:
        raise UserError(
            f"{entry}: cannot be read; give read access, or set data.cache_dir to another folder"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
        return None  # a file is missing, cut off, or something else


def _describe(array: np.ndarray) -> dict:
    return {"dtype": array.dtype.str, "shape": list(array.shape)}


def _install(entry: Path, build: Callable[[], Arrays], remove_left_overs: bool) -> None:
    # The host in the name: on a shared disk without common locks another host may be building right now.
    own = f"{entry.name}.{os.uname().nodename}."
    if remove_left_overs:
        for left in entry.parent.glob(f"{own}*.tmp"):
            shutil.rmtree(left)
    temporary = entry.with_name(f"{own}{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        described = {}
        for key, array in build().items():
            path = temporary / f"{key}.npy"
            with open(path, "wb") as file:
                np.save(file, array, allow_pickle=False)
                _sync(file)
            described[key] = {"bytes": path.stat().st_size, "array": _describe(array)}
        with open(temporary / META, "w") as file:
            json.dump({"arrays": described}, file)
            _sync(file)
        sync_folder(temporary)
        try:
            temporary.rename(entry)
        except OSError as error:
            if error.errno not in TAKEN:
                raise
            # Another node was faster; its entry is the same.
        sync_folder(entry.parent)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


def _set_aside(entry: Path) -> None:
    """Remove a damaged entry; by a rename first, so that nobody finds half of it."""
    aside = entry.with_name(f"{entry.name}.{os.uname().nodename}.{uuid.uuid4().hex[:8]}.tmp")
    with contextlib.suppress(FileNotFoundError):  # another node was faster
        entry.rename(aside)
        shutil.rmtree(aside)


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold ``path`` exclusively. Yields False where the file system has no locks: then several may build at once."""
    # The file stays: removing it would let two processes hold "the" lock, on two files of one name.
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(f"{path}: no file locks here, each process builds the packing itself", file=sys.stderr)
            yield False
            return
        yield True
