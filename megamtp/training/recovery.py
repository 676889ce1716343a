"""Where a run goes on: the newest checkpoint that is whole. What is passed over is told."""

from pathlib import Path
from typing import NamedTuple

from megamtp.errors import UserError
from megamtp.parallel.groups import ProcessGrid
from megamtp.training.checkpoint import Checkpoint, DamagedCheckpoint, checkpoints_by_age
from megamtp.training.faults import fail_together, from_all, from_main


class Found(NamedTuple):
    """The newest whole checkpoint, none where there has never been one, and the newer ones with what is wrong."""

    checkpoint: Checkpoint | None
    damaged: list[tuple[Path, str]]


def newest_whole(folder: Path, grid: ProcessGrid) -> Found:
    """Open and verify, checksums included, until one is whole; the same answer on every rank, and every rank calls it.

    Raises ``UserError`` where there are checkpoints and none is whole, or where one is of another program's format.
    """
    damaged: list[tuple[Path, str]] = []
    paths = from_main(grid, lambda: checkpoints_by_age(folder))
    for path in paths:
        problem = from_main(grid, lambda path=path: _problem(lambda: Checkpoint.open(path)))
        if problem is None:
            with fail_together(grid, UserError, OSError):
                checkpoint = Checkpoint.open(path)
            problems = from_all(grid, _problem(lambda checkpoint=checkpoint: checkpoint.verify_share(grid)))
            problem = next(filter(None, problems), None)
        if problem is None:
            return Found(checkpoint, damaged)
        damaged.append((path, problem))
    if damaged:
        raise UserError(
            f"{folder}: none of the {len(damaged)} checkpoints is whole; the newest: {damaged[0][1]}; "
            "restore one from elsewhere, or start anew in another run_dir"
        )
    return Found(None, [])


def _problem(action) -> str | None:
    try:
        action()
    except (DamagedCheckpoint, OSError) as error:
        return str(error)
    return None
