"""Where the time of a step goes on this rank."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class PartTimer:
    """Adds up seconds by named parts; on a GPU those of its stream, by events that are waited for when read."""

    def __init__(self, device: torch.device):
        self.on_part: Callable[[], None] = lambda: None  # called when a part begins
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._running: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._events: list[torch.cuda.Event] = []  # to be used again

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What runs inside belongs to ``name``."""
        self.on_part()
        if self._on_gpu:
            first, last = self._event(), self._event()
            first.record()
            yield
            last.record()
            self._running.append((name, first, last))
        else:
            started = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - started

    def seconds(self, *names: str) -> dict[str, float]:
        """Of ``names``, or of all parts, since ``clear``; waits for the device to be done with them."""
        left = []
        for name, first, last in self._running:
            if names and name not in names:
                left.append((name, first, last))
                continue
            last.synchronize()
            self._seconds[name] += first.elapsed_time(last) / 1000
            self._events += first, last
        self._running = left
        return {name: self._seconds[name] for name in names or self._seconds}

    def clear(self) -> None:
        """Begin anew; what is still running on the device does not count."""
        self._events += [event for _, *pair in self._running for event in pair]
        self._running.clear()
        self._seconds.clear()

    def _event(self) -> torch.cuda.Event:
        return self._events.pop() if self._events else torch.cuda.Event(enable_timing=True)
