import math

import pytest

from megamtp.training.schedule import ScheduleConfig, learning_rate


def rates(config: ScheduleConfig, total: int, peak: float = 2.0) -> list[float]:
    return [learning_rate(step, total, peak, config) for step in range(total)]


def test_warm_up_rises_in_equal_parts_to_the_peak():
    assert rates(ScheduleConfig(warmup_steps=4), 20)[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0], rel=1e-12)


def test_the_cosine_ends_at_the_final_ratio_in_the_last_step():
    curve = rates(ScheduleConfig(warmup_steps=4, final_ratio=0.1), 20)
    assert curve[-1] == pytest.approx(0.2, rel=1e-12)
    # Half of the cosine's 16 steps: the mean of peak and end.
    assert curve[4 + 8 - 1] == pytest.approx(1.1, rel=1e-12)
    # A quarter: cos(pi / 4) of the way from the middle to the peak.
    assert curve[4 + 4 - 1] == pytest.approx(1.1 + 0.9 * math.sqrt(0.5), rel=1e-12)


def test_it_rises_then_falls_and_stays_between_end_and_peak():
    curve = rates(ScheduleConfig(warmup_steps=7, final_ratio=0.03), 50)
    assert all(a < b for a, b in zip(curve[:6], curve[1:7], strict=True))
    assert all(a > b for a, b in zip(curve[6:-1], curve[7:], strict=True))
    assert max(curve) == curve[6] == 2.0
    assert min(curve[7:]) == pytest.approx(0.06, rel=1e-12)


def test_decay_steps_end_the_cosine_early_and_the_rate_stays():
    curve = rates(ScheduleConfig(warmup_steps=2, decay_steps=10, final_ratio=0.25), 30)
    assert curve[:10] == rates(ScheduleConfig(warmup_steps=2, final_ratio=0.25), 10)
    assert curve[9:] == pytest.approx([0.5] * 21, rel=1e-12)


def test_decay_steps_beyond_the_run_leave_the_cosine_unfinished():
    curve = rates(ScheduleConfig(decay_steps=40, final_ratio=0.0), 20)
    assert curve == rates(ScheduleConfig(final_ratio=0.0), 40)[:20]
    assert curve[-1] == pytest.approx(1.0, rel=1e-12)


def test_without_warm_up_and_decay_the_rate_is_constant():
    assert rates(ScheduleConfig(final_ratio=1.0), 5) == [2.0] * 5


def test_warm_up_over_the_whole_run():
    assert rates(ScheduleConfig(warmup_steps=4), 4) == [0.5, 1.0, 1.5, 2.0]
