"""A run that stops and goes on is the run that never stopped; and everything that a checkpoint holds is needed."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.distributed import run_rank, run_ranks
from tests.training.tiny import (
    GLOBAL_BATCH,
    exact,
    newest,
    relative_error,
    run_config,
    run_training,
    step_lines,
    tensors,
    validation_lines,
)

STOP, STEPS = 10, 20


class Layout(NamedTuple):
    world_size: int
    zero_stage: int
    precision: str = "fp32"

    def changes(self, **more) -> dict:
        sizes = {"training.steps": STEPS, "training.micro_batch_size": 2, "training.eval_every": 4}
        return sizes | {"parallel.zero_stage": self.zero_stage, "training.precision": self.precision} | more


LAYOUTS = [Layout(1, 0), Layout(1, 1), Layout(2, 0), Layout(2, 1), Layout(2, 1, "bf16")]


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """``run(layout, stop_after)``: the folder of a run from scratch, made once."""
    made: dict[tuple, Path] = {}

    def get(layout: Layout, stop_after: int | None = None) -> Path:
        if (layout, stop_after) not in made:
            folder = tmp_path_factory.mktemp("run")
            config = run_config(folder, corpus, layout.changes(**{"training.stop_after": stop_after}))
            assert run_ranks(layout.world_size, run_training, config) == [0] * layout.world_size
            made[layout, stop_after] = folder
        return made[layout, stop_after]

    return get


def stopped_copy(run, layout: Layout, folder: Path) -> Path:
    return Path(shutil.copytree(run(layout, STOP), folder / "resumed"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(run, corpus, tmp_path, layout):
    folder = stopped_copy(run, layout, tmp_path)
    assert [line["step"] for line in step_lines(folder)] == list(range(1, STOP + 1))
    run_ranks(layout.world_size, run_training, run_config(folder, corpus, layout.changes()))
    resumed, unbroken = step_lines(folder), step_lines(run(layout))
    assert [exact(line) for line in resumed] == [exact(line) for line in unbroken]
    # The stopped run evaluated once more, at its end.
    evaluations = [line for line in validation_lines(folder) if line["step"] != STOP]
    assert evaluations == validation_lines(run(layout))
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        for name, tensor in tensors(newest(run(layout)), kind).items():
            assert torch.equal(newest(folder).tensor(name, kind), tensor), f"{kind} of {name}"


# --- what a checkpoint holds is needed


def run_tampered(grid, config, what: str) -> int:
    from megamtp.training import loop
    from megamtp.training.checkpoint import Checkpoint

    open_untouched, read_untouched = Checkpoint.open, Checkpoint.read_into

    def open_tampered(path):
        checkpoint = open_untouched(path)
        if what == "optimizer_steps":
            checkpoint.manifest["optimizer_steps"] = 0
        if what == "step":
            checkpoint.manifest["step"] = 0
        if what == "data":
            checkpoint.manifest["state"]["loader"] |= {
                "consumed_samples": 0,
                "consumed_per_source": [0],
                "stage_counts": [0],
            }
        return checkpoint

    def read_tampered(self, wanted):
        read_untouched(self, wanted)
        for fragment in wanted:
            if what in fragment.tensors:
                fragment.tensors[what].zero_()

    Checkpoint.open, Checkpoint.read_into = open_tampered, read_tampered
    return loop.train(config, grid)


@pytest.mark.parametrize(
    ("what", "equal_steps"),
    [
        ("nothing", 10),
        # Weights and data are right, so the first loss is; the update after it is not.
        ("exp_avg", 1),
        ("exp_avg_sq", 1),
        ("optimizer_steps", 1),
        ("step", 1),
        ("weight", 0),
        ("data", 0),
    ],
)
@pytest.mark.parametrize("zero_stage", [0, 1])
def test_without_any_part_of_the_checkpoint_the_run_is_another(run, corpus, tmp_path, what, equal_steps, zero_stage):
    layout = Layout(1, zero_stage)
    folder = stopped_copy(run, layout, tmp_path)
    (folder / "metrics.jsonl").unlink()
    stop = STEPS if what != "step" else STEPS - STOP
    run_rank(run_tampered, run_config(folder, corpus, layout.changes(**{"training.stop_after": stop})), what)
    losses = [line["loss_per_head"] for line in step_lines(folder)]
    expected = [line["loss_per_head"] for line in step_lines(run(layout))[STOP:]]
    assert len(losses) == len(expected)
    assert losses[:equal_steps] == expected[:equal_steps]
    if equal_steps < len(expected):
        for tampered, right in zip(losses[equal_steps:], expected[equal_steps:], strict=True):
            assert tampered != pytest.approx(right, rel=2e-6)


# --- another layout


def run_recording(grid, config) -> list[list[int]]:
    """The numbers of the training samples that this rank reads, step by step."""
    from megamtp.data.loader import Loader
    from megamtp.data.samples import Samples
    from megamtp.training import loop

    read: list[int] = []
    steps: list[list[int]] = []
    batch_untouched, next_untouched = Samples.batch, Loader.next_step

    def batch(self, indices):
        read.extend(int(index) for index in indices)
        return batch_untouched(self, indices)

    def next_step(self):
        read.clear()
        batches = next_untouched(self)
        steps.append(list(read))
        return batches

    Samples.batch, Loader.next_step = batch, next_step
    assert loop.train(config, grid) == 0
    return steps


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Layout(2, 1), Layout(1, 1)),
        (Layout(1, 1), Layout(2, 1)),
        (Layout(1, 0), Layout(1, 1)),
        (Layout(1, 1), Layout(1, 0)),
        (Layout(2, 1), Layout(2, 0)),
        (Layout(1, 0), Layout(2, 1)),
    ],
)
def test_a_run_goes_on_in_another_layout(run, corpus, tmp_path, before, after):
    folder = stopped_copy(run, before, tmp_path)
    ranks = run_ranks(after.world_size, run_recording, run_config(folder, corpus, after.changes()))
    for step, shares in enumerate(zip(*ranks, strict=True), start=STOP):
        assert [index for share in shares for index in share] == list(
            range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)
        )
    resumed, unbroken = step_lines(folder), step_lines(run(before))
    assert len(resumed) == len(unbroken) == STEPS
    for a, b in zip(resumed, unbroken, strict=True):
        assert a["loss_per_head"] == pytest.approx(b["loss_per_head"], rel=2e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
        assert (a["step"], a["tokens"], a["lr"]) == (b["step"], b["tokens"], b["lr"])
    for name, weight in tensors(newest(run(before))).items():
        assert relative_error(newest(folder).tensor(name), weight) < 1e-4, name


# --- ends


def test_a_finished_run_does_nothing_more(run, corpus, tmp_path):
    folder = Path(shutil.copytree(run(Layout(1, 0)), tmp_path / "again"))
    before = (folder / "metrics.jsonl").read_bytes()
    assert run_rank(run_training, run_config(folder, corpus, Layout(1, 0).changes())) == 0
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert newest(folder).manifest["step"] == STEPS


def test_a_longer_run_goes_on_from_a_finished_one(run, corpus, tmp_path):
    folder = stopped_copy(run, Layout(1, 0), tmp_path)
    config = run_config(folder, corpus, Layout(1, 0).changes())
    longer = replace(config, training=replace(config.training, steps=STEPS + 4))
    assert run_rank(run_training, longer) == 0
    assert [line["step"] for line in step_lines(folder)] == list(range(1, STEPS + 5))
