"""A rank that hangs is named, dumps its stacks, and the run ends with an exit code of its own; what is slow goes on."""

import ctypes
import os
import signal
import subprocess
import time

import pytest

from megamtp.training.watchdog import EXIT_HANG, Beat, describe, find_hanging
from tests.distributed import run_rank, run_ranks, start_ranks
from tests.training.tiny import events, exact, run_config, run_training, step_lines

TIMEOUT = 3  # a step takes a tenth of a second, but on a busy machine
CHANGES = {"training.steps": 8, "training.checkpoint_every": 2, "training.hang_timeout": TIMEOUT}
STRIKE = 4


def stop_itself():
    subprocess.Popen(["sh", "-c", f"sleep {3 * TIMEOUT}; kill -KILL {os.getpid()}"])
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


def run_struck(config, victim: int, where: str, strike) -> int:
    """Training in which rank ``victim`` does ``strike`` in step ``STRIKE``, in the loader or before its forward."""
    from megamtp.data.loader import Loader
    from megamtp.engine.engine import Engine
    from megamtp.engine.launch import start_processes
    from megamtp.training import loop

    grid = start_processes(config.parallel, config.model.kv_heads)
    owner, name = (Loader, "next_step") if where == "data" else (Engine, "train_step")
    untouched, calls = getattr(owner, name), []

    def struck(*args):
        calls.append(1)
        if grid.rank == victim and len(calls) == STRIKE:
            strike()
        return untouched(*args)

    setattr(owner, name, struck)
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
        (1, "training", hold_the_interpreter, "no sign of life for 3 s", "hold_the_interpreter", (75, 99)),
    ],
    ids=["stopped", "first-stopped", "in-data", "in-training", "holds-the-interpreter"],
)
def test_two_ranks(corpus, tmp_path, victim, where, strike, told, stack, codes):
    config = run_config(tmp_path, corpus, CHANGES)
    outcomes = start_ranks(2, run_struck, config, victim, where, strike)
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
def test_the_same_command_goes_on(corpus, tmp_path):
    config = run_config(tmp_path / "run", corpus, CHANGES)
    start_ranks(2, run_struck, config, 1, "training", stop_itself)
    assert run_ranks(2, run_training, config) == [0, 0]
    run_ranks(2, run_training, run_config(tmp_path / "unbroken", corpus, CHANGES))
    assert [exact(x) for x in step_lines(tmp_path / "run")] == [exact(x) for x in step_lines(tmp_path / "unbroken")]


def test_one_rank(corpus, tmp_path):
    (outcome,) = start_ranks(1, run_struck, run_config(tmp_path, corpus, CHANGES), 0, "data", sit_in_python)
    assert outcome.code == EXIT_HANG
    assert "hang: rank 0 on " in outcome.stderr and "waiting" not in outcome.stderr
    assert "sit_in_python" in (tmp_path / "watchdog" / "rank-0.stacks").read_text()


def test_a_run_that_is_suspended_for_longer_goes_on(corpus, tmp_path):
    (outcome,) = start_ranks(1, run_struck, run_config(tmp_path, corpus, CHANGES), 0, "data", stop_for_a_while)
    assert (outcome.code, outcome.result) == (0, 0), outcome.stderr
    assert not events(tmp_path, "hang")


def run_slowly(grid, config) -> int:
    """The evaluation and the save take longer than the time-out."""
    from megamtp.engine.engine import Engine
    from megamtp.training import loop, saver

    forward, write = Engine._forward, saver.write_checkpoint

    def slow_forward(self, *args):
        time.sleep(0.4 * config.training.hang_timeout)
        return forward(self, *args)

    evaluate = Engine.evaluate

    def slow_evaluate(self, batches):
        Engine._forward = slow_forward
        return evaluate(self, batches)

    def slow_write(*args, **options):
        time.sleep(1.5 * config.training.hang_timeout)
        return write(*args, **options)

    Engine.evaluate, saver.write_checkpoint = slow_evaluate, slow_write
    return loop.train(config, grid)


def test_a_long_evaluation_or_save_is_no_hang_and_leaves_no_stacks(corpus, tmp_path):
    changes = {"training.hang_timeout": 2, "training.steps": 2, "training.eval_samples": 8, "parallel.zero_stage": 0}
    assert run_rank(run_slowly, run_config(tmp_path, corpus, changes)) == 0
    assert not list((tmp_path / "watchdog").glob("*.stacks"))


def test_a_verdict_of_an_earlier_start_says_nothing(corpus, tmp_path):
    (tmp_path / "watchdog").mkdir()
    (tmp_path / "watchdog" / "verdict").touch()
    assert run_rank(run_training, run_config(tmp_path, corpus, {"training.steps": 2})) == 0
    assert not (tmp_path / "watchdog" / "verdict").exists()


# --- who is to blame


def beats(*ranks: tuple[int, bool]) -> list[Beat]:
    return [Beat(9, marks, 3, "training", waits, "f.py:1 f", f"node{r}", r) for r, (marks, waits) in enumerate(ranks)]


@pytest.mark.parametrize(
    ("ranks", "silent", "hanging"),
    [
        ([(7, True), (7, False), (7, True)], [2], [2]),
        ([(7, True), (6, True), (7, False), (6, True)], [], [1, 3]),
        ([(7, True), (7, False), (7, True)], [], [1]),
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
