"""The data of a run: who reads, in which order, from which sets, and that a resumed run reads on."""

from dataclasses import replace

import pytest
import torch

from tests.distributed import run_ranks
from tests.training.tiny import (
    GLOBAL_BATCH,
    exact,
    newest,
    run_config,
    run_training,
    step_lines,
    tensors,
    validation_lines,
    write_corpus,
)


@pytest.fixture(scope="module")
def blend(tmp_path_factory):
    """The paths of two training sets."""
    folder = tmp_path_factory.mktemp("blend")
    return [str(write_corpus(folder / name, n_documents=80, seed=seed)) for name, seed in (("one", 2), ("two", 3))]


def blended(blend, packing="stream", **changes):
    sources = [{"path": path, "weight": weight} for path, weight in zip(blend, (0.7, 0.3), strict=True)]
    return {"data.train": sources, "data.packing": packing, "data.document_attention": True} | changes


def run_recording(grid, config) -> list[list[list[int]]]:
    """The token rows that this rank trains on, step by step; empty for ranks that read nothing."""
    from megamtp.data.loader import Loader
    from megamtp.engine.launch import start_processes
    from megamtp.training import loop

    steps: list[list[list[int]]] = []
    next_untouched = Loader.next_step

    def next_step(self):
        batches = next_untouched(self)
        steps.append([row for batch in batches for row in batch["tokens"].tolist()])
        return batches

    Loader.next_step = next_step
    assert loop.train(config, start_processes(config.parallel, config.model.kv_heads)) == 0
    return steps


def global_sequence(ranks: list[list[list[list[int]]]]) -> list[list[int]]:
    """Rows of all steps, the data-parallel ranks joined in order."""
    return [row for shares in zip(*ranks, strict=True) for share in shares for row in share]


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_a_run_stopped_at_dp_2_reads_on_at_dp_1_and_dp_4(corpus, blend, tmp_path, packing):
    same = blended(blend, packing) | {"training.steps": 12, "data.workers": 2, "training.checkpoint_every": 5}
    same |= {"data.stages": [{"from_tokens": 6 * GLOBAL_BATCH * 16, "weights": [0.2, 0.8]}]}
    unbroken = global_sequence(run_ranks(1, run_recording, run_config(tmp_path / "unbroken", corpus, same)))
    assert len(unbroken) == 12 * GLOBAL_BATCH
    stopped = run_config(tmp_path / "run", corpus, same | {"training.stop_after": 5})
    read = global_sequence(run_ranks(2, run_recording, stopped))
    onward = run_config(tmp_path / "run", corpus, same | {"training.stop_after": 9, "data.workers": 0})
    read += global_sequence(run_ranks(1, run_recording, onward))
    last = run_config(tmp_path / "run", corpus, same | {"training.micro_batch_size": 1, "data.workers": 1})
    read += global_sequence(run_ranks(4, run_recording, last))
    assert read == unbroken


LAYOUTS = {
    "PP 4": (4, {"parallel.pipeline": 4}),
    "PP 2 DualPipeV, TP 2": (4, {"parallel.pipeline": 2, "parallel.schedule": "dualpipev", "parallel.tensor": 2}),
}
READERS = {"PP 4": [0, 3], "PP 2 DualPipeV, TP 2": [0, 1]}


def run_with_data_on_some(grid, config, readers: list[int]) -> list[str]:
    """Other ranks than ``readers`` are given paths where nothing is. What was opened on this rank."""
    from megamtp.data.indexed_dataset import IndexedDataset

    if grid.rank not in readers:
        config = replace(config, data=replace(config.data, train="not/on/this/node", validation="nor/this"))
    opened = []
    open_untouched = IndexedDataset.__init__

    def init(self, prefix):
        opened.append(str(prefix))
        open_untouched(self, prefix)

    IndexedDataset.__init__ = init
    assert run_training(grid, config) == 0
    return opened


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("packing", ["document", "best_fit"])
def test_only_first_and_last_stage_read_and_every_packing_trains_alike(corpus, tmp_path, layout, packing):
    world_size, parallel = LAYOUTS[layout]
    changes = {"training.steps": 4, "training.eval_every": 3, "data.packing": packing, "data.document_attention": True}
    run_ranks(1, run_training, run_config(tmp_path / "one", corpus, changes))
    config = run_config(tmp_path / "cut", corpus, changes | parallel | {"training.micro_batch_size": 1})
    opened = run_ranks(world_size, run_with_data_on_some, config, READERS[layout])
    assert [rank for rank, paths in enumerate(opened) if paths] == READERS[layout]
    for ours, theirs in zip(step_lines(tmp_path / "cut"), step_lines(tmp_path / "one"), strict=True):
        assert ours["loss_per_head"] == pytest.approx(theirs["loss_per_head"], rel=2e-6)
        assert ours["epoch"] == theirs["epoch"]
    for ours, theirs in zip(validation_lines(tmp_path / "cut"), validation_lines(tmp_path / "one"), strict=True):
        assert ours["validation_loss_per_head"] == pytest.approx(theirs["validation_loss_per_head"], rel=2e-6)
        assert ours["validation_targets"] == theirs["validation_targets"]


def test_workers_change_no_bit_and_validation_sets_are_told_apart(corpus, blend, tmp_path):
    sets = [{"path": str(corpus / "validation"), "name": "a"}, {"path": blend[0], "name": "b"}]
    changes = blended(blend) | {"data.validation": sets, "training.steps": 5, "training.eval_every": 4}
    runs = {}
    for workers in (0, 2):
        runs[workers] = tmp_path / str(workers)
        run_ranks(2, run_training, run_config(runs[workers], corpus, changes | {"data.workers": workers}))
    assert [exact(line) for line in step_lines(runs[0])] == [exact(line) for line in step_lines(runs[2])]
    assert validation_lines(runs[0]) == validation_lines(runs[2])
    for name, tensor in tensors(newest(runs[0])).items():
        assert torch.equal(newest(runs[2]).tensor(name), tensor), name
    assert len(step_lines(runs[0])[-1]["epoch_per_source"]) == 2
    for line in validation_lines(runs[0]):
        of_sets = line["validation_sets"]
        assert list(of_sets) == ["a", "b"]
        targets = [of_sets[name]["targets"] for name in of_sets]
        assert sum(targets) == line["validation_targets"]
        mean = sum(of_sets[name]["losses"][0] * count for name, count in zip(of_sets, targets, strict=True)) / sum(
            targets
        )
        assert mean == pytest.approx(line["validation_loss_per_head"][0], rel=1e-9)


def test_a_validation_fraction_of_the_training_data(corpus, tmp_path):
    changes = {"data.validation": None, "data.validation_fraction": 0.2, "training.steps": 2}
    run_ranks(1, run_training, run_config(tmp_path, corpus, changes))
    [line] = validation_lines(tmp_path)
    assert line["step"] == 2 and line["validation_targets"] > 50
