"""Ranks that keep the others waiting, found by what each does by itself: reading its batch and its forward pass.

The wall time of a step is the same on all ranks, since they wait for each other in the backward pass and the update.
Ranks of one pipeline stage do the same work and are compared with each other; under tensor parallelism and ZeRO-3 the
forward pass waits as well, and a slow rank makes all that it shares a matrix with look slow.
"""

import statistics
from collections import deque
from typing import Any

from megamtp.parallel.groups import ProcessGrid

WINDOW = 20  # steps; a single slow one is no news


class SlowRanks:
    """Takes the ranks' own seconds, step by step. A rank is slow at ``ratio`` times the median of its stage."""

    def __init__(self, grid: ProcessGrid, ratio: float | None):
        self.ratio, self._per_stage = ratio, grid.dp_size * grid.tensor.size  # ranks count these first
        self._ratios: deque[list[float]] = deque(maxlen=WINDOW)
        self._told: set[int] = set()

    def slowest(self, seconds: list[float]) -> dict[str, Any] | None:
        """The rank that is slowest beside its stage's median in this step; None where stages are single ranks."""
        if self._per_stage == 1:
            return None
        medians = [
            statistics.median_low(seconds[start : start + self._per_stage])  # of two, the faster
            for start in range(0, len(seconds), self._per_stage)
            for _ in range(self._per_stage)
        ]
        ratios = [own / median if median else 1.0 for own, median in zip(seconds, medians, strict=True)]
        self._ratios.append(ratios)
        rank = ratios.index(max(ratios))
        return {"rank": rank, "seconds": seconds[rank], "median_seconds": medians[rank]}

    def newly_slow(self) -> dict[int, float]:
        """Ranks that have become slow, and their ratios: medians over the last ``WINDOW`` steps. Each is told once."""
        if not self.ratio or len(self._ratios) < WINDOW:
            return {}
        ratios = {rank: statistics.median(of_rank) for rank, of_rank in enumerate(zip(*self._ratios, strict=True))}
        slow = {rank: ratio for rank, ratio in ratios.items() if ratio > self.ratio}
        new = {rank: ratio for rank, ratio in slow.items() if rank not in self._told}
        self._told = set(slow)
        return new
