"""Compile ``blocks.c`` once per source, compiler and kind of processor; load it."""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

COMPILER_SECONDS = 120
SOURCE = Path(__file__).with_name("blocks.c")
FLAGS = ["-std=c11", "-O3", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=fast"]
# What PyTorch calls so; never -march=native, since a home folder may be shared by unlike machines.
OF_CAPABILITY = {
    "AVX512": ["-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma"],
    "AVX2": ["-mavx2", "-mfma"],
}


class CannotBuild(Exception):
    """Why this machine has no native blocks, in a few words."""


@functools.cache
def library() -> ctypes.CDLL:
    """The functions of ``blocks.c``, from the user's cache folder or compiled now (a second or two)."""
    command = shlex.split(os.environ.get("CC") or "cc")
    if shutil.which(command[0]) is None:
        raise CannotBuild("there is no C compiler (cc, or what CC names)")
    flags = [*FLAGS, *OF_CAPABILITY.get(torch.backends.cpu.get_cpu_capability(), [])]
    version = _run([*command, "--version"]).stdout
    made_from = [SOURCE.read_bytes(), f"{command} {version} {flags} {platform.machine()}".encode()]
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megamtp"
    except RuntimeError:
        raise CannotBuild("there is no home folder to keep it in; set XDG_CACHE_HOME") from None
    target = folder / f"blocks-{hashlib.sha256(b'|'.join(made_from)).hexdigest()[:16]}.so"
    if not target.exists():
        _compile([*command, *flags], folder, target)
    try:
        loaded = ctypes.CDLL(str(target))
    except OSError as error:
        raise CannotBuild(f"{target} does not load: {error}") from None
    for function in (loaded.run_trunk, loaded.run_heads):
        function.restype = ctypes.c_int
    return loaded


def _compile(command: list[str], folder: Path, target: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as temporary:
            built = Path(temporary) / "blocks.so"
            done = _run([*command, str(SOURCE), "-o", str(built), "-lm"])
            if done.returncode:
                raise CannotBuild(f"{command[0]}: {(done.stderr.strip() or 'failed').splitlines()[0]}")
            with built.open("rb") as file:
                os.fsync(file.fileno())
            built.replace(target)
    except OSError as error:
        raise CannotBuild(f"{folder}: {error.strerror}") from None


def _run(command: list[str]) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=COMPILER_SECONDS)
    except subprocess.TimeoutExpired:
        raise CannotBuild(f"{command[0]}: no answer in {COMPILER_SECONDS} seconds") from None
    except OSError as error:
        raise CannotBuild(f"{command[0]}: {error.strerror}") from None
