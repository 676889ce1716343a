"""Results come back in order, from however many workers; a worker that fails or dies is told of, and none is left."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time

import psutil
import pytest

from megamtp.data.preprocess import workers
from megamtp.data.preprocess.workers import OrderedWorkers
from megamtp.errors import RunFailure, UserError
from tests.data.preprocessing import environment


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path):
    yield
    assert not multiprocessing.active_children()
    assert not list(tmp_path.iterdir())


def results(units, work, n_workers, folder):
    with OrderedWorkers(units, work, n_workers, folder) as ordered:
        return list(ordered)


def uneven(unit):
    """As many messages as the unit says, after a while."""
    rng = random.Random(unit)
    for i in range(unit % 5):
        time.sleep(rng.choice([0, 0, 0.003]))
        yield unit, i, b"x" * rng.choice([0, 10, 100_000])


@pytest.mark.parametrize("segment_bytes", [1, 1 << 26])
@pytest.mark.parametrize("n_workers", [1, 2, 3, 8])
def test_order(n_workers, segment_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "SEGMENT_BYTES", segment_bytes)
    units = list(range(1, 60))
    expected = [message for unit in units for message in uneven(unit)]
    assert results(iter(units), uneven, n_workers, tmp_path) == expected


def test_no_units(tmp_path):
    assert results([], uneven, 2, tmp_path) == []


def test_one_long_unit_does_not_stop_the_others(tmp_path):
    """The long unit ends when the last of the short ones has been worked on, which never happens if they wait."""
    flag = tmp_path / "flag"

    def work(unit):
        if unit == 0:
            while not flag.exists():
                time.sleep(0.001)
            flag.unlink()
        elif unit == 50:
            flag.touch()
        yield unit, b"x" * 100_000

    assert [unit for unit, _ in results(range(51), work, 2, tmp_path)] == list(range(51))


def test_messages_that_wait_are_not_in_memory(tmp_path):
    """Two hundred messages of 1 MB wait for the first unit."""
    go = tmp_path / "go"

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    def work(unit):
        if unit == 0:
            while not go.exists():
                time.sleep(0.001)
            go.unlink()
        if unit == 200:
            go.touch()
        yield os.urandom(1 << 20)

    before, most = resident(), 0
    with OrderedWorkers(range(201), work, 2, tmp_path) as ordered:
        for _ in ordered:
            most = max(most, resident() - before)
    assert most < 50 << 20


@pytest.mark.parametrize("n_workers", [1, 2])
def test_an_error_comes_in_its_own_words(n_workers, tmp_path):
    def work(unit):
        yield unit
        if unit == 5:
            raise UserError("file:7: it is wrong; mend it")

    with pytest.raises(UserError, match="^file:7: it is wrong; mend it$"):
        results(range(1000), work, n_workers, tmp_path)


def test_a_bug_shows_where_it_is(tmp_path):
    def work(unit):
        yield 1 // (unit - 3)

    with pytest.raises(RuntimeError, match="at 3:(?s:.*)ZeroDivisionError"):
        results(range(1000), work, 2, tmp_path)


@pytest.mark.parametrize("n_workers", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_death_is_told_of(number, n_workers, tmp_path):
    def work(unit):
        yield b"x" * 100_000
        if unit == 7:
            os.kill(os.getpid(), number)
        yield b""

    with pytest.raises(RunFailure, match=rf"was killed by {number.name} at 7; .* Nothing was written"):
        results(range(1000), work, n_workers, tmp_path)


def test_a_worker_that_is_killed_while_it_waits(tmp_path):
    """It has finished all it was given; the next unit finds nobody."""
    with OrderedWorkers(units_then_kill(), lambda unit: iter([unit]), 2, tmp_path) as ordered:
        units_then_kill.ordered = ordered
        with pytest.raises(RunFailure, match="was killed by SIGKILL"):
            list(ordered)


def units_then_kill():
    yield from range(10)
    for worker in units_then_kill.ordered._workers:
        os.kill(worker.process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, worker.process.pid, os.WEXITED | os.WNOWAIT)
    yield from range(10, 20)


def test_a_worker_that_leaves(tmp_path):
    def work(unit):
        os._exit(3)
        yield

    with pytest.raises(RunFailure, match="ended with code 3"):
        results(range(10), work, 2, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_while_workers_start(number, tmp_path, monkeypatch, capfd):
    """Between two forks: no worker is left, and none says a word."""
    # Set here: a shell starts what runs in its background with SIGINT ignored.
    before = signal.signal(number, signal.default_int_handler)
    start = OrderedWorkers._start_worker

    def stopped(self):
        start(self)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(OrderedWorkers, "_start_worker", stopped)
    try:
        with pytest.raises(KeyboardInterrupt):
            results(range(10), uneven, 2, tmp_path)
    finally:
        signal.signal(number, before)
    assert capfd.readouterr().err == ""


def test_workers_die_with_their_parent():
    """At once, in the middle of work that takes long."""
    code = f"""
import sys, time
from pathlib import Path
from megamtp.data.preprocess.workers import OrderedWorkers
def work(unit):
    yield unit
    time.sleep(60)
with OrderedWorkers(range(9), work, 2, Path({tempfile.gettempdir()!r})) as ordered:
    for message in ordered:
        print(*(worker.process.pid for worker in ordered._workers), flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment()) as parent:
        workers_of_it = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(workers_of_it) == 2
    _, alive = psutil.wait_procs(workers_of_it, timeout=5)
    for worker in alive:
        worker.kill()
    assert not alive


def test_too_many_workers(tmp_path, monkeypatch):
    def refuse(self):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(OrderedWorkers, "_start_worker", refuse)
    with pytest.raises(RunFailure, match="cannot start 9 workers: Resource temporarily unavailable; use fewer"):
        results(range(10), uneven, 9, tmp_path)


def test_stopping_early(tmp_path):
    with OrderedWorkers(range(10**9), uneven, 2, tmp_path) as ordered:
        assert next(iter(ordered))[0] == 1
