import errno
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from megamtp.data import index_cache
from megamtp.data.index_cache import open_or_build
from megamtp.errors import UserError

FORK = multiprocessing.get_context("fork")
EXPECTED = {"starts": np.arange(1000), "lengths": np.arange(7, dtype=np.int32)}


def build():
    return {key: array.copy() for key, array in EXPECTED.items()}


def never():
    raise AssertionError("built again")


def assert_whole(arrays):
    assert arrays.keys() == EXPECTED.keys()
    for key, array in EXPECTED.items():
        assert np.array_equal(arrays[key], array) and arrays[key].dtype == array.dtype
        assert isinstance(arrays[key], np.memmap) and not arrays[key].flags.writeable


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_built_once_then_mapped(tmp_path):
    folder = tmp_path / "not" / "there"
    assert_whole(open_or_build(folder, "x", build))
    assert names(folder) == ["x", "x.lock"]
    assert names(folder / "x") == ["lengths.npy", "meta.json", "starts.npy"]
    assert_whole(open_or_build(folder, "x", never))
    assert_whole(open_or_build(folder, "y", build))


def slow_build(log: Path):
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(0.2)
    return build()


def open_and_check(folder, log):
    assert_whole(open_or_build(folder, "x", lambda: slow_build(log)))


def start(target, *arguments):
    process = FORK.Process(target=target, args=arguments)
    process.start()
    return process


def finish(processes):
    for process in processes:
        process.join(30)
        assert process.exitcode == 0


def test_processes_that_start_together_build_once(tmp_path):
    finish([start(open_and_check, tmp_path / "cache", tmp_path / "log") for _ in range(4)])
    assert len((tmp_path / "log").read_text().split()) == 1
    assert names(tmp_path / "cache") == ["x", "x.lock"]


def open_and_hang(folder, marker, where):
    """Build, and stop for ever at the point ``where``."""

    def hang(*_, **__):
        marker.touch()
        time.sleep(60)

    def hang_in_build():
        if where == "build":
            hang()
        return build()

    if where == "first file":
        np.save = hang
    elif where == "fsync":
        os.fsync = hang
    elif where == "meta":
        json.dump = hang
    elif where == "rename":
        Path.rename = hang
    elif where == "after rename":
        rename = Path.rename
        Path.rename = lambda *arguments: (rename(*arguments), hang())
    open_or_build(folder, "x", hang_in_build)


@pytest.mark.parametrize("where", ["build", "first file", "fsync", "meta", "rename", "after rename"])
def test_a_builder_is_killed(tmp_path, where):
    """Others wait for it, then build themselves; nothing half-built is opened or left."""
    folder, marker, log = tmp_path / "cache", tmp_path / "marker", tmp_path / "log"
    builder = start(open_and_hang, folder, marker, where)
    while not marker.exists():
        assert builder.is_alive()
        time.sleep(0.005)
    waiting = [start(open_and_check, folder, log) for _ in range(2)]
    if where != "after rename":  # then it is complete, and nobody waits
        time.sleep(0.1)
        assert all(process.is_alive() for process in waiting) and not log.exists()
    os.kill(builder.pid, signal.SIGKILL)
    builder.join()
    finish(waiting)
    assert (len(log.read_text().split()) if log.exists() else 0) == (0 if where == "after rename" else 1)
    assert names(folder) == ["x", "x.lock"]
    assert_whole(open_or_build(folder, "x", never))


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-8])


DAMAGE = {
    "array cut off": lambda entry: cut_off(entry / "starts.npy"),
    "array cut off in its header": lambda entry: (entry / "starts.npy").write_bytes(b"\x93NUMPY\x01"),
    "array empty": lambda entry: (entry / "lengths.npy").write_bytes(b""),
    "array too long": lambda entry: (entry / "lengths.npy").write_bytes((entry / "lengths.npy").read_bytes() + b"x"),
    "array missing": lambda entry: (entry / "lengths.npy").unlink(),
    "other shape": lambda entry: np.save(entry / "lengths.npy", np.arange(14, dtype=np.int16)),
    "no array": lambda entry: (entry / "starts.npy").write_bytes(bytes((entry / "starts.npy").stat().st_size)),
    "meta missing": lambda entry: (entry / "meta.json").unlink(),
    "meta empty": lambda entry: (entry / "meta.json").write_text(""),
    "meta something else": lambda entry: (entry / "meta.json").write_text("[1]"),
    "meta not text": lambda entry: (entry / "meta.json").write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_repaired(tmp_path, capsys, damage):
    open_or_build(tmp_path, "x", build)
    DAMAGE[damage](tmp_path / "x")
    assert_whole(open_or_build(tmp_path, "x", build))
    captured = capsys.readouterr()
    assert captured.err == f"{tmp_path / 'x'}: damaged, building it again\n" and not captured.out
    assert_whole(open_or_build(tmp_path, "x", never))
    assert names(tmp_path) == ["x", "x.lock"]


def refuse(number):
    def operation(*_, **__):
        raise OSError(number, os.strerror(number))

    return operation


def test_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot keep .*; set data.cache_dir") as error:
        open_or_build(tmp_path / "file" / "cache", "x", build)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    with monkeypatch.context() as patch:  # root may write everywhere: refuse by hand
        patch.setattr(Path, "mkdir", refuse(errno.EROFS))
        with pytest.raises(UserError, match="Read-only file system; set data.cache_dir"):
            open_or_build(tmp_path / "cache", "x", build)
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", refuse(errno.ENOSPC))
        with pytest.raises(UserError, match="No space left on device"):
            open_or_build(tmp_path / "cache", "x", build)
    assert names(tmp_path / "cache") == ["x.lock"]
    open_or_build(tmp_path / "cache", "x", build)
    monkeypatch.setattr(Path, "mkdir", refuse(errno.EROFS))  # what is there can be read from a read-only disk
    assert_whole(open_or_build(tmp_path / "cache", "x", never))


def test_error_of_the_build_is_passed_on_and_leaves_nothing(tmp_path):
    def broken():
        raise UserError("the data is wrong")

    with pytest.raises(UserError, match="the data is wrong"):
        open_or_build(tmp_path, "x", broken)
    assert names(tmp_path) == ["x.lock"]


def test_another_node_was_faster(tmp_path):
    """On a disk whose locks do not reach across nodes: the winner's entry stays."""

    def build_while_another_installs():
        index_cache._install(tmp_path / "x", build, remove_left_overs=False)
        return {"starts": np.zeros(1)}

    assert_whole(open_or_build(tmp_path, "x", build_while_another_installs))
    assert names(tmp_path) == ["x", "x.lock"]


def test_left_overs_of_another_host_stay(tmp_path):
    """It may be building right now."""
    host = os.uname().nodename
    for name in (f"x.{host}.0123.tmp", f"x.other-{host}.0123.tmp", f"xy.{host}.0123.tmp"):
        (tmp_path / name).mkdir()
    open_or_build(tmp_path, "x", build)
    assert names(tmp_path) == sorted(["x", "x.lock", f"x.other-{host}.0123.tmp", f"xy.{host}.0123.tmp"])


def test_disk_without_locks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(index_cache.fcntl, "flock", refuse(errno.ENOSYS))
    assert_whole(open_or_build(tmp_path, "x", build))
    assert "no file locks" in capsys.readouterr().err
    monkeypatch.setattr(index_cache.fcntl, "flock", refuse(errno.EIO))
    with pytest.raises(UserError, match="data.cache_dir"):
        open_or_build(tmp_path, "y", build)
