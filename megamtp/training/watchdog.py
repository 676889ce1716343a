"""A run that stands still: the rank that hangs is named, all ranks dump their stacks, and the run ends by itself.

PyTorch's own time-outs name the operation that waits, not the rank that it waits for. Here a thread of each rank
writes a file with its place in the run, again and again. Once nothing has moved for ``timeout``, the lowest rank that
is alive reads all of them. It is files, not messages: every channel that the ranks share may be what hangs.
"""

import faulthandler
import json
import linecache
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from megamtp.errors import UserError
from megamtp.parallel.groups import ProcessGrid
from megamtp.training.faults import LONG
from megamtp.training.metrics import append_event
from megamtp.training.saver import SAVER_THREAD

EXIT_HANG = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong with the input, starting again may do
TICKS = 40  # of a time-out
FIRST_LOOK = 30  # tick of a standstill at which beats are remembered; file systems may show them late by up to a minute
LAST_WAIT = 50  # tick at which a rank stops waiting for a lower one to judge
BEAT_BYTES = 1024
FIRST_PATIENCE = 2  # time-outs that a part may take when it is new: kernels are compiled, connections made
SAVE_PATIENCE = 10  # that a save may take, or going back to one: a slow file system is no hang
STATES = {"T": "stopped by a signal", "t": "stopped by a debugger", "D": "waits for a disk or file system", "Z": "dead"}


class Beat(NamedTuple):
    """What a rank writes of itself, anew at every tick."""

    beat: int
    marks: int  # passed so far; all ranks pass the same
    step: int
    part: str
    still: float  # ticks since it last moved; of ``TICKS``, where its patience ends
    waits: bool  # its main thread waits for other ranks
    where: str  # innermost Python frame of its main thread
    host: str
    pid: int


class Watchdog:
    """Watches while entered, from the first mark on. Every rank has one; ``timeout`` in seconds, None watches nothing.

    Made before ranks meet, entered after. Raises ``UserError`` where the run's folder cannot be written.

    Time is counted in ticks of a sleeping thread, so that a process that was suspended, and its neighbours with it,
    does not find itself hanging when it goes on.
    """

    def __init__(self, run_dir: Path, grid: ProcessGrid, timeout: float | None):
        self.run_dir, self.folder, self.grid, self.timeout = run_dir, run_dir / "watchdog", grid, timeout
        self._step, self._part, self._patience, self._marks, self._moves = 0, "start", 1, 0, 0
        self._parts: set[str] = set()
        self._armed = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watchdog")
        self._host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        if timeout:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                message = f"{run_dir}: cannot write here: {error.strerror}; choose another run_dir"
                raise UserError(message) from None
            if grid.is_main:
                self._verdict.unlink(missing_ok=True)
            _keep_stacks(self.stacks(grid.rank))

    def __enter__(self) -> "Watchdog":
        if self.timeout:
            self._stacks = open(self.stacks(self.grid.rank), "w")
            self._main = threading.get_ident()
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        if self.timeout:
            self._ended.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
            is_empty = os.fstat(self._stacks.fileno()).st_size == 0
            self._stacks.close()
            if is_empty:
                self.stacks(self.grid.rank).unlink(missing_ok=True)

    @property
    def longest(self) -> timedelta:
        """For which ranks may wait for each other: the watchdog comes first, where it watches."""
        return timedelta(seconds=1.5 * SAVE_PATIENCE * self.timeout) if self.timeout else LONG

    def mark(self, step: int, part: str, patience: int = 1) -> None:
        """This rank begins ``part`` of the step after ``step``, which may take ``patience`` time-outs.

        All ranks pass the same marks in the same order.
        """
        self._step, self._part, self._marks = step, part, self._marks + 1
        self._patience = patience if part in self._parts else max(patience, FIRST_PATIENCE)
        self._parts.add(part)
        self._armed = 0.0
        self.moved()

    def moved(self) -> None:
        """Something has got done inside a part that may take long."""
        self._moves += 1
        if self.timeout and time.monotonic() - self._armed > self.timeout / TICKS:
            self._armed = time.monotonic()
            # By a thread that is not Python's: it also sees a main thread that holds the interpreter's lock.
            faulthandler.dump_traceback_later(self._limit * FIRST_LOOK / TICKS, file=self._stacks)

    def stacks(self, rank: int | str) -> Path:
        """Where ``rank`` dumps the stacks of its threads."""
        return self.folder / f"rank-{rank}.stacks"

    @property
    def _limit(self) -> float:
        return self.timeout * self._patience

    @property
    def _verdict(self) -> Path:
        return self.folder / "verdict"

    def _run(self) -> None:
        beat, seen, still, first = 0, -1, 0.0, None
        while not self._ended.wait(self.timeout / TICKS):
            beat += 1
            still = still + 1 / self._patience if seen == self._moves and seen > 0 else 0.0
            seen = self._moves
            self._write(beat, still)
            if still < FIRST_LOOK:
                first = None
            elif self._verdict.exists():
                os._exit(EXIT_HANG)
            elif first is None:
                first = self._read()
            elif still >= TICKS:
                now = self._read()
                alive = [
                    rank for rank, was in enumerate(first) if now[rank] and (not was or now[rank].beat != was.beat)
                ]
                if any(now[rank].still < TICKS - 3 for rank in alive):  # is busy, or may take longer, as in a save
                    continue
                if self.grid.rank == min(alive, default=self.grid.rank) or still >= LAST_WAIT:
                    self._judge(now, [rank for rank in range(len(now)) if rank not in alive])

    def _judge(self, beats: list[Beat | None], silent: list[int]) -> None:
        """Tell who hangs, and end. The others see the verdict, and end with the same code."""
        hanging = find_hanging(beats, silent)
        told = describe(beats, hanging, silent, self._limit, self._host)
        told.append(f"hang: the stacks of each rank's threads are in {self.stacks('*')}")
        print("", *told, sep="\n", file=sys.stderr, flush=True)  # the progress bar has not ended its line
        hosts = sorted({beats[rank].host for rank in hanging if beats[rank]})
        try:
            self._verdict.touch()
            append_event(
                self.run_dir, self._step, "hang", ranks=hanging, hosts=hosts, part=self._part, seconds=self._limit
            )
            time.sleep(3 * self.timeout / TICKS)
        except OSError as error:
            print(f"hang: {error}", file=sys.stderr, flush=True)
        os._exit(EXIT_HANG)

    def _write(self, beat: int, still: float) -> None:
        where, waits = _place(self._main)
        ours = Beat(beat, self._marks, self._step, self._part, round(still, 1), waits, where, self._host, os.getpid())
        try:
            _write_beat(self._path(self.grid.rank), ours)
        except OSError as error:
            if beat % TICKS == 1:
                print(f"watchdog: {error}; the other ranks do not see this one's place in the run", file=sys.stderr)

    def _read(self) -> list[Beat | None]:
        return [_read_beat(self._path(rank)) for rank in range(self.grid.world_size)]

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.json"


