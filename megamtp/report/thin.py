"""Fewer points than steps, so that a long run's page opens as fast as a short one's."""

import numpy as np

from megamtp.evaluation.loss_curves import running_mean

MOST_POINTS = 2000


def extremes(x: np.ndarray, y: np.ndarray, limit: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most ``limit`` points of (x, y) (T,): the first, the last, and the least and the greatest y of equal bins."""
    if len(x) <= limit:
        return x, y
    kept = {0, len(x) - 1}
    for places in np.array_split(np.arange(len(x)), (limit - 2) // 2):
        values = y[places]
        # A bin without a number keeps its gap.
        kept |= {places[0]} if np.isnan(values).all() else {places[np.nanargmin(values)], places[np.nanargmax(values)]}
    chosen = np.array(sorted(kept))
    return x[chosen], y[chosen]


def bin_means(x: np.ndarray, y: np.ndarray, limit: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """(x (T,), y (T, n)) as means over ``limit`` equal bins: unlike extremes, these still add up when stacked."""
    if len(x) <= limit:
        return x, y
    starts = np.array([places[0] for places in np.array_split(np.arange(len(x)), limit)])
    counts = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts[:, None]


def window_of(n: int) -> int:
    """An odd number of entries, 4 % of ``n``."""
    return n // 50 * 2 + 1


def smooth(y: np.ndarray) -> np.ndarray:
    """Centred mean of (T,) over ``window_of(T)`` entries; NaNs do not count, and stay where nothing else is."""
    window, known = window_of(len(y)), np.isfinite(y)
    share = running_mean(known.astype(float), window)
    with np.errstate(invalid="ignore", divide="ignore"):
        # Sums by convolution leave rounding where there is nothing.
        return np.where(share > 0.5 / window, running_mean(np.where(known, y, 0.0), window) / share, np.nan)
