import functools
import itertools
import weakref

import numpy as np
import pytest
import torch

from megamtp.data.loader import Batch
from megamtp.model.heads import HeadLosses, HeadsConfig, MultiTokenHeads
from megamtp.model.model import build_model, logical_parameters
from tests.model.llama import expected_losses, micro_batch, random_model, small_config
from tests.ops.closeness import EXACT, relative_error
from tests.ops.observe import LargestTensor

MODES = pytest.mark.parametrize("mode", ["sequential", "joint", "naive"])
REPLICATED = pytest.mark.parametrize("replicated", [False, True], ids=["shared", "replicated"])
UPSTREAM = [1.0, 0.25, -3.0]


def weights_of(n):
    return [1.0, 0.3, 2.0, 0.7, 1.5, 0.1, 0.9, 1.1][:n]


@functools.cache
def setting(n, replicated=False):
    """Config, state in fp32, three micro-batches (one with documents, one of another shape) and what is expected."""
    config = small_config(
        n_layers=12, n_future_tokens=n, n_kv_heads=2, init_std=0.15, replicated_unembedding=replicated
    )
    state = random_model(config, seed=n).state_dict()
    batches = [
        micro_batch(config, seed=1, documents=True),
        micro_batch(config, b=1, s=14, seed=2, masked=0.5),
        micro_batch(config, b=3, s=5, seed=3, documents=True),
    ]
    parameters = {name.removeprefix("output_heads."): value for name, value in state.items()}
    return config, state, batches, expected_losses(parameters, config, batches, weights_of(n), UPSTREAM)


def build(mode, n, dtype, replicated=False):
    config, state, _, _ = setting(n, replicated)
    heads = HeadsConfig(mode=mode, loss_weights=weights_of(n), chunk_tokens=4)
    model = build_model(config, heads, seed=None, dtype=dtype)
    model.load_state_dict(state)
    return model


def run(model, batches):
    """Backward of each micro-batch with its upstream gradient; the losses of the last one."""
    for batch, factor in zip(batches, UPSTREAM, strict=True):
        losses = model(*batch)
        (losses.loss * factor).backward()
    return losses


@pytest.mark.parametrize("n", [1, 2, 4, 8])
@REPLICATED
@MODES
def test_losses_and_gradients_in_fp64(mode, replicated, n):
    model, (config, _, batches, wanted) = build(mode, n, torch.float64, replicated), setting(n, replicated)
    losses = run(model, batches)
    assert relative_error(losses.loss.detach(), wanted.loss) <= EXACT
    assert relative_error(losses.sums, wanted.sums) <= EXACT
    assert torch.equal(losses.counts, wanted.counts) and torch.equal(losses.correct, wanted.correct)
    assert 0 < wanted.counts.min() < batches[-1].tokens.numel()
    for name, parameter in logical_parameters(model):
        assert relative_error(parameter.grad, wanted.grads[name]) <= EXACT, name
        assert wanted.grads[name].norm() > 0
    assert config.padded_vocab_size == 64
    weights = model.output_heads.output_weights()
    assert len(weights) == (n if replicated else 1)
    assert all(torch.equal(weight.grad[50:], torch.zeros(14, 16)) for weight in weights)


@pytest.mark.parametrize("n", [1, 2, 4, 8])
@REPLICATED
@MODES
def test_losses_and_gradients_in_fp32(mode, replicated, n):
    model, (_, _, batches, wanted) = build(mode, n, torch.float32, replicated), setting(n, replicated)
    losses = run(model, batches)
    assert losses.loss.dtype == losses.sums.dtype == torch.float32
    assert relative_error(losses.loss.detach(), wanted.loss) <= 2e-6
    assert relative_error(losses.sums, wanted.sums) <= 2e-6
    assert torch.equal(losses.counts, wanted.counts) and torch.equal(losses.correct, wanted.correct)
    grads = {name: parameter.grad for name, parameter in logical_parameters(model)}
    for name, grad in grads.items():
        assert relative_error(grad, wanted.grads[name]) <= 2e-5, name
    ours, theirs = (torch.stack([g.double().norm() for g in all_.values()]).norm() for all_ in (grads, wanted.grads))
    assert relative_error(ours, theirs) <= 1e-5


@REPLICATED
@MODES
def test_bf16_stays_near(mode, replicated):
    """No mode is worse than what bf16 weights and activations cost."""
    n = 4
    model, (_, _, batches, wanted) = build(mode, n, torch.bfloat16, replicated), setting(n, replicated)
    losses = run(model, batches)
    assert losses.sums.dtype == torch.float32 and torch.equal(losses.counts, wanted.counts)
    assert relative_error(losses.loss.detach(), wanted.loss) <= 0.02
    for name, parameter in logical_parameters(model):
        assert parameter.grad.dtype == torch.bfloat16
        assert relative_error(parameter.grad, wanted.grads[name]) <= 0.1, name


