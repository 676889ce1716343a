"""Time and memory of work on a device, or on a CPU to try the code."""

import gc
import time
from collections.abc import Callable
from typing import Any

import torch


class Timing:
    """Of ``device``; each measurement has ``rounds`` runs."""

    def __init__(self, device: torch.device, rounds: int):
        self.device, self.rounds = device, rounds

    def time(self, function: Callable[[], Any], rounds: int | None = None) -> list[float]:
        """Seconds of each of ``rounds`` runs; where the number is not given, after two that do not count."""
        for _ in range(2 if rounds is None else 0):
            function()
        seconds = []
        for _ in range(rounds or self.rounds):
            self.wait()
            started = time.perf_counter()
            function()
            self.wait()
            seconds.append(time.perf_counter() - started)
        return seconds

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def reset_peak(self) -> int:
        """Bytes allocated now."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def peak_gib(self) -> float | None:
        return torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else None

    def free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def spread(seconds: list[float]) -> list[float]:
    """Lowest and highest."""
    return [min(seconds), max(seconds)]
