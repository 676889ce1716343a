"""One order of samples from several sources, in shares that may change at given samples (stages).

Within a stage, for every source i with share w_i and after every N samples of the stage, the number of samples taken
from it is strictly within one of N * w_i. The j-th sample of a source is a unit job with release floor(j / w_i) and
deadline ceil((j + 1) / w_i); the released job with the earliest deadline goes first (Pfair scheduling: Baruah et al.
1996, "Proportionate Progress"; the bound for any number of sources: Tijdeman 1980, "The chairman assignment problem").
Shares are exact integers, ties go to the first source: the order is the same on every machine and after every restart.

Each source keeps its own count over all stages, so that it goes on in its own epochs where it stopped.
"""

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from megamtp.data.packing import PackedSamples
from megamtp.data.samples import Samples
from megamtp.errors import UserError


class Stage(NamedTuple):
    """From sample ``first`` on source i has share weights[i] / sum(weights): integers, without common divisor."""

    first: int
    weights: tuple[int, ...]


class Blend:
    """``sources`` mixed by ``stages``: (from_sample, weights), the first from 0, in rising order.

    Raises ``UserError`` for stages that are none, and ``ValueError`` for sources of different shapes.
    """

    def __init__(
        self, sources: Sequence[Samples | PackedSamples], stages: Sequence[tuple[int, Sequence[float]]]
    ) -> None:
        self.sources = list(sources)
        shapes = {(source.seq_len, source.n_future_tokens) for source in self.sources}
        if len(shapes) != 1:
            raise ValueError(f"sources of one (seq_len, n_future_tokens) are needed, not {sorted(shapes)}")
        self.seq_len, self.n_future_tokens = shapes.pop()
        self.stages = [Stage(first, _exact(weights, len(self.sources), first)) for first, weights in stages]
        firsts = [stage.first for stage in self.stages]
        if firsts[:1] != [0] or sorted(set(firsts)) != firsts:
            raise UserError(f"data stages begin at samples {firsts}; the first must begin at 0, the others must rise")

    def cursor(self, state: dict[str, Any] | None = None) -> "Cursor":
        """A place in the order: the start, or exactly after ``state`` (of ``Cursor.state_dict``).

        Stages from the present on may differ from those of the state, and sources may have been added at the end of
        the list. Raises ``UserError`` when the past would change.
        """
        return Cursor(self, state)

    def fetch(self, source: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Samples by source (b,) and index in it (b,): tokens (b, s + n) int64, document ids (b, s + n) int32."""
        wanted = np.unique(source)
        if len(wanted) == 1:
            return self.sources[wanted[0]].batch(index)
        shape = (len(source), self.seq_len + self.n_future_tokens)
        tokens, ids = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int32)
        for i in wanted:
            rows = source == i
            tokens[rows], ids[rows] = self.sources[i].batch(index[rows])
        return tokens, ids

    def epochs(self, consumed_per_source: Sequence[int]) -> list[float]:
        """Passes over each source so far."""
        return [
            consumed / source.samples_per_epoch
            for consumed, source in zip(consumed_per_source, self.sources, strict=True)
        ]

    def identity(self) -> list[dict[str, Any]]:
        """What fixes the samples of each source: part of a checkpoint."""
        return [source.identity() for source in self.sources]


class Cursor:
    """How far a blend is consumed. ``consumed`` counts all samples, ``consumed_per_source`` those of each source."""

    def __init__(self, blend: Blend, state: dict[str, Any] | None = None) -> None:
        self.blend = blend
        self.consumed = 0
        self.consumed_per_source = [0] * len(blend.sources)
        self._stage = 0  # of the last sample taken: the next stage is entered with its first sample
        self._schedule = _Schedule(blend.stages[0].weights)
        if state is not None:
            self._restore(state)

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The next ``count`` samples: source (count,) int32, and index in the source (count,) int64."""
        source = np.empty(count, dtype=np.int32)
        index = np.empty(count, dtype=np.int64)
        stages, done = self.blend.stages, 0
        while done < count:
            if self._stage + 1 < len(stages) and stages[self._stage + 1].first == self.consumed:
                self._stage += 1
                self._schedule = _Schedule(stages[self._stage].weights)
            part = count - done
            if self._stage + 1 < len(stages):
                part = min(part, stages[self._stage + 1].first - self.consumed)
            picked = self._schedule.next(part)
            source[done : done + part] = picked
            for i in np.unique(picked).tolist():
                places = done + np.flatnonzero(picked == i)
                begin = self.consumed_per_source[i]
                index[places] = np.arange(begin, begin + len(places))
                self.consumed_per_source[i] = begin + len(places)
            self.consumed += part
            done += part
        return source, index

    def state_dict(self) -> dict[str, Any]:
        """Plain values to continue from, on every rank the same."""
        return {
            "consumed_samples": self.consumed,
            "consumed_per_source": list(self.consumed_per_source),
            "stage_counts": list(self._schedule.counts),
            "stages": [[stage.first, list(stage.weights)] for stage in self.blend.stages[: self._stage + 1]],
        }

    def _restore(self, state: dict[str, Any]) -> None:
        consumed, added = state["consumed_samples"], len(self.blend.sources) - len(state["consumed_per_source"])
        if added < 0:
            raise UserError(
                f"the checkpoint was made with {len(state['consumed_per_source'])} data sources, now there are "
                f"{len(self.blend.sources)}; keep a source that is no longer wanted and give it weight 0 from "
                f"sample {consumed} on"
            )
        new = [0] * added
        past = [Stage(first, (*weights, *new)) for first, weights in state["stages"]]
        ours = [stage for stage in self.blend.stages if stage.first < max(consumed, 1)]
        if consumed and past != ours:
            raise UserError(
                f"the data stages before sample {consumed} differ from those of the checkpoint, "
                f"{_shares(past)} and now {_shares(ours)}; leave them, and add a stage that begins at sample {consumed}"
            )
        self.consumed = consumed
        self.consumed_per_source = [*state["consumed_per_source"], *new]
        self._stage = len(ours) - 1
        self._schedule = _Schedule(ours[-1].weights, [*state["stage_counts"], *new])


class _Schedule:
    """The order of the sources in one stage, after ``counts`` samples of each."""

    def __init__(self, weights: tuple[int, ...], counts: Sequence[int] | None = None) -> None:
        self.counts = list(counts) if counts is not None else [0] * len(weights)
        self._weights = weights
        self._total = sum(weights)
        self._only = weights.index(self._total) if self._total in weights else None  # then there is nothing to mix
        # Each source waits with its next job: by release in `waiting`, once released by deadline in `ready`.
        self._ready: list[tuple[int, int]] = []
        self._waiting = [(self._release(i), i) for i, weight in enumerate(weights) if weight]
        heapq.heapify(self._waiting)

    def next(self, count: int) -> np.ndarray:
        """The sources of the next ``count`` samples, (count,) int32."""
        if self._only is not None:
            self.counts[self._only] += count
            return np.full(count, self._only, dtype=np.int32)
        picked = np.empty(count, dtype=np.int32)
        now = sum(self.counts)
        for place in range(count):
            while self._waiting and self._waiting[0][0] <= now + place:
                _, i = heapq.heappop(self._waiting)
                heapq.heappush(self._ready, (self._deadline(i), i))
            _, i = heapq.heappop(self._ready)
            picked[place] = i
            self.counts[i] += 1
            heapq.heappush(self._waiting, (self._release(i), i))
        return picked

    def _release(self, i: int) -> int:
        return self.counts[i] * self._total // self._weights[i]

    def _deadline(self, i: int) -> int:
        return -(-(self.counts[i] + 1) * self._total // self._weights[i])


def _exact(weights: Sequence[float], n_sources: int, first: int) -> tuple[int, ...]:
    """Integers in the ratio of ``weights`` as they are written (0.1 is a tenth), without common divisor."""
    try:
        fractions = [Fraction(str(weight)) for weight in weights]
    except ValueError:  # nan, inf
        fractions = []
    if len(fractions) != n_sources or min(fractions) < 0 or not any(fractions):
        raise UserError(
            f"data weights {list(weights)} from sample {first} on: give {n_sources} numbers, one for each source, "
            "none negative and not all 0"
        )
    denominator = math.lcm(*(fraction.denominator for fraction in fractions))
    integers = [int(fraction * denominator) for fraction in fractions]
    divisor = math.gcd(*integers)
    return tuple(integer // divisor for integer in integers)


def _shares(stages: list[Stage]) -> str:
    return ", ".join(f"from {stage.first}: {':'.join(map(str, stage.weights))}" for stage in stages)
