"""TensorBoard's files of a run, which a full disk interrupts, and does not end."""

import sys
from collections.abc import Iterable
from pathlib import Path

RETRY_RECORDS = 100


class Board:
    """Writes scalars into ``folder``. Curves of steps after ``step`` that are there already are no longer shown.

    While its file cannot be written, values are dropped, which is told; after some records it tries a new file.
    """

    def __init__(self, folder: Path, step: int):
        self.folder, self._dropped = folder, 0
        self._writer = self._open(step)

    def write(self, numbers: Iterable[tuple[str, float]], step: int) -> None:
        """(tag, value) pairs of one step."""
        if self._writer is None:
            self._dropped += 1
            if self._dropped % RETRY_RECORDS == 0:
                self._writer = self._open(None)
        if self._writer is None:
            return
        try:
            for tag, number in numbers:
                self._writer.add_scalar(tag, number, step)
        except OSError as error:  # of the thread that writes: what was queued there is lost as well
            self._give_up(error)

    def close(self) -> None:
        if self._writer:
            try:
                self._writer.close()
            except OSError as error:
                self._give_up(error)

    def _open(self, step: int | None):
        # DeepSpeed's TensorBoardMonitor makes its writer without purge_step: where a run resumes, the steps that
        # are done again would be drawn twice.
        from torch.utils.tensorboard import SummaryWriter

        try:
            return SummaryWriter(str(self.folder), purge_step=None if step is None else step + 1)
        except OSError as error:
            self._give_up(error)
            return None

    def _give_up(self, error: OSError) -> None:
        print(f"{self.folder}: cannot write: {error.strerror}; curves have a gap here", file=sys.stderr)
        self._writer = None
