"""The same run in another layout: other ranks, micro-batches and ZeRO stages at the same global batch."""

import pytest

from megamtp.training.loop import train
from tests.distributed import run_ranks
from tests.training.tiny import (
    exact,
    newest,
    relative_error,
    run_config,
    run_training,
    step_lines,
    tensors,
    validation_lines,
)

ONE_RANK = {"training.eval_every": 10, "training.eval_samples": 7, "training.micro_batch_size": 2}


@pytest.fixture(scope="module")
def references(corpus, tmp_path_factory):
    """One rank, ZeRO 0: the run directory by whether attention stays inside documents."""
    folders = {}
    for by_document in (False, True):
        folder = tmp_path_factory.mktemp("one_rank")
        config = run_config(folder, corpus, ONE_RANK | {"data.document_attention": by_document})
        assert run_ranks(1, run_training, config) == [0]
        folders[by_document] = folder
    return folders


@pytest.mark.parametrize(
    ("world_size", "micro_batch_size", "zero_stage", "by_document"),
    [
        (2, 1, 0, False),
        (2, 4, 0, False),
        (2, 2, 1, False),
        (4, 1, 1, False),
        (1, 8, 1, False),
        (2, 2, 1, True),
        (1, 1, 0, True),
    ],
)
def test_another_layout_gives_the_same_run(
    references, corpus, tmp_path, world_size, micro_batch_size, zero_stage, by_document
):
    changes = ONE_RANK | {
        "training.micro_batch_size": micro_batch_size,
        "parallel.zero_stage": zero_stage,
        "data.document_attention": by_document,
    }
    run_ranks(world_size, run_training, run_config(tmp_path, corpus, changes))
    reference = references[by_document]
    ours, theirs = step_lines(tmp_path), step_lines(reference)
    assert len(ours) == len(theirs) == 20
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss_per_head"] == pytest.approx(b["loss_per_head"], rel=2e-6)
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
        # Two logits that are equal to rounding may change places: one hit of some 100 targets.
        assert a["accuracy_per_head"] == pytest.approx(b["accuracy_per_head"], abs=0.015)
        assert [a[key] for key in ("lr", "tokens", "epoch")] == [b[key] for key in ("lr", "tokens", "epoch")]
    for a, b in zip(validation_lines(tmp_path), validation_lines(reference), strict=True):
        assert a["validation_loss_per_head"] == pytest.approx(b["validation_loss_per_head"], rel=2e-6)
        assert (a["step"], a["validation_targets"]) == (b["step"], b["validation_targets"])
    weights, expected = tensors(newest(tmp_path)), tensors(newest(reference))
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        assert relative_error(weights[name], weight) < 1e-4, name


def test_masks_of_documents_matter(references):
    """Or the cases above would show nothing: both runs start from the same model and the same samples."""
    with_mask, without = (step_lines(references[by_document]) for by_document in (True, False))
    assert with_mask[0]["loss_per_head"] != pytest.approx(without[0]["loss_per_head"], rel=1e-5)


def train_twice(grid, first, second) -> list[int]:
    return [train(first, grid), train(second, grid)]


def test_the_same_run_again_is_the_same_bit_for_bit(references, corpus, tmp_path):
    """In the same process, after another run: nothing of a run stays behind in the program."""
    other = run_config(tmp_path / "other", corpus, {"training.steps": 2, "training.seed": 9})
    again = run_config(tmp_path / "again", corpus, ONE_RANK)
    assert run_ranks(1, train_twice, other, again) == [[0, 0]]
    assert [exact(line) for line in step_lines(tmp_path / "again")] == [
        exact(line) for line in step_lines(references[False])
    ]
    assert step_lines(tmp_path / "other")[0]["loss"] != step_lines(tmp_path / "again")[0]["loss"]
