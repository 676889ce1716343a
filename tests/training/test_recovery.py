"""Damage to any file of a checkpoint is found, the checkpoint passed over, and the run goes on from the one before."""

import shutil
from pathlib import Path

import pytest

from megamtp.errors import UserError
from tests.distributed import run_rank, run_ranks
from tests.training.tiny import events, exact, newest, run_config, run_training, step_lines

CHANGES = {
    "training.steps": 6,
    "training.checkpoint_every": 2,
    "parallel.zero_stage": 1,
    "training.keep_checkpoints": 3,
}


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory) -> Path:
    """Two ranks' run of six steps, with the checkpoints of steps 2, 4 and 6. Copy it before use."""
    folder = tmp_path_factory.mktemp("finished")
    run_ranks(2, run_training, run_config(folder, corpus, CHANGES))
    assert sorted(path.name for path in (folder / "checkpoints").glob("step-*")) == [
        f"step-0000000{i}" for i in (2, 4, 6)
    ]
    return folder


def truncate(file: Path, where: int) -> None:
    file.write_bytes(file.read_bytes()[: where - 1])


def flip(file: Path, where: int) -> None:
    data = bytearray(file.read_bytes())
    data[where - 1] ^= 1
    file.write_bytes(bytes(data))


def found_after(grid, folder: Path, damages: list) -> list[tuple[str, list[str]]]:
    """For each damage to step 6: (the checkpoint that is found, what is passed over)."""
    from megamtp.training.recovery import newest_whole

    results = []
    for index, (name, damage, part) in enumerate(damages):
        copy = Path(shutil.copytree(folder, folder.parent / f"damaged-{index}"))
        file = copy / "step-00000006" / name
        damage(file, max(1, int(part * file.stat().st_size)))
        checkpoint, damaged = newest_whole(copy, grid)
        results.append((checkpoint.path.name, [f"{path.name}: {problem}" for path, problem in damaged]))
        shutil.rmtree(copy)
    return results


def test_every_file_truncated_and_every_tenth_of_it_with_a_flipped_bit(finished, tmp_path):
    folder = Path(shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints"))
    names = ["manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"]
    assert sorted(path.name for path in (folder / "step-00000006").iterdir()) == names
    damages = [(name, truncate, part) for name in names for part in (0.01, 0.5, 1)]
    damages += [(name, flip, part / 10) for name in names for part in range(11)]
    for (name, *_), (found, damaged) in zip(damages, run_rank(found_after, folder, damages), strict=True):
        assert found == "step-00000004"
        [problem] = damaged
        assert problem.startswith("step-00000006: ") and (name in problem or "manifest" in problem)


def test_the_run_goes_on_from_the_one_before_and_says_so(finished, corpus, tmp_path):
    run_dir = Path(shutil.copytree(finished, tmp_path / "run"))
    flip(run_dir / "checkpoints" / "step-00000006" / "rank-00001.safetensors", 4000)
    (run_dir / "checkpoints" / "latest").write_text("step-00000009")
    before = [exact(line) for line in step_lines(run_dir)]
    assert run_ranks(2, run_training, run_config(run_dir, corpus, CHANGES)) == [0, 0]
    assert [exact(line) for line in step_lines(run_dir)] == before
    [damaged] = events(run_dir, "damaged")
    assert "rank-00001.safetensors: damaged, its checksum is wrong" in damaged["error"]
    assert events(run_dir, "started")[-1]["resumed_from"].endswith("step-00000004")
    newest(run_dir).verify()


def refused_without_a_whole_one(grid, folder: Path) -> str:
    from megamtp.training.recovery import newest_whole

    for file in folder.glob("step-*/manifest.json"):
        truncate(file, 100)
    with pytest.raises(UserError) as refused:
        newest_whole(folder, grid)
    return str(refused.value)


def test_without_a_whole_one_it_is_refused(finished, tmp_path):
    folder = Path(shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints"))
    assert "none of the 3 checkpoints is whole; the newest: " in run_rank(refused_without_a_whole_one, folder)


def test_a_replaced_checkpoint_is_found_until_the_new_one_has_its_name(finished, corpus, tmp_path):
    """As a kill between two renames leaves it."""
    run_dir = Path(shutil.copytree(finished, tmp_path / "run"))
    last = run_dir / "checkpoints" / "step-00000006"
    last.rename(last.with_name("step-00000006.replaced"))
    assert run_ranks(2, run_training, run_config(run_dir, corpus, CHANGES | {"training.steps": 8})) == [0, 0]
    assert [line["step"] for line in step_lines(run_dir)] == list(range(1, 9)) and not events(run_dir, "damaged")
    assert not list((run_dir / "checkpoints").glob("*.replaced"))


def test_a_save_in_the_background_writes_the_same_bytes(finished, corpus, tmp_path):
    changes = CHANGES | {"training.background_save": False}
    run_ranks(2, run_training, run_config(tmp_path, corpus, changes))

    def content(folder: Path) -> dict[str, bytes]:
        return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    assert content(tmp_path / "checkpoints") == content(finished / "checkpoints")
    for folder in (tmp_path, finished):
        saved = events(folder, "checkpoint")
        assert [event["step"] for event in saved] == [2, 4, 6]
        assert all(0 < event["stall_seconds"] <= event["seconds"] for event in saved)


def test_some_are_kept_for_good(corpus, tmp_path):
    changes = {"training.checkpoint_every": 1, "training.keep_every": 4, "training.keep_checkpoints": 1}
    run_rank(run_training, run_config(tmp_path, corpus, CHANGES | changes | {"training.steps": 10}))
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert kept == ["step-00000004", "step-00000008", "step-00000010"]
