"""Forked workers whose results come back in order; a worker that dies ends the work, soon and with a word."""

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
import tempfile
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, BinaryIO, Generic, NamedTuple, TypeVar

from megamtp.errors import RunFailure, UserError

Unit = TypeVar("Unit")
Message = TypeVar("Message")

AHEAD = 2  # units that a worker is given at a time, so that it need not wait for the next
SEGMENT_BYTES = 1 << 26
PR_SET_PDEATHSIG = 1  # linux/prctl.h
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class OrderedWorkers(Generic[Unit, Message]):
    """``work(unit)`` yields messages; iterating yields all of them in the order of ``units``, then of the messages.

    A context manager; leaving it ends the workers. They are forked, so ``work`` may be anything, and what it needs is
    best loaded before. Messages of a unit whose turn has not come wait in anonymous files in ``folder``: memory
    stays bounded, and one long unit does not stop the others. Raises the ``UserError`` of a worker, and
    ``RunFailure`` for one that died.
    """

    def __init__(self, units: Iterable[Unit], work: Callable[[Unit], Iterator[Message]], n_workers: int, folder: Path):
        self._units = enumerate(units)
        self._waiting = _Waiting(folder)
        self._workers: list[_Worker] = []
        self._work, self._n_workers = work, n_workers

    def __enter__(self) -> "OrderedWorkers[Unit, Message]":
        try:
            with _stop_signals_wait():
                for _ in range(self._n_workers):
                    self._start_worker()
            for _ in range(AHEAD):  # they begin before anyone asks for results
                for worker in self._workers:
                    self._give_next(worker)
        except OSError as error:
            self.__exit__()
            raise RunFailure(f"cannot start {self._n_workers} workers: {error.strerror}; use fewer") from None
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start_worker(self) -> None:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        inherited = [ours, *(worker.connection for worker in self._workers)]
        process = context.Process(target=_run, args=(theirs, inherited, self._work), daemon=True)
        process.start()
        theirs.close()  # or a dead worker's pipe would stay open
        self._workers.append(_Worker(process, ours, deque()))

    def __exit__(self, *_) -> None:
        for worker in self._workers:
            worker.connection.close()
            worker.process.kill()
            worker.process.join()
        self._waiting.close()

    def ready(self) -> bool:
        """Whether iterating would yield something at once, or raise."""
        return any(worker.connection.poll() for worker in self._workers)

    def __iter__(self) -> Iterator[Message]:
        turn, finished = 0, set()
        while busy := {worker.connection: worker for worker in self._workers if worker.units}:
            for connection in wait(list(busy)):
                worker = busy[connection]
                data = self._receive(worker)
                unit, _ = worker.units[0]
                if data:
                    if unit == turn:
                        yield pickle.loads(data)
                    else:
                        self._waiting.put(unit, data)
                    continue
                worker.units.popleft()  # the empty message ends a unit
                self._give_next(worker)
                finished.add(unit)
                while turn in finished:
                    finished.remove(turn)
                    turn += 1
                    yield from self._waiting.take(turn)

    def _give_next(self, worker: "_Worker") -> None:
        if (entry := next(self._units, None)) is not None:
            worker.units.append(entry)
            try:
                worker.connection.send(entry[1])
            except (BrokenPipeError, ConnectionResetError):  # the latter where it left something unread
                raise self._death_of(worker) from None

    def _receive(self, worker: "_Worker") -> bytes:
        """A pickled message, or nothing at the end of a unit."""
        try:
            data = worker.connection.recv_bytes()
        except (EOFError, OSError):  # the latter in the middle of a message
            raise self._death_of(worker) from None
        if data[:1] == b"E":
            raise pickle.loads(data[1:])
        return data[1:]

    def _death_of(self, worker: "_Worker") -> RunFailure:
        worker.process.join(5)
        code, (_, unit) = worker.process.exitcode, worker.units[0]
        how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with code {code}"
        advice = "out of memory? Use fewer workers" if code == -signal.SIGKILL else "run it again"
        return RunFailure(f"worker {worker.process.pid} {how} at {unit}; {advice}. Nothing was written")


@contextlib.contextmanager
def _stop_signals_wait() -> Iterator[None]:
    """A Ctrl-C between a fork and the worker's own handlers would be told by a traceback, or leave a worker."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Worker(NamedTuple):
    process: Any
    connection: Connection
    units: deque  # (number, unit) that it has been given and not finished


def _run(connection: Connection, inherited: list[Connection], work: Callable[[Any], Iterator[Any]]) -> None:
    """A worker's life. It ends when the parent closes the pipe, or dies."""
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears a Ctrl-C as well, and ends the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    for other in inherited:  # ends of pipes that only the parent may hold open
        other.close()
    try:
        while True:
            unit = connection.recv()
            try:
                for message in work(unit):
                    connection.send_bytes(b"M" + pickle.dumps(message, protocol=5))
                connection.send_bytes(b"M")
            except (BrokenPipeError, ConnectionResetError):
                raise
            except UserError as error:
                connection.send_bytes(b"E" + pickle.dumps(error))
            except Exception:  # raised again in the parent, with this traceback
                error = RuntimeError(f"at {unit}:\n{traceback.format_exc()}")
                connection.send_bytes(b"E" + pickle.dumps(error))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)


def _die_with_parent() -> None:
    """At once, where the system offers it; elsewhere the closed pipe is noticed, after a document that may be long."""
    with contextlib.suppress(AttributeError):  # prctl is Linux's
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class _Waiting:
    """Messages of later units, on disk, in anonymous files of some ``SEGMENT_BYTES``, gone as soon as they are read."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._segment: _Segment | None = None  # the one that is written to
        self._places: dict[int, list[tuple[_Segment, int, int]]] = defaultdict(list)

    def put(self, unit: int, data: bytes) -> None:
        if self._segment is None or self._segment.size > SEGMENT_BYTES:
            self._segment = _Segment(tempfile.TemporaryFile(dir=self._folder))
        self._places[unit].append((self._segment, self._segment.size, len(data)))
        self._segment.append(data)

    def take(self, unit: int) -> Iterator[Any]:
        for segment, position, size in self._places.pop(unit, ()):
            yield pickle.loads(segment.read(position, size))
            if segment.unread == 0:
                segment.file.close()
                if segment is self._segment:
                    self._segment = None

    def close(self) -> None:
        with contextlib.suppress(OSError):  # closing flushes, which a full disk refuses
            for places in self._places.values():
                for segment, *_ in places:
                    segment.file.close()


@dataclass
class _Segment:
    file: BinaryIO
    size: int = 0
    unread: int = 0  # messages

    def append(self, data: bytes) -> None:
        self.file.seek(self.size)
        self.file.write(data)
        self.size += len(data)
        self.unread += 1

    def read(self, position: int, size: int) -> bytes:
        self.file.seek(position)
        self.unread -= 1
        return self.file.read(size)
