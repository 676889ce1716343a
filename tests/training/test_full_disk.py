"""A run whose disk is full for a while: only the saves of that time are missing, and it ends as if nothing were."""

import os
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megamtp.training import board
from megamtp.training.board import Board
from tests.distributed import run_ranks
from tests.training.tiny import events, exact, newest, run_config, run_training, step_lines

CHANGES = {
    "training.steps": 12,
    "training.checkpoint_every": 4,
    "training.keep_checkpoints": 5,
    "parallel.zero_stage": 1,
    "training.hang_timeout": 5,  # places in the run are written several times while the disk is full
}


def fill(disk: Path) -> None:
    """To the last byte; tmpfs gives whole pages."""
    descriptor = os.open(disk / "filler", os.O_WRONLY | os.O_CREAT)
    try:
        while True:
            os.write(descriptor, bytes(4096))
    except OSError:
        os.close(descriptor)


def run_on_a_disk_that_is_full_for_a_while(grid, config, disk: Path) -> int:
    """Full from step 4 to step 8, before their saves."""
    import time

    from megamtp.data.loader import Loader
    from megamtp.engine.launch import start_processes
    from megamtp.training import loop

    next_untouched = Loader.next_step

    def next_step(self):
        step = self.consumed_samples // self.global_batch_size + 1
        if grid.rank == 0 and step == 4:
            fill(disk)
        if grid.rank == 0 and step == 8:
            time.sleep(0.5)
            (disk / "filler").unlink()
        return next_untouched(self)

    Loader.next_step = next_step
    return loop.train(config, start_processes(config.parallel, config.model.kv_heads))


def test_a_disk_that_is_full_for_a_while(corpus, tmp_path, small_disk):
    disk = small_disk(8 << 20)
    config = run_config(disk / "run", corpus, CHANGES)
    assert run_ranks(2, run_on_a_disk_that_is_full_for_a_while, config, disk) == [0, 0]
    assert [event["step"] for event in events(disk / "run", "checkpoint_failed")] == [4]
    assert [event["step"] for event in events(disk / "run", "checkpoint")] == [8, 12]
    newest(disk / "run").verify()
    run_ranks(2, run_training, run_config(tmp_path / "even", corpus, CHANGES))
    assert [exact(x) for x in step_lines(disk / "run")] == [exact(x) for x in step_lines(tmp_path / "even")]


def shown(folder: Path) -> list[int]:
    """Steps of the files one by one: TensorBoard mixes up the order of files of one second, which only a test makes."""
    steps = []
    for file in folder.iterdir():
        accumulator = EventAccumulator(str(file))
        accumulator.Reload()
        if "loss" in accumulator.Tags()["scalars"]:
            steps += [event.step for event in accumulator.Scalars("loss")]
    return sorted(steps)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of the thread that writes
def test_curves_have_a_gap_and_go_on(small_disk, monkeypatch, capsys):
    monkeypatch.setattr(board, "RETRY_RECORDS", 10)
    disk = small_disk(1 << 20)
    curves = Board(disk / "tensorboard", 0)
    for step in range(1, 4001):
        if step == 101:
            fill(disk)
        if step == 3501:
            (disk / "filler").unlink()
        curves.write([("loss", 1.0 / step)], step)
    curves.close()
    err = capsys.readouterr().err
    assert "tensorboard: cannot write: No space left on device; curves have a gap here" in err
    steps = shown(disk / "tensorboard")
    assert steps[0] == 1 and steps[-1] == 4000 and len(steps) < 4000
    assert set(range(3600, 4001)) <= set(steps)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of the thread that writes
def test_a_disk_that_is_full_from_the_start_and_when_closed(small_disk, capsys):
    disk = small_disk(1 << 20)
    first = Board(disk / "tensorboard", 0)
    first.write([("loss", 1.0)], 1)
    fill(disk)
    for board_ in (first, Board(disk / "tensorboard", 1)):
        for step in range(2, 2000):
            board_.write([("loss", 1.0)], step)
        board_.close()
    assert "cannot write" in capsys.readouterr().err
