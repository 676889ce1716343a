"""What a run writes about itself: ``metrics.jsonl``, TensorBoard files, the progress bar's line."""

import json
import math
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megamtp.parallel.groups import ProcessGrid

# Dense bf16 peak of one device, TFLOP/s, from NVIDIA's data sheets (SXM parts).
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "B200": 2250.0, "L40S": 362.0}


class HeadMetrics(NamedTuple):
    """Per-head means over all ranks, head 1 first: nats per valid target, and the share of top-1 hits."""

    losses: list[float]
    accuracies: list[float]
    targets: int  # valid targets of head 1


def reduce_heads(sums: Tensor, counts: Tensor, correct: Tensor, grid: ProcessGrid) -> HeadMetrics:
    """Sum (n,) each over all ranks, then divide: a true mean, whatever the masking on each rank.

    A head without a single valid target gets NaN.
    """
    totals = grid.sum_over_ranks(torch.stack([sums.double(), counts.double(), correct.double()])).cpu()
    losses, accuracies = (totals[0] / totals[1]).tolist(), (totals[2] / totals[1]).tolist()
    return HeadMetrics(losses, accuracies, int(totals[1, 0]))


def peak_tflops(device: torch.device) -> float | None:
    """Peak of a GPU that the table knows by name; none for others and for CPUs."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_TFLOPS.items() if known in name), None)


def peak_memory_gib(device: torch.device) -> float:
    """Peak of allocated device memory, or of this process's resident memory on a CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class MetricsWriter:
    """Appends one JSON line a record, flushed at once, and mirrors numbers to TensorBoard.

    Opening it for a run that goes on from ``step`` drops the lines of later steps, which the resumed run will
    write again, and a last line that a crash has torn.
    """

    def __init__(self, run_dir: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.path = run_dir / "metrics.jsonl"
        kept = _lines_up_to(self.path, step) if self.path.exists() else []
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(self.path)
        self._file = open(self.path, "a", buffering=1)
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, record: dict[str, Any]) -> None:
        """``record["step"]`` is the step that is done; lists become one TensorBoard curve an entry, head 1 first."""
        self._file.write(json.dumps(_strict(record), allow_nan=False) + "\n")
        for tag, number in _scalars("", {key: value for key, value in record.items() if key != "step"}):
            self._board.add_scalar(tag, number, record["step"])

    def event(self, step: int, name: str, **values: Any) -> None:
        """Something that has happened after ``step``; a line of its own, not in TensorBoard."""
        record = {"step": step, "time": time.time(), "event": name, **values}
        self._file.write(json.dumps(_strict(record), allow_nan=False) + "\n")

    def close(self) -> None:
        self._file.close()
        self._board.close()


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


def _lines_up_to(path: Path, step: int) -> list[str]:
    lines = path.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    return [line for line in lines if json.loads(line)["step"] <= step]
