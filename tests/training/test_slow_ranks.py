"""Where a step's time goes, and which rank the others wait for."""

import time
from types import SimpleNamespace

import pytest
import torch

from megamtp.engine.part_timer import PartTimer
from megamtp.training.slow_ranks import WINDOW, SlowRanks
from tests.distributed import run_ranks
from tests.training.tiny import events, exact, run_config, run_training, step_lines

PAUSE = 0.05


def ranks(dp_size: int, tp_size: int = 1, ratio: float | None = 1.3) -> SlowRanks:
    return SlowRanks(SimpleNamespace(dp_size=dp_size, tensor=SimpleNamespace(size=tp_size)), ratio)


def test_the_slowest_rank_is_that_beside_its_own_stage():
    """Stages differ in work: ranks 4 to 7 hold the heads."""
    slowest = ranks(2, 2).slowest([1.0, 1.1, 1.0, 1.0, 5.0, 5.2, 5.0, 9.0])
    assert slowest == {"rank": 7, "seconds": 9.0, "median_seconds": 5.0}
    assert ranks(2).slowest([1.0, 2.0]) == {"rank": 1, "seconds": 2.0, "median_seconds": 1.0}
    assert ranks(1).slowest([1.0, 2.0]) is None
    assert ranks(2).slowest([0.0, 0.0]) == {"rank": 0, "seconds": 0.0, "median_seconds": 0.0}


def test_a_rank_is_told_once_and_again_when_it_has_recovered():
    slow, told = ranks(3), []
    for step in range(5 * WINDOW):
        is_slow = step < WINDOW or step >= 3 * WINDOW
        slow.slowest([1.0, 1.5 if is_slow else 1.0, 1.0])
        told += [(step, *item) for item in slow.newly_slow().items()]
    assert told == [(WINDOW - 1, 1, 1.5), (3 * WINDOW + WINDOW // 2, 1, 1.5)]


@pytest.mark.parametrize("ratio", [1.3, None])
def test_single_slow_steps_are_no_news(ratio):
    slow = ranks(2, ratio=ratio)
    for step in range(3 * WINDOW):
        slow.slowest([1.0, 9.0 if step % 3 == 0 or ratio is None else 1.1])
        assert slow.newly_slow() == {}


def test_parts_add_up():
    timer = PartTimer(torch.device("cpu"))
    for _ in range(3):
        with timer.part("forward"):
            time.sleep(0.02)
        with timer.part("backward"):
            time.sleep(0.04)
    seconds = timer.seconds()
    assert list(seconds) == ["forward", "backward"]
    assert 0.06 <= seconds["forward"] == timer.seconds("forward")["forward"] and 0.12 <= seconds["backward"]
    timer.clear()
    assert timer.seconds() == {} and timer.seconds("forward") == {"forward": 0.0}


def run_slow(grid, config, slow_rank: int, where: str) -> int:
    """Training in which ``slow_rank`` takes ``PAUSE`` longer for each forward pass, or for its data."""
    from megamtp.data.loader import Loader
    from megamtp.engine.launch import start_processes
    from megamtp.model.transformer import Block
    from megamtp.training import loop

    if grid.rank == slow_rank:
        owner, name = (Loader, "next_step") if where == "data" else (Block, "forward")
        untouched, turns = getattr(owner, name), [0]

        def slow(self, *args):
            turns[0] += 1
            if where == "data" or turns[0] % 6 == 0:
                time.sleep(PAUSE)
            return untouched(self, *args)

        setattr(owner, name, slow)
    return loop.train(config, start_processes(config.parallel, config.model.kv_heads))


@pytest.mark.parametrize("where", ["data", "forward"])
def test_a_slow_rank_is_told_and_changes_nothing(corpus, tmp_path, where):
    changes = {"training.steps": WINDOW + 2, "training.micro_batch_size": 4, "parallel.zero_stage": 1}
    run_ranks(2, run_slow, run_config(tmp_path / "slow", corpus, changes), 1, where)
    (event,) = events(tmp_path / "slow", "slow_rank")
    assert event["rank"] == 1 and event["ratio"] > 1.3
    slowest = [line["slowest_rank"] for line in step_lines(tmp_path / "slow")]
    assert sum(each["rank"] == 1 for each in slowest) > 0.8 * len(slowest)
    run_ranks(2, run_training, run_config(tmp_path / "even", corpus, changes | {"monitor.slow_rank_ratio": None}))
    assert [exact(x) for x in step_lines(tmp_path / "slow")] == [exact(x) for x in step_lines(tmp_path / "even")]


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (1, {}),
        (2, {"parallel.pipeline": 2}),
        (2, {"parallel.pipeline": 2, "parallel.schedule": "dualpipev", "training.micro_batch_size": 1}),
    ],
    ids=["one", "1f1b", "dualpipev"],
)
def test_the_parts_of_a_step_are_logged(corpus, tmp_path, world_size, layout):
    changes = {"training.steps": 6, "training.eval_every": 2, "training.checkpoint_every": 3} | layout
    run_ranks(world_size, run_training, run_config(tmp_path, corpus, changes))
    for line in step_lines(tmp_path):
        parts = line["seconds_per_part"]
        assert (parts.pop("checkpoint", 0) > 0) == (line["step"] == 4)  # the save after step 3 held it up
        assert set(parts) == {"data", "forward", "backward", "step"} and all(x > 0 for x in parts.values())
        # With a pipeline the rest is waiting; without, hardly anything is left.
        assert sum(parts.values()) <= line["seconds"]
        assert world_size > 1 or sum(parts.values()) > 0.7 * line["seconds"]
        assert "slowest_rank" not in line


@pytest.mark.gpu
def test_parts_of_a_gpu_are_those_of_its_stream():
    """Products that the host only queues are counted where they run, and nothing waits for them until they are read."""
    timer, matrix = PartTimer(torch.device("cuda")), torch.randn(8192, 8192, device="cuda")
    for _ in range(2):  # the second time with events that are used again
        timer.clear()
        started = time.perf_counter()
        with timer.part("forward"):
            for _ in range(10):
                matrix @ matrix
        with timer.part("backward"):
            matrix + 1
        queued = time.perf_counter() - started
        seconds = timer.seconds("forward")["forward"]
        elapsed = time.perf_counter() - started
    assert queued < 0.5 * seconds and 0.5 * elapsed < seconds <= elapsed
    assert timer.seconds()["backward"] < 0.2 * seconds