@MODES
def test_gradient_of_the_trunk_output(mode):
    """dL/dz against finite differences of the loss itself."""
    model, (_, _, batches, _) = build(mode, 2, torch.float64), setting(2)
    batch = batches[0]
    z, inputs = model.trunk(batch.tokens, batch.positions, batch.document_ids)
    z = z.detach().requires_grad_()
    model.output_heads.loss(z, batch.targets, inputs).loss.backward()
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        up, down = (model.output_heads.loss(z + step * direction, batch.targets, inputs).loss for step in (1e-5, -1e-5))
    assert (z.grad * direction).sum().item() == pytest.approx(((up - down) / 2e-5).item(), rel=1e-6)


@MODES
def test_every_target_masked(mode):
    model, (config, _, _, _) = build(mode, 4, torch.float32), setting(4)
    losses = model(*micro_batch(config, masked=2.0))
    losses.loss.backward()
    assert losses.loss == 0 and not losses.sums.any() and not losses.counts.any() and not losses.correct.any()
    assert all(not parameter.grad.any() for parameter in model.parameters())


@REPLICATED
@MODES
def test_one_masked_head_gets_no_gradient(mode, replicated):
    model, (_, _, batches, _) = build(mode, 2, torch.float64, replicated), setting(2, replicated)
    batch = batches[0]
    targets = batch.targets.clone()
    targets[1] = -100
    model(batch.tokens, targets).loss.backward()
    heads = model.output_heads.heads
    assert all(not parameter.grad.any() for parameter in heads[1].parameters())
    assert all(parameter.grad.any() for parameter in heads[0].parameters())
    moved = [bool(weight.grad.any()) for weight in model.output_heads.output_weights()]
    assert moved == ([True, False] if replicated else [True])


@REPLICATED
@MODES
def test_without_gradients(mode, replicated):
    model, (_, _, batches, wanted) = build(mode, 4, torch.float64, replicated), setting(4, replicated)
    with torch.no_grad():
        losses = model(*batches[-1])
    assert not any(value.requires_grad for value in losses)
    assert relative_error(losses.loss, wanted.loss) <= EXACT and relative_error(losses.sums, wanted.sums) <= EXACT
    assert torch.equal(losses.counts, wanted.counts) and torch.equal(losses.correct, wanted.correct)
    assert all(parameter.grad is None for parameter in model.parameters())


@MODES
def test_without_gradients_no_head_runs_with_them(mode):
    """``sequential`` turns gradients on for its own forward passes: not here."""
    model, (_, _, batches, _) = build(mode, 2, torch.float32), setting(2)
    seen = []
    for head in model.output_heads.heads:
        head.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    with torch.no_grad():
        model(*batches[0])
    assert seen == [False, False]


@pytest.mark.parametrize("grad", [True, False])
@MODES
def test_logits_of_one_chunk_at_a_time(mode, grad):
    config = small_config(n_layers=4, n_future_tokens=2, vocab_size=512, dim=8)
    model = build_model(config, HeadsConfig(mode=mode, chunk_tokens=8), seed=0)
    batch = micro_batch(config, b=1, s=64)
    with torch.set_grad_enabled(grad), LargestTensor() as largest:
        model(*batch)
    assert largest.elements == (64 if mode == "naive" and grad else 8) * 512


@MODES
def test_only_the_loss_is_differentiable(mode):
    model, (_, _, batches, _) = build(mode, 2, torch.float32), setting(2)
    losses = model(*batches[0])
    assert isinstance(losses, HeadLosses)
    assert losses.loss.requires_grad and losses.loss.ndim == 0
    assert not any(value.requires_grad for value in losses[1:]) and all(len(value) == 2 for value in losses[1:])
    assert all(parameter.grad is None for parameter in model.parameters())  # nothing is handed over before backward


class LiveActivations:
    """Bytes that autograd holds for a backward pass: now, and at most; parameters are not counted."""

    def __init__(self, model):
        self.owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.holders = weakref.WeakSet()
        self.peak = 0

    class Holder:
        def __init__(self, tensor):
            self.tensor = tensor

    def now(self):
        storages = {}
        for holder in self.holders:
            storage = holder.tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return sum(size for pointer, size in storages.items() if pointer not in self.owned)

    def pack(self, tensor):
        holder = self.Holder(tensor)
        self.holders.add(holder)
        self.peak = max(self.peak, self.now())
        return holder

    def unpack(self, holder):
        return holder.tensor


def live_activations(mode, n):
    """(bytes after the heads' loss, at most during it), the trunk apart."""
    config = small_config(n_layers=n + 1, n_future_tokens=n)
    model = random_model(config, HeadsConfig(mode=mode), seed=0)
    batch = micro_batch(config, b=1, s=32)
    z, inputs = model.trunk(batch.tokens)
    z = z.detach().requires_grad_()
    live = LiveActivations(model)
    with torch.autograd.graph.saved_tensors_hooks(live.pack, live.unpack):
        losses = model.output_heads.loss(z, batch.targets, inputs)
    after = live.now()
    assert losses.loss.requires_grad
    return after, live.peak


