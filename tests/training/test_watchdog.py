"""A rank that hangs is named, dumps its stacks, and the run ends with an exit code of its own; what is slow goes on."""

import ctypes
import os
import re
import signal
import subprocess
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megamtp.parallel.groups import ParallelConfig
from megamtp.training.watchdog import EXIT_HANG, SAVE_PATIENCE, TICKS, Beat, describe, find_hanging
from tests.distributed import run_rank, run_ranks, start_ranks
from tests.training.tiny import events, exact, run_config, run_training, step_lines

TIMEOUT = 3  # a step takes a tenth of a second, but on a busy machine
CHANGES = {"training.steps": 8, "training.checkpoint_every": 2, "training.hang_timeout": TIMEOUT}
STRIKE = 4


def stop_itself():
    subprocess.Popen(["sh", "-c", f"sleep {2 * TIMEOUT}; kill -KILL {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


def sit_in_python():
    while True:
        time.sleep(0.01)


def hold_the_interpreter():
    ctypes.PyDLL(None).sleep(3 * TIMEOUT)
    os._exit(99)


def stop_for_a_while():
    subprocess.Popen(["sh", "-c", f"sleep {1.5 * TIMEOUT}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


def wait_long():
    time.sleep(1.5 * TIMEOUT)


def wait_most_of_it():
    time.sleep(0.6 * TIMEOUT)


def run_struck(config, victim: int, where: str, strike, calls: set[int], patience: int = SAVE_PATIENCE) -> int:
    """Training in which rank ``victim`` does ``strike`` before the ``calls`` of a function, counted from 1."""
    from megamtp.data.loader import Loader
    from megamtp.engine.engine import Engine
    from megamtp.engine.launch import start_processes
    from megamtp.training import checkpoint, loop
    from megamtp.training.guard import Guard

    owner, name = {
        "data": (Loader, "next_step"),
        "training": (Engine, "train_step"),
        "forward": (Engine, "_forward"),
        "write": (checkpoint, "write_pieces"),
        "remove": (checkpoint, "_remove_old"),
        "rollback": (loop, "newest_whole"),
    }[where]
    grid = start_processes(config.parallel, config.model.kv_heads)
    untouched, done, asked = getattr(owner, name), [], []
    loop.SAVE_PATIENCE = patience

    def struck(*args):
        done.append(1)
        if grid.rank == victim and len(done) in calls:
            strike()
        return untouched(*args)

    def gives_up(guard: Guard) -> bool:
        asked.append(1)
        return len(asked) == STRIKE

    setattr(owner, name, struck)
    if where == "rollback":
        Guard.gives_up = property(gives_up)
    return loop.train(config, grid)


@pytest.mark.parametrize(
    ("victim", "where", "strike", "told", "stack", "codes"),
    [
        (1, "training", stop_itself, "no sign of life for 3 s, last seen in ", None, (75, -9)),
        pytest.param(
            *(0, "training", stop_itself, "; the process is stopped by a signal", None, (-9, 75)),
            marks=pytest.mark.slow,
        ),
        (0, "data", sit_in_python, "it stands still for 3 s, in data after step 3", "sit_in_python", (75, 75)),
        (1, "training", sit_in_python, "it stands still for 3 s, in training", "sit_in_python", (75, 75)),
        pytest.param(
            *(1, "training", hold_the_interpreter, "no sign of life for 3 s", "hold_the_interpreter", (75, 99)),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["stopped", "first-stopped", "in-data", "in-training", "holds-the-interpreter"],
)
def test_two_ranks(corpus, tmp_path, victim, where, strike, told, stack, codes):
    config = run_config(tmp_path, corpus, CHANGES)
    outcomes = start_ranks(2, run_struck, config, victim, where, strike, {STRIKE})
    assert tuple(outcome.code for outcome in outcomes) == codes
    judge = next(outcome for outcome in outcomes if outcome.code == EXIT_HANG)
    assert f"\nhang: rank {victim} on " in judge.stderr and told in judge.stderr, judge.stderr
    assert "hang: waiting, 1 of 2 ranks: in training after step 3" in judge.stderr
    (event,) = events(tmp_path, "hang")
    assert (event["ranks"], event["step"]) == ([victim], STRIKE - 1)
    if stack:
        assert stack in (tmp_path / "watchdog" / f"rank-{victim}.stacks").read_text()
    assert "all_reduce" in (tmp_path / "watchdog" / f"rank-{1 - victim}.stacks").read_text()


@pytest.mark.slow
def test_the_same_command_goes_on_and_keeps_the_stacks(corpus, tmp_path):
    config = run_config(tmp_path / "run", corpus, CHANGES)
    start_ranks(2, run_struck, config, 1, "training", stop_itself, {STRIKE})
    assert run_ranks(2, run_training, config) == [0, 0]
    run_ranks(2, run_training, run_config(tmp_path / "unbroken", corpus, CHANGES))
    assert [exact(x) for x in step_lines(tmp_path / "run")] == [exact(x) for x in step_lines(tmp_path / "unbroken")]
    (stacks,) = (tmp_path / "run" / "watchdog").glob("*.stacks")
    assert re.fullmatch(r"rank-0\.\d{8}-\d{6}\.stacks", stacks.name) and "all_reduce" in stacks.read_text()


def test_a_rank_that_its_tensor_parallel_neighbour_waits_for(corpus, tmp_path):
    """By a handle, whose wait leaves no frame of torch.distributed."""
    config = run_config(tmp_path, corpus, CHANGES | {"parallel.tensor": 2})
    outcomes = start_ranks(2, run_struck, config, 1, "forward", sit_in_python, {4 * STRIKE})
    assert [outcome.code for outcome in outcomes] == [EXIT_HANG] * 2
    assert "hang: rank 1 on " in outcomes[0].stderr and "sit_in_python" in outcomes[0].stderr, outcomes[0].stderr


def test_a_dead_disk_under_a_save_in_the_background(corpus, tmp_path):
    """All main threads wait for their savers, and these for the one that writes."""
    config = run_config(tmp_path, corpus, CHANGES)
    outcomes = start_ranks(2, run_struck, config, 1, "write", sit_in_python, {1}, 1)
    assert [outcome.code for outcome in outcomes] == [EXIT_HANG] * 2
    (line,) = [line for line in outcomes[0].stderr.splitlines() if line.startswith("hang: rank")]
    assert "hang: rank 1 on " in line and "in checkpoint after step 4" in line and "sit_in_python" in line


@pytest.mark.slow
def test_one_rank(corpus, tmp_path):
    (outcome,) = start_ranks(1, run_struck, run_config(tmp_path, corpus, CHANGES), 0, "data", sit_in_python, {STRIKE})
    assert outcome.code == EXIT_HANG
    assert "hang: rank 0 on " in outcome.stderr and "waiting" not in outcome.stderr
    assert "sit_in_python" in (tmp_path / "watchdog" / "rank-0.stacks").read_text()


def test_a_run_that_is_suspended_for_longer_goes_on(corpus, tmp_path):
    (outcome,) = start_ranks(
        1, run_struck, run_config(tmp_path, corpus, CHANGES), 0, "data", stop_for_a_while, {STRIKE}
    )
    assert (outcome.code, outcome.result) == (0, 0), outcome.stderr
    assert not events(tmp_path, "hang")


@pytest.mark.parametrize(
    ("world_size", "where", "strike", "calls", "changes"),
    [
        (1, "forward", wait_most_of_it, range(13, 17), {}),  # all micro-batches of a step
        pytest.param(
            *(1, "forward", wait_most_of_it, range(33, 37), {"training.eval_samples": 8}), marks=pytest.mark.slow
        ),  # the evaluation at the end
        pytest.param(1, "write", wait_long, {2}, {}, marks=pytest.mark.slow),
        (2, "remove", wait_long, {1}, {"training.background_save": False}),  # the other rank is back in training
        (1, "rollback", wait_long, {2}, {}),
    ],
    ids=["micro-batches", "evaluation", "save", "one-rank-saves", "rollback"],
)
def test_what_takes_long_is_no_hang_and_leaves_no_stacks(corpus, tmp_path, world_size, where, strike, calls, changes):
    config = run_config(tmp_path, corpus, CHANGES | changes)
    outcomes = start_ranks(world_size, run_struck, config, 0, where, strike, set(calls))
    assert [outcome.code for outcome in outcomes] == [0] * world_size, outcomes[0].stderr
    assert not events(tmp_path, "hang") and len(events(tmp_path, "rolled_back")) == (where == "rollback")
    assert step_lines(tmp_path)[-1]["step"] == 8


def test_a_verdict_of_an_earlier_start_says_nothing(corpus, tmp_path):
    (tmp_path / "watchdog").mkdir()
    (tmp_path / "watchdog" / "verdict").touch()
    assert run_rank(run_training, run_config(tmp_path, corpus, {"training.steps": 2})) == 0
    assert not (tmp_path / "watchdog" / "verdict").exists()


# --- who is to blame


def beats(*ranks: tuple[int, bool]) -> list[Beat]:
    return [
        Beat(9, marks, 3, "training", TICKS, waits, "f.py:1 f", f"node{r}", r) for r, (marks, waits) in enumerate(ranks)
    ]


@pytest.mark.parametrize(
    ("ranks", "silent", "hanging"),
    [
        ([(7, True), (7, False), (7, True)], [2], [2]),
        ([(7, True), (6, True), (7, False), (6, True)], [], [1, 3]),
        ([(7, True), (7, False), (7, True)], [], [1]),
        ([(7, False), (7, True), (7, False)], [], []),  # on GPUs most ranks wait for their device
        ([(7, True), (7, True)], [], []),
        ([(7, False), (7, False)], [], []),
        ([(7, False)], [], [0]),
    ],
)
def test_who_hangs(ranks, silent, hanging):
    assert find_hanging(beats(*ranks), silent) == hanging


def test_it_is_told_where_nobody_can_be_named():
    told = describe(beats((7, True), (7, True)), [], [], 60, "elsewhere")
    assert told == [
        "hang: all 2 ranks stand still for 60 s, which one is to blame is not known",
        "hang: waiting, 2 of 2 ranks: in training after step 3, f.py:1 f",
    ]
    assert describe([None, *beats((7, True))], [0], [0], 60, "here")[0] == (
        "hang: rank 0 has given no sign of life since the start"
    )


# --- how long ranks wait for each other


def meet_late(grid, layout, timeout_s: float) -> list[str]:
    """Rank 1 comes a second late to a message in each group; how each ended."""
    from megamtp.engine.launch import set_timeouts, start_processes

    grid = start_processes(layout)
    saver = dist.new_group(backend="gloo")
    set_timeouts(timedelta(seconds=timeout_s))
    ended = []
    for group in (None, grid.tensor.group, saver):
        time.sleep(grid.rank)
        try:
            dist.all_reduce(torch.zeros(1), group=group)
            ended.append("met")
        except RuntimeError:
            ended.append("gave up")
            break  # gloo closes the group
    return ended


def test_the_timeout_is_that_of_every_group():
    layout = ParallelConfig(tensor=2)
    assert run_ranks(2, meet_late, layout, 60.0) == [["met"] * 3] * 2
    assert start_ranks(2, meet_late_alone, layout, 0.3)[0].result == ["gave up"]


def meet_late_alone(layout, timeout_s: float) -> list[str]:
    return meet_late(None, layout, timeout_s)
