"""Blocks by torch.compile: the same losses and gradients, one graph for all of them, in one process and two stages."""

import pytest
import torch
from torch._dynamo.utils import counters

from megamtp.model.heads import HeadsConfig
from megamtp.ops.choice import OpsConfig
from tests.distributed import run_ranks
from tests.model.llama import micro_batch, random_model, small_config
from tests.ops.closeness import relative_error
from tests.training.tiny import run_config, run_training, step_lines, validation_lines, write_corpus


def gradients(mode: str, recompute: str, documents: bool, compile: bool):
    config = small_config(n_layers=6, n_future_tokens=4, n_kv_heads=2)
    model = random_model(config, HeadsConfig(mode=mode), OpsConfig(recompute=recompute, compile=compile), seed=0)
    batch = micro_batch(config, documents=documents)
    losses = model(*batch)
    losses.loss.backward()
    with torch.no_grad():
        evaluated = model(*batch)
    assert torch.allclose(evaluated.sums, losses.sums, rtol=1e-5)
    return losses, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("mode, recompute, documents", [("sequential", "none", True), ("joint", "selective", False)])
def test_losses_and_gradients(mode, recompute, documents):
    torch._dynamo.reset()
    losses, grads = gradients(mode, recompute, documents, compile=False)
    counters.clear()
    compiled, compiled_grads = gradients(mode, recompute, documents, compile=True)
    # One of training, one of evaluation.
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    assert torch.allclose(compiled.sums, losses.sums, rtol=1e-5) and torch.equal(compiled.counts, losses.counts)
    for name, grad in grads.items():
        assert relative_error(compiled_grads[name], grad) < 1e-5, name


def test_a_run_in_two_stages(tmp_path):
    write_corpus(tmp_path / "train", n_documents=60, seed=0)
    write_corpus(tmp_path / "validation", n_documents=15, seed=1)
    found = []
    for compile in (False, True):
        changes = {"ops.compile": compile, "parallel.pipeline": 2, "training.steps": 2}
        folder = tmp_path / str(compile)
        assert run_ranks(2, run_training, run_config(folder, tmp_path, changes)) == [0, 0]
        steps, validations = step_lines(folder), validation_lines(folder)
        found.append([line["loss"] for line in steps] + validations[-1]["validation_loss_per_head"])
    assert len(found[0]) > 2 and found[1] == pytest.approx(found[0], rel=1e-5)
