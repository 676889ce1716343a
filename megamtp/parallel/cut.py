"""Cutting a list of layer costs into contiguous, non-empty stages so that the slowest rank is as fast as possible.

A cut is a list of boundaries: stage i holds the layers ``boundaries[i] : boundaries[i + 1]``. The optimum is exact,
by dynamic programming, up to rounding (costs are added in float64). Among the cuts with the fastest slowest rank it
is one with the smallest sum of squares of the stages' costs, the most even one.
"""

from collections.abc import Sequence

import numpy as np

ROUNDING = 1e-12  # of the total: costs that differ by less are a tie


def cut_stages(costs: Sequence[float], n_stages: int) -> list[int]:
    """The n_stages + 1 boundaries whose slowest stage is fastest.

    Raises ``ValueError`` for more stages than layers, and for costs that are negative or not finite.
    """
    segment, squares = _segments(costs, n_stages)
    n_layers = len(costs)

    # slowest[j]: of the best cut of the first j layers into the stages so far.
    slowest = segment[0]
    for _ in range(n_stages - 1):
        slowest = np.maximum(slowest[:, None], segment).min(0)
    squares[segment > slowest[n_layers] + ROUNDING * segment[0, -1]] = np.inf

    sums, choices = squares[0], []
    for _ in range(n_stages - 1):
        candidates = sums[:, None] + squares
        choices.append(candidates.argmin(0))
        sums = candidates.min(0)
    boundaries = [n_layers]
    for choice in reversed(choices):
        boundaries.append(int(choice[boundaries[-1]]))
    return [0, *reversed(boundaries)]


def cut_stage_pairs(costs: Sequence[float], n_ranks: int) -> list[int]:
    """The 2 n_ranks + 1 boundaries whose slowest rank is fastest, rank r holding stages r and 2 n_ranks - 1 - r.

    Raises ``ValueError`` for more stages than layers, and for costs that are negative or not finite.
    """
    segment, squares = _segments(costs, 2 * n_ranks)
    n_layers, tolerance = len(costs), ROUNDING * segment[0, -1]

    # From the outermost pair of stages inwards; the layers a : b are what the ranks so far have left.
    slowest = np.full(segment.shape, np.inf)
    slowest[0, n_layers] = 0
    for _ in range(n_ranks - 1):
        slowest, _ = _add_pair(slowest, segment, np.maximum)
    # The innermost rank holds two stages that meet: all of a : b, at least two layers.
    inner = np.where(_at_least(2, segment.shape), segment, np.inf)
    limit = np.maximum(slowest, inner).min() + tolerance

    sums = np.full(segment.shape, np.inf)
    sums[0, n_layers] = 0
    choices = []
    for _ in range(n_ranks - 1):
        sums, choice = _add_pair(sums, squares, np.add, segment, limit)
        choices.append(choice)
    middles = squares[:, :, None] + squares[None]  # (a, middle, b)
    sums = sums + np.where(inner <= limit, middles.min(1), np.inf)
    a, b = (int(i) for i in np.unravel_index(sums.argmin(), sums.shape))
    boundaries = [a, int(middles[a, :, b].argmin()), b]
    for choice in reversed(choices):
        a, b = (int(i) for i in choice[a, b])
        boundaries = [a, *boundaries, b]
    return boundaries


def stages_of_ranks(n_ranks: int, dualpipev: bool) -> list[tuple[int, ...]]:
    """The stages that each pipeline rank holds: its own one, or under DualPipeV r and 2 n_ranks - 1 - r."""
    return [(r, 2 * n_ranks - 1 - r) if dualpipev else (r,) for r in range(n_ranks)]


def rank_costs(costs: Sequence[float], boundaries: Sequence[int], dualpipev: bool) -> list[float]:
    """What each pipeline rank holds of the costs, in the order of the ranks."""
    stages = [sum(costs[begin:end]) for begin, end in zip(boundaries, boundaries[1:], strict=False)]
    n_ranks = len(stages) // 2 if dualpipev else len(stages)
    return [sum(stages[i] for i in held) for held in stages_of_ranks(n_ranks, dualpipev)]


def _segments(costs: Sequence[float], n_stages: int) -> tuple[np.ndarray, np.ndarray]:
    """(cost, its square) of the layers i : j, each (n + 1, n + 1); infinite where that is no stage."""
    if not 1 <= n_stages <= len(costs):
        raise ValueError(f"{len(costs)} layers cannot be cut into {n_stages} stages of at least one layer each")
    costs = np.asarray(costs, dtype=np.float64)
    if not np.isfinite(costs).all() or (costs < 0).any():
        raise ValueError(f"costs must be finite and not negative, got {costs.tolist()}")
    prefix = np.concatenate([[0.0], np.cumsum(costs)])
    difference = prefix - prefix[:, None]
    segment = np.where(_at_least(1, difference.shape), difference, np.inf)
    return segment, segment**2


def _at_least(n: int, shape: tuple[int, int]) -> np.ndarray:
    """True where the layers i : j are n or more."""
    return np.triu(np.ones(shape, dtype=bool), n)


def _add_pair(best, cost, combine, segment=None, limit=np.inf) -> tuple[np.ndarray, np.ndarray]:
    """Give the next rank the layers a : a' and b' : b of what is left, for every a', b': (best, the best a, b)."""
    n = len(best)
    result, choice = np.full((n, n), np.inf), np.zeros((n, n, 2), dtype=int)
    for a in range(1, n):
        for b in range(a, n - 1):
            candidates = combine(best[:a, b + 1 :], cost[:a, a, None] + cost[b, b + 1 :])
            if segment is not None:
                candidates[segment[:a, a, None] + segment[b, b + 1 :] > limit] = np.inf
            index = candidates.argmin()
            result[a, b] = candidates.flat[index]
            row, column = divmod(int(index), candidates.shape[1])
            choice[a, b] = row, b + 1 + column
    return result, choice
