"""Fewer points that still show what happened."""

import numpy as np
import pytest

from megamtp.report.thin import bin_means, extremes, smooth


@pytest.mark.parametrize("n", [1, 2, 99, 100, 101, 1234, 50_000])
def test_extremes_keep_ends_and_spikes_in_order(n):
    random = np.random.default_rng(n)
    x, y = np.arange(n) * 2.0, random.normal(size=n)
    spikes = random.integers(n, size=2)
    y[spikes] = 50.0, -50.0
    thin_x, thin_y = extremes(x, y, limit=100)
    assert len(thin_x) <= 100 and (n > 100 or len(thin_x) == n)
    assert (np.diff(thin_x) > 0).all()
    assert thin_x[0] == x[0] and thin_x[-1] == x[-1]
    assert thin_y.max() == y.max() and thin_y.min() == y.min()
    at = dict(zip(x, y, strict=True))
    assert all(at[step] == value for step, value in zip(thin_x, thin_y, strict=True))


def test_extremes_keep_gaps_and_pass_over_single_nans():
    y = np.arange(10_000.0)
    y[::7] = np.nan
    y[4000:6000] = np.nan
    thin_x, thin_y = extremes(np.arange(10_000.0), y, limit=200)
    inside = (thin_x >= 4100) & (thin_x < 5900)
    assert inside.any() and np.isnan(thin_y[inside]).all()
    assert not np.isnan(thin_y[(thin_x > 0) & (thin_x < 3900)]).any()


@pytest.mark.parametrize("n", [5, 64, 65, 1000])
def test_bin_means_keep_the_total_and_still_add_up(n):
    y = np.random.default_rng(n).random((n, 3))
    x, means = bin_means(np.arange(float(n)), y, limit=64)
    assert len(x) == len(means) == min(n, 64)
    sums = [part.sum(0) for part in np.array_split(y, min(n, 64))]
    sizes = [len(part) for part in np.array_split(y, min(n, 64))]
    np.testing.assert_allclose(means * np.array(sizes)[:, None], sums, rtol=1e-12)
    np.testing.assert_allclose(bin_means(np.arange(float(n)), y.sum(1, keepdims=True), 64)[1][:, 0], means.sum(1))


def test_smooth_is_the_mean_of_what_is_known_in_the_window():
    y = np.random.default_rng(0).random(200) * 1e6
    y[[3, 50, 51]] = np.nan
    y[100:120] = np.nan
    half = 4  # 4 % of 200 is 8; 9 is odd
    windows = [y[max(0, i - half) : i + half + 1] for i in range(200)]
    expected = [np.nan if np.isnan(window).all() else np.nanmean(window) for window in windows]
    assert np.isnan(expected).any()
    np.testing.assert_allclose(smooth(y), expected, rtol=1e-9)
