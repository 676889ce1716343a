"""A request to stop, from a signal, that all ranks act on at the same step."""

import signal
import time

import torch
import torch.distributed as dist

from megamtp.parallel.groups import ProcessGrid

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# One Ctrl-C reaches a rank twice: from the terminal, and from torchrun, which passes it on.
SECOND_INTERRUPT_AFTER_S = 3.0


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
