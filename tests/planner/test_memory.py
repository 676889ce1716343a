import dataclasses

import pytest
import torch

from megamtp.model.heads import HeadsConfig
from megamtp.model.model import build_model
from megamtp.ops.cross_entropy import Workspace
from megamtp.planner.memory import block_activation_values, estimate_memory
from tests.model.llama import micro_batch, small_config
from tests.model.test_heads import LiveActivations

B, S = 2, 64
MODES = pytest.mark.parametrize("mode", ["sequential", "joint"])


def wide_config(**overrides):
    """Wide enough that what is proportional to neither dim nor ffn_dim (angles, statistics) hardly counts."""
    return small_config(dim=64, ffn_dim=160, **overrides)


def estimate(config, mode="sequential", precision="fp32", zero_stage=1, dp_size=1, **heads):
    layout = {"seq_len": S, "micro_batch_size": B, "precision": precision, "zero_stage": zero_stage, "dp_size": dp_size}
    return estimate_memory(config, HeadsConfig(mode=mode, **heads), **layout)


def live(model):
    live = LiveActivations(model)
    with torch.autograd.graph.saved_tensors_hooks(live.pack, live.unpack):
        losses = model(*micro_batch(model.config, b=B, s=S))
    return live, losses


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_gradients_and_adam_states(precision):
    """ZeRO-0 in fp32 is plain PyTorch: measured. ZeRO-1 adds fp32 masters, and fp32 sums of bf16 gradients."""
    config = wide_config(n_kv_heads=2)
    model = build_model(config, seed=0, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    count = sum(parameter.numel() for parameter in model.parameters())
    sharded = estimate(config, precision=precision, zero_stage=1, dp_size=4)
    assert sharded.weights == sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
    assert sharded.optimizer == 12 * count // 4
    assert sharded.gradients == (4 if precision == "fp32" else 6) * count
    if precision == "fp32":
        optimizer = torch.optim.AdamW(model.parameters())
        model(*micro_batch(config)).loss.backward()
        optimizer.step()
        moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim > 0]
        plain = estimate(config, zero_stage=0, dp_size=4)
        assert plain.optimizer == sum(value.numel() * value.itemsize for value in moments)
        assert plain.gradients == sum(parameter.grad.numel() * 4 for parameter in model.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("chunk", [16, 1000])
def test_loss_buffers_are_the_workspace(chunk, precision):
    config = wide_config()
    weight = torch.empty(
        config.vocab_size, config.dim, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    )
    workspace = Workspace(B * S, weight, chunk)
    tensors = [value for value in vars(workspace).values() if isinstance(value, torch.Tensor)]
    buffers = estimate(config, precision=precision, chunk_tokens=chunk).loss_buffers
    assert buffers == sum(tensor.numel() * tensor.itemsize for tensor in tensors)


@pytest.mark.parametrize("n_kv_heads", [None, 2, 1])
def test_values_that_a_block_keeps(n_kv_heads):
    """What autograd saves in fp32: never more than the estimate, and not much less."""
    model = build_model(wide_config(n_kv_heads=n_kv_heads), seed=0)
    z, inputs = model.trunk(micro_batch(model.config, b=B, s=S).tokens)
    z = z.detach().requires_grad_()
    saved = LiveActivations(model)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
        out = model.layers[0](z, inputs)
    assert out.requires_grad
    assert 0.85 <= saved.now() / (4 * B * S * block_activation_values(model.config)) <= 1


@pytest.mark.parametrize("n", [1, 4])
@MODES
def test_activations_of_a_step(mode, n):
    config = wide_config(n_layers=7, n_future_tokens=n)
    saved, _losses = live(build_model(config, HeadsConfig(mode=mode), seed=0))
    assert 0.85 <= saved.peak / estimate(config, mode).activations <= 1


def test_more_heads_cost_sequential_nothing():
    """n layers more than the trunk's in joint mode, one in sequential; whole logits in naive alone."""
    few, many = (small_config(n_layers=n + 4, n_future_tokens=n) for n in (2, 8))
    assert estimate(few).activations == estimate(many).activations
    assert estimate(many, "joint").activations > estimate(few, "joint").activations
    assert estimate(few).loss_buffers == estimate(many, "joint").loss_buffers
    assert estimate(many, "naive").loss_buffers == 4 * estimate(few, "naive").loss_buffers


def test_total():
    memory = estimate(wide_config())
    assert memory.total == sum(dataclasses.asdict(memory).values()) and min(dataclasses.asdict(memory).values()) > 0
