"""What goes wrong on one rank and concerns all: a request to stop, an input that only one rank reads."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from megamtp.errors import UserError
from megamtp.parallel.groups import ProcessGrid

T = TypeVar("T")

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# One Ctrl-C reaches a rank twice: from the terminal, and from torchrun, which passes it on.
SECOND_INTERRUPT_AFTER_S = 3.0
LONG = timedelta(hours=12)  # for ranks that read all of the data


class StopRequest:
    """While entered, the signals no longer kill: they are remembered until the step is done.

    A second SIGINT, some seconds later, interrupts at once.
    """

    def __init__(self):
        self.signal: int | None = None
        self._received_at = 0.0
        self._previous = {}

    def __enter__(self) -> "StopRequest":
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame) -> None:
        if self.signal is None:
            self.signal, self._received_at = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._received_at > SECOND_INTERRUPT_AFTER_S:
            raise KeyboardInterrupt

    def agreed(self, grid: ProcessGrid) -> int | None:
        """The signal that any rank has received, the same answer on all ranks; none while there is none."""
        received = torch.tensor(self.signal or 0, device=grid.device)
        if grid.world_size > 1:
            dist.all_reduce(received, op=dist.ReduceOp.MAX)
        return received.item() or None


@contextmanager
def fail_together(
    grid: ProcessGrid,
    *kinds: type[Exception],
    patience: timedelta | None = None,
    group: dist.ProcessGroup | None = None,
) -> Iterator[None]:
    """Where the body raises one of ``kinds`` (default: ``UserError``) on one rank, all ranks raise the first kind.

    Every rank enters it, and the body holds no collective. Leaving it is a barrier, in ``group`` (default: all ranks'
    own), which waits for ``patience`` instead of the process group's time-out.
    """
    kinds, borrowed = kinds or (UserError,), group
    if patience and grid.world_size > 1:
        group = dist.new_group(backend="gloo", timeout=patience)
    error = None
    try:
        yield
    except kinds as exception:
        error = exception
    messages: list[str | None] = [None] * grid.world_size
    dist.all_gather_object(messages, None if error is None else str(error) or type(error).__name__, group=group)
    if group is not borrowed:
        dist.destroy_process_group(group)
    if error is not None:
        raise error
    for rank, message in enumerate(messages):
        if message is not None:
            raise kinds[0](f"rank {rank}: {message}")


def from_all(grid: ProcessGrid, value: T) -> list[T]:
    """Every rank's ``value``, in their order. Every rank calls it."""
    values: list[T | None] = [None] * grid.world_size
    dist.all_gather_object(values, value)
    return values


def from_main(grid: ProcessGrid, read: Callable[[], T]) -> T:
    """What ``read`` returns on rank 0, on every rank; on a shared file system two ranks may see different things.

    Every rank calls it. A ``UserError`` or ``OSError`` of rank 0 ends all.
    """
    answer = [None]
    with fail_together(grid, UserError, OSError):
        if grid.is_main:
            answer = [read()]
    dist.broadcast_object_list(answer)
    return answer[0]
