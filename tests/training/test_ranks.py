"""The helper that starts ranks: a rank that raises, dies or hangs fails the test, soon, and says why."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import RankError, run_ranks, start_ranks


def add_ranks(grid, values: list[int]) -> tuple[int, torch.Tensor]:
    return os.getpid(), grid.sum_over_ranks(torch.tensor(float(values[grid.rank])))


def test_ranks_are_new_processes_that_reach_each_other():
    results = run_ranks(2, add_ranks, [1, 10])
    assert [total.item() for _, total in results] == [11.0, 11.0]
    pids = {pid for pid, _ in results + run_ranks(2, add_ranks, [1, 10])}
    assert len(pids) == 4 and os.getpid() not in pids


def fail_on_the_last(grid, how: str) -> None:
    if grid.rank == grid.world_size - 1:
        if how == "raise":
            raise ValueError("this rank has had enough")
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
    dist.barrier()


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("raise", "rank 1 of 2: exit code 1\n.*ValueError: this rank has had enough"),
        ("die", "rank 1 of 2: exit code -9"),
        ("hang", "rank 1 of 2: exit code 1\n.*Timeout.*in fail_on_the_last"),
    ],
    ids=["raise", "die", "hang"],
)
def test_a_rank_that_fails_fails_the_test_in_time(how, expected):
    started = time.monotonic()
    with pytest.raises(RankError, match=f"(?s){expected}"):
        run_ranks(2, fail_on_the_last, how, timeout=4.0)
    assert time.monotonic() - started < 20


def test_without_launcher_there_are_no_launch_variables():
    [outcome] = start_ranks(1, os.getenv, "RANK", launched=False)
    assert (outcome.code, outcome.result) == (0, None)
    assert [outcome.result for outcome in start_ranks(2, os.getenv, "RANK")] == ["0", "1"]
