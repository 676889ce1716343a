"""What a run writes about itself: ``metrics.jsonl``, and the same numbers to TensorBoard and Weights & Biases."""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from megamtp.config import config_dataclass, option
from megamtp.engine.monitor import WandbRun
from megamtp.parallel.groups import ProcessGrid
from megamtp.training.board import Board


@config_dataclass
class MonitorConfig:
    """Where the numbers go beside ``metrics.jsonl``, and what is told of them."""

    tensorboard: bool = option(True, "files in the run's folder")
    wandb: bool = option(False, "Weights & Biases, which has to be installed")
    wandb_project: str = option("megamtp", "its project")
    slow_rank_ratio: Annotated[float, Field(gt=1)] | None = option(
        1.3,
        "tell of a rank whose reading and forward pass take that many times the median of its stage over 20 steps; "
        "null = never",
    )
    wandb_group: str | None = option(None, "of the run and its restarts; null = the name of the run's folder")


class HeadMetrics(NamedTuple):
    """Per-head means over all ranks, head 1 first: nats per valid target, and the share of top-1 hits."""

    losses: list[float]
    accuracies: list[float]
    targets: int  # valid targets of head 1


def reduce_heads(sums: Tensor, counts: Tensor, correct: Tensor, grid: ProcessGrid) -> HeadMetrics:
    """Sum (n,) each over all ranks, then divide: a true mean, whatever the masking on each rank.

    A head without a single valid target gets NaN.
    """
    return reduce_step(sums, counts, correct, 0.0, grid)[0]


def reduce_step(
    sums: Tensor, counts: Tensor, correct: Tensor, own_seconds: float, grid: ProcessGrid
) -> tuple[HeadMetrics, list[float]]:
    """``reduce_heads``, and in the same message every rank's ``own_seconds``, in the order of the ranks."""
    seconds = torch.zeros(grid.world_size, dtype=torch.float64)
    seconds[grid.rank] = own_seconds
    heads = torch.stack([sums.double(), counts.double(), correct.double()])
    message = torch.cat([heads.flatten(), seconds.to(heads.device)])
    totals, seconds = grid.sum_over_ranks(message).cpu().split([heads.numel(), grid.world_size])
    totals = totals.view_as(heads)
    losses, accuracies = (totals[0] / totals[1]).tolist(), (totals[2] / totals[1]).tolist()
    return HeadMetrics(losses, accuracies, int(totals[1, 0])), seconds.tolist()


def peak_memory(device: torch.device) -> int:
    """Bytes, the peak of allocated device memory, or of this process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class MetricsWriter:
    """Appends one JSON line a record, flushed at once, and mirrors numbers to what ``monitor`` asks for.

    Opening it for a run that goes on from ``step`` drops the lines of later steps, which the resumed run will
    write again, and a last line that a crash has torn. Raises ``UserError`` where wandb is asked for and missing.
    """

    def __init__(self, run_dir: Path, step: int, monitor: MonitorConfig | None = None):
        monitor = monitor or MonitorConfig()
        # First: it may be missing, and nothing is to be dropped by a start that fails.
        self._wandb = WandbRun(monitor.wandb_project, _group(run_dir, monitor)) if monitor.wandb else None
        self.path = run_dir / "metrics.jsonl"
        self._unwritten = b""
        self._file = self._open_file(step)
        self._board = self._open_board(step) if monitor.tensorboard else None

    def write(self, record: dict[str, Any]) -> None:
        """``record["step"]`` is the step that is done; lists become one curve an entry, head 1 first."""
        self._append(record)
        step = record["step"]
        numbers = list(_scalars("", {key: value for key, value in record.items() if key not in ("step", "time")}))
        if self._board:
            self._board.write(numbers, step)
        if self._wandb:
            self._wandb.write(numbers, step)

    def event(self, step: int, name: str, **values: Any) -> None:
        """Append the line of something that happened at ``step``; it is no curve.

        "rolled_back", which gives ``to_step``, drops the lines and curves of the steps that are done again.
        """
        if name == "rolled_back":
            self._file.close()
            self._file = self._open_file(values["to_step"])
            if self._board:
                self._board.close()
                self._board = self._open_board(values["to_step"])
        self._append(_event(step, name, values))

    def close(self) -> None:
        self._file.close()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.close()

    def _open_board(self, step: int) -> Board:
        return Board(self.path.parent / "tensorboard", step)

    def _open_file(self, step: int) -> BinaryIO:
        kept = _lines_up_to(self.path, step) if self.path.exists() else []
        temporary = self.path.with_suffix(".tmp")
        temporary.write_bytes(b"".join(kept))
        temporary.replace(self.path)
        return open(self.path, "ab", buffering=0)

    def _append(self, record: dict[str, Any]) -> None:
        """A line that finds no room on the disk waits for the next, and leaves no half of it behind."""
        self._unwritten += _line(record)
        size = os.fstat(self._file.fileno()).st_size
        try:
            written = self._file.write(self._unwritten)
        except OSError as error:
            print(f"{self.path}: cannot write: {error.strerror}; its lines wait in memory", file=sys.stderr)
            written = 0
        if written == len(self._unwritten):
            self._unwritten = b""
        else:
            os.truncate(self.path, size)


def append_event(run_dir: Path, step: int, name: str, **values: Any) -> None:
    """One event's line, by a rank that does not hold the file open: the main rank may be what hangs."""
    with open(run_dir / "metrics.jsonl", "ab", buffering=0) as file:
        file.write(_line(_event(step, name, values)))


def _event(step: int, name: str, values: dict[str, Any]) -> dict[str, Any]:
    return {"step": step, "time": time.time(), "event": name, **values}


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(_strict(record), allow_nan=False).encode() + b"\n"


def _group(run_dir: Path, monitor: MonitorConfig) -> str:
    return monitor.wandb_group or run_dir.resolve().name


def _scalars(tag: str, value: Any) -> Iterator[tuple[str, float]]:
    """The numbers in nested values, by names like ``validation_sets/code/losses/head_1``."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _scalars(f"{tag}/{key}" if tag else key, item)
    elif isinstance(value, list):
        for index, item in enumerate(value, start=1):
            yield from _scalars(f"{tag}/head_{index}", item)
    elif isinstance(value, int | float):
        yield tag, value


def _strict(value: Any) -> Any:
    """NaN and infinity, which JSON lacks, become null."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines_up_to(path: Path, step: int) -> list[bytes]:
    """All but lines of later steps and a torn one; what has happened in these steps has happened, and stays."""
    lines = path.read_bytes().splitlines(keepends=True)
    return [line for line in lines if line.endswith(b"\n") and (_step(line) <= step or b'"event": ' in line)]


def _step(line: bytes) -> float:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int) else -math.inf  # no record of ours stays
