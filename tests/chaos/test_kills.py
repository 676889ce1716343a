"""SIGKILL at random moments, many in the middle of a save: the run always goes on, to the unbroken run's end."""

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.distributed import run_ranks, start_ranks
from tests.training.tiny import exact, newest, run_config, run_training, step_lines

STEPS, EVERY = 120, 4
CHANGES = {"training.steps": STEPS, "training.checkpoint_every": EVERY, "parallel.zero_stage": 1}


def run_until_killed(config, victim: int, in_save: bool, seed: int) -> int:
    """Training in which rank ``victim`` kills itself: after a while, or as soon as a save has begun and a moment."""
    from megamtp.engine.launch import start_processes
    from megamtp.training import loop

    draw, folder = random.Random(seed), Path(config.run_dir) / "checkpoints"

    def kill() -> None:
        time.sleep(draw.uniform(0, 0.5))
        while in_save and not list(folder.glob("step-*.tmp")):
            time.sleep(0.0002)
        time.sleep(draw.uniform(0, 0.004 if in_save else 0.6))
        os.kill(os.getpid(), signal.SIGKILL)

    grid = start_processes(config.parallel, config.model.kv_heads)
    if grid.rank == victim:
        threading.Thread(target=kill, daemon=True).start()
    return loop.train(config, grid)


@pytest.mark.parametrize(
    "kills", [pytest.param(5, id="5"), pytest.param(100, id="100", marks=[pytest.mark.slow, pytest.mark.chaos])]
)
def test_kills(corpus, tmp_path, kills):
    unbroken = tmp_path / "unbroken"
    run_ranks(2, run_training, run_config(unbroken, corpus, CHANGES))
    config, draw = run_config(tmp_path / "run", corpus, CHANGES), random.Random(0)
    folder, done, in_saves, lost = tmp_path / "run" / "checkpoints", 0, 0, []
    while done < kills:
        if step_lines_so_far(tmp_path / "run") >= STEPS:  # it got to its end between kills: another round
            compare(tmp_path / "run", unbroken)
            (tmp_path / "run").rename(tmp_path / f"run-{done}")
        outcomes = start_ranks(2, run_until_killed, config, draw.randrange(2), draw.random() < 0.6, draw.random())
        if -signal.SIGKILL not in [outcome.code for outcome in outcomes]:
            assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].error or outcomes[1].error
            continue
        done += 1
        in_saves += bool(list(folder.glob("step-*.tmp")))
        if (folder / "latest").exists():
            saved = newest(tmp_path / "run")
            saved.verify()
            lost.append(step_lines_so_far(tmp_path / "run") - saved.manifest["step"])
            assert lost[-1] <= 2 * EVERY  # the steps since the last save that was complete; one was under way
    assert run_ranks(2, run_training, config) == [0, 0]
    compare(tmp_path / "run", unbroken)
    print(
        f"{done} kills, {in_saves} of them between a save's first file and its rename, steps lost at most {max(lost)}"
    )
    assert in_saves >= 0.3 * kills or kills < 20


def step_lines_so_far(run_dir: Path) -> int:
    done = step_lines(run_dir) if (run_dir / "metrics.jsonl").exists() else []
    return done[-1]["step"] if done else 0


def compare(run_dir: Path, unbroken: Path) -> None:
    """Bit for bit."""
    assert [exact(line) for line in step_lines(run_dir)] == [exact(line) for line in step_lines(unbroken)]