def _place(main: int) -> tuple[str, bool]:
    """Where the main thread is, or the saver's that it waits for, and whether that waits for other ranks."""
    frames = sys._current_frames()
    frame, saver = frames[main], next((thread for thread in threading.enumerate() if thread.name == SAVER_THREAD), None)
    if saver and any(module == "megamtp.training.saver" for module in _modules(frame)):
        frame = frames.get(saver.ident, frame)
    path, line = frame.f_code.co_filename, frame.f_lineno
    # A handle's wait is C, and leaves no frame.
    waits = ".wait(" in linecache.getline(path, line) or any(m.startswith("torch.distributed") for m in _modules(frame))
    return f"{path}:{line} {frame.f_code.co_name}", waits


def _modules(frame: FrameType | None) -> Iterator[str]:
    while frame:
        yield frame.f_globals.get("__name__", "")
        frame = frame.f_back


def _keep_stacks(path: Path) -> None:
    """What an earlier start has dumped gets a name of its own, with the time of it."""
    if path.exists() and path.stat().st_size:
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
        path.rename(path.with_suffix(f".{stamp}.stacks"))


def _write_beat(path: Path, beat: Beat) -> None:
    """In place, not renamed over: network file systems ask for contents when a file is opened, but for names rarely.

    One write that is never shorter, so that a reader at the same moment does not meet half of it.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, json.dumps(beat._asdict()).encode().ljust(BEAT_BYTES))
    finally:
        os.close(descriptor)


def _read_beat(path: Path) -> Beat | None:
    try:
        return Beat(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):  # not there, or half written: no sign of life at this moment
        return None


def find_hanging(beats: list[Beat | None], silent: list[int]) -> list[int]:
    """The ranks that the others wait for, ascending; none where that cannot be told.

    They give no sign of life; or have passed fewer marks than others; or do not wait for others while most do.
    """
    if silent:
        return silent
    marks = [beat.marks for beat in beats]
    if min(marks) < max(marks):
        return [rank for rank, passed in enumerate(marks) if passed == min(marks)]
    outside = [rank for rank, beat in enumerate(beats) if not beat.waits]
    return outside if len(outside) <= len(beats) / 2 or len(beats) == 1 else []


def describe(beats: list[Beat | None], hanging: list[int], silent: list[int], timeout: float, host: str) -> list[str]:
    """What is told, a line each; ``host``: this rank's own, where the state of a process can be seen."""
    lines = []
    for rank in hanging:
        beat = beats[rank]
        if beat is None:
            lines.append(f"hang: rank {rank} has given no sign of life since the start")
            continue
        what, since = ("no sign of life", " last seen") if rank in silent else ("it stands still", "")
        state = _process_state(beat.pid) if beat.host == host else None
        lines.append(
            f"hang: rank {rank} on {beat.host} (process {beat.pid}): {what} for {timeout:.0f} s,{since} "
            f"in {beat.part} after step {beat.step}, {beat.where}" + (f"; the process is {state}" if state else "")
        )
    if not hanging:
        lines.append(
            f"hang: all {len(beats)} ranks stand still for {timeout:.0f} s, which one is to blame is not known"
        )
    others = Counter(
        f"in {beat.part} after step {beat.step}, {beat.where}"
        for rank, beat in enumerate(beats)
        if beat and rank not in hanging
    )
    n = len(beats)
    return lines + [f"hang: waiting, {count} of {n} ranks: {place}" for place, count in others.most_common(5)]


def _process_state(pid: int) -> str | None:
    """What keeps a process of this machine from running; None where nothing does, or nothing can be known."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "gone" if Path("/proc/self").exists() else None
    return STATES.get(letter)