def test_sequential_keeps_one_heads_activations():
    (after_2, peak_2), (after_8, peak_8) = (live_activations("sequential", n) for n in (2, 8))
    assert after_2 == after_8 == 0
    assert 0 < peak_8 == peak_2 == live_activations("sequential", 1)[1]
    after_joint, peak_joint = live_activations("joint", 8)
    assert after_joint == peak_joint > 6 * peak_8


def test_graph_of_sequential_is_one_node():
    """Nothing but parameters and the trunk's output lies beneath the loss."""
    model, (_, _, batches, _) = build("sequential", 4, torch.float32), setting(4)
    z, inputs = model.trunk(batches[0].tokens)
    loss = model.output_heads.loss(z, batches[0].targets, inputs).loss
    inner = [node for node, _ in loss.grad_fn.next_functions if node is not None]
    leaves = [node.variable for node in inner if hasattr(node, "variable")]
    assert {id(leaf) for leaf in leaves} == {id(parameter) for parameter in model.output_heads.parameters()}
    assert [node for node in inner if not hasattr(node, "variable")] == [z.grad_fn]


@pytest.mark.parametrize("mask_cross_document", [False, True])
@pytest.mark.parametrize("mode", ["sequential", "joint"])
@REPLICATED
def test_head_k_predicts_the_kth_next_token(replicated, mode, mask_cross_document):
    """From a loader's batch with documents and padding to the losses, against a loop over positions."""
    config = small_config(n_layers=5, n_future_tokens=3, replicated_unembedding=replicated)
    model = random_model(config, HeadsConfig(mode=mode), seed=4, dtype=torch.float64)
    s, n = 10, 3
    tokens = torch.randint(config.vocab_size, (2, s + n), generator=torch.Generator().manual_seed(0))
    tokens[1, 8:] = -1  # padding
    ids = torch.tensor([[0] * 4 + [1] + [2] * 8, [0] * 13], dtype=torch.int32)
    batch = Batch(tokens, ids, s)
    losses = model(batch.inputs, batch.targets(mask_cross_document), batch.positions(), ids[:, :s])
    with torch.no_grad():
        logits = model(batch.inputs, None, batch.positions(), ids[:, :s]).numpy()
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    sums, counts = np.zeros(n), np.zeros(n, dtype=int)
    for k, row, t in itertools.product(range(1, n + 1), range(2), range(s)):
        target, same = int(tokens[row, t + k]), ids[row, t + k] == ids[row, t]
        if target >= 0 and (same or not mask_cross_document):
            sums[k - 1] -= log_probabilities[k - 1, row, t, target]
            counts[k - 1] += 1
    assert losses.counts.tolist() == counts.tolist() and len(set(counts)) == n
    np.testing.assert_allclose(losses.sums.numpy(), sums, rtol=1e-12)
    assert losses.loss.item() == pytest.approx(sums.sum() / (2 * s), rel=1e-12)


@pytest.mark.parametrize("mode", ["sequential", "joint"])
def test_chunk_size_changes_nothing(mode):
    config = small_config(n_layers=4, n_future_tokens=2)
    batch = micro_batch(config)
    grads = []
    for chunk in (1, 5, 1000):
        model = random_model(config, HeadsConfig(mode=mode, chunk_tokens=chunk), seed=0, dtype=torch.float64)
        model(*batch).loss.backward()
        grads.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert relative_error(grads[0], grads[2]) <= EXACT and relative_error(grads[1], grads[2]) <= EXACT


@REPLICATED
def test_padding_rows_never_matter(replicated):
    """Whatever stands in the padding rows, neither logits nor losses see it."""
    config = small_config(n_layers=4, n_future_tokens=2, replicated_unembedding=replicated)
    batch = micro_batch(config)
    for mode in ("sequential", "joint", "naive"):
        model = random_model(config, HeadsConfig(mode=mode), seed=0)
        before, logits = model(*batch).loss.detach(), model(batch.tokens)
        with torch.no_grad():
            for weight in model.output_heads.output_weights():
                weight[50:] = torch.nan
            model.tok_embeddings.weight[50:] = torch.nan
        assert torch.equal(model(*batch).loss.detach(), before) and torch.equal(model(batch.tokens), logits)
        assert logits.shape[-1] == config.vocab_size == 50


def test_number_of_loss_weights():
    with pytest.raises(ValueError, match="loss_weights has 3 entries; n_future_tokens is 2"):
        MultiTokenHeads(small_config(n_future_tokens=2), HeadsConfig(loss_weights=[1, 1, 1]), "sdpa")


def test_no_loss_weights_are_not_the_default():
    with pytest.raises(ValueError, match="loss_weights has 0 entries"):
        MultiTokenHeads(small_config(n_future_tokens=2), HeadsConfig(loss_weights=[]), "sdpa")


def test_weights_are_one_by_default():
    config = small_config(n_layers=4, n_future_tokens=2)
    batch = micro_batch(config)
    default, ones = (
        random_model(config, HeadsConfig(loss_weights=weights), seed=0)(*batch).loss for weights in (None, [1.0, 1.0])
    )
    assert torch.equal(default, ones)
