import dataclasses

import pytest
import torch

from megamtp.model.heads import HeadsConfig
from megamtp.model.model import build_model
from megamtp.model.transformer import ModelConfig
from megamtp.ops.choice import OpsConfig
from megamtp.ops.cross_entropy import Workspace
from megamtp.planner.memory import HeldLayers, block_activation_values, estimate_memory, micro_batches_in_flight
from tests.model.llama import micro_batch, small_config
from tests.model.test_heads import LiveActivations

B, S = 2, 64
MODES = pytest.mark.parametrize("mode", ["sequential", "joint"])


def wide_config(**overrides):
    """Wide enough that what is proportional to neither dim nor ffn_dim (angles, statistics) hardly counts."""
    return small_config(dim=64, ffn_dim=160, **overrides)


def estimate(config, mode="sequential", precision="fp32", chunk_tokens=1024, **layout):
    layout = {"seq_len": S, "micro_batch_size": B, "zero_stage": 1, "dp_size": 1, **layout}
    return estimate_memory(config, HeadsConfig(mode=mode, chunk_tokens=chunk_tokens), precision=precision, **layout)


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
    assert sharded.gradients == 4 * count
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
    size = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    if precision == "bf16":  # a product of the weight's shape is added to the fp32 gradient
        size += 2 * config.vocab_size * config.dim
    assert estimate(config, precision=precision, zero_stage=1, chunk_tokens=chunk).loss_buffers == size
    # Under ZeRO-2 the unembedding's gradient is summed beside it.
    size += 4 * config.padded_vocab_size * config.dim if precision == "bf16" else 0
    buffers = estimate(config, precision=precision, zero_stage=2, chunk_tokens=chunk).loss_buffers
    assert buffers == size


@pytest.mark.parametrize("n_kv_heads", [None, 2, 1])
def test_values_that_a_block_keeps(n_kv_heads):
    """What autograd saves in fp32: the estimate, and a hundredth more for angles and statistics."""
    model = build_model(wide_config(n_kv_heads=n_kv_heads), seed=0)
    z, inputs = model.trunk(micro_batch(model.config, b=B, s=S).tokens)
    z = z.detach().requires_grad_()
    saved = LiveActivations(model)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
        out = model.layers[0](z, inputs)
    assert out.requires_grad
    assert 1 <= saved.now() / (4 * B * S * block_activation_values(model.config)) <= 1.02


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@MODES
def test_activations_of_a_step(mode, recompute, n):
    config = wide_config(n_layers=7, n_future_tokens=n)
    saved, _losses = live(build_model(config, HeadsConfig(mode=mode), OpsConfig(recompute=recompute), seed=0))
    expected = estimate(config, mode, recompute=recompute).activations
    if mode == "joint":  # autograd does not see what the loss holds, nor here the block that is computed again
        expected -= 4 * B * S * 2 * n * config.dim
        expected -= 4 * B * S * block_activation_values(config) if recompute == "full" else 0
    # With full recomputation so little is kept that angles and statistics count, and that heads share their input.
    assert (0.75 if recompute == "full" else 0.85) <= saved.peak / expected <= (1.1 if recompute == "full" else 1.02)


def test_more_heads_cost_sequential_nothing():
    """n layers more than the trunk's in joint mode, one in sequential; whole logits in naive alone."""
    few, many = (small_config(n_layers=n + 4, n_future_tokens=n) for n in (2, 8))
    assert estimate(few).activations == estimate(many).activations
    assert estimate(many, "joint").activations > estimate(few, "joint").activations
    assert estimate(few).loss_buffers == estimate(many, "joint").loss_buffers
    assert estimate(many, "naive").loss_buffers == 4 * estimate(few, "naive").loss_buffers


def test_zeros_buckets_and_gathered_weights_by_hand():
    count, whole = 2744, [HeldLayers(0, 5)]
    config = ModelConfig(**TINY, n_future_tokens=2)

    def buffers(zero_stage, precision):
        mode = "joint" if zero_stage == 3 else "sequential"
        return estimate(config, mode, precision, zero_stage=zero_stage, dp_size=4, held=whole).communication

    assert [buffers(stage, "fp32") for stage in range(4)] == [0, 2e8, 2e8, 2e8 + 4 * count]
    assert [buffers(stage, "bf16") for stage in (1, 2, 3)] == [0, 1e8, 2e8 + 2 * count]


def test_total():
    memory = estimate(wide_config(), zero_stage=2)
    assert memory.total == sum(dataclasses.asdict(memory).values()) and min(dataclasses.asdict(memory).values()) > 0


# By hand: blocks of 2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 12 + 16 = 496, tables of 16 * 8 = 128, heads of 2 * 496 + 8 + 128.
# Of two tensor-parallel ranks each holds 2 * 8 * 4 + 2 * 8 * 4 (the one key/value head is not split) + 3 * 8 * 6 + 16
# = 288, 64 and 2 * 288 + 8 + 64 = 648.
TINY = {"vocab_size": 10, "vocab_multiple": 16, "dim": 8, "n_layers": 5, "n_heads": 2, "n_kv_heads": 1, "ffn_dim": 12}
FIRST, LAST = HeldLayers(0, 2, in_flight=3), HeldLayers(3, 5)  # embedding and a block; a block and the heads
SPLIT = {"seq_len": 4, "micro_batch_size": 2, "micro_batches": 4, "tensor": 2, "sequence_parallel": True, "dp_size": 4}


def tiny(**layout):
    config = ModelConfig(**TINY, n_future_tokens=2)
    return dataclasses.asdict(estimate(config, precision="bf16", chunk_tokens=4, **{**SPLIT, **layout}))


def test_first_stage_by_hand():
    # Per token and block: norms 6 * 4, attention 2 * 4 + 2 * 4, feed-forward 4 * 6: 64 values.
    # In a backward pass: gate's and up's gradients, the output's, and a matrix's. Three outputs wait, and a gradient.
    expected = {
        "weights": 2 * (64 + 288),
        "gradients": 4 * (64 + 288),
        "optimizer": 12 * (64 + 288) // 4,
        "activations": 3 * 64 * 8 * 2,
        "temporaries": ((2 * 6 + 4) * 8 + 8 * 6) * 2,
        "loss_buffers": 0,
        "communication": (3 + 1) * 4 * 8 * 2,
    }
    assert tiny(held=[FIRST]) == expected
    assert tiny(held=[FIRST], sequence_parallel=False)["activations"] == 3 * (64 + 24) * 8 * 2
    assert tiny(held=[FIRST], recompute="full")["activations"] == (3 * 4 + 64) * 8 * 2
    # Offloaded, the optimizer needs each micro-batch's gradients in bf16, too.
    own = {"optimizer": 0, "gradients": (2 + 4) * (64 + 288)}
    assert tiny(held=[FIRST], offload_optimizer=True) == expected | own


def test_last_stage_by_hand():
    expected = {
        "weights": 2 * (288 + 648),
        "gradients": 4 * (288 + 648),
        "optimizer": 12 * (288 + 648) // 4,
        "activations": (64 + 64 + 2 * 4 + 3 * 4) * 8 * 2,  # a block, a head, the norm, two gradients
        "temporaries": ((2 * 6 + 4) * 8 + 8 * 6) * 2,
        "loss_buffers": 4 * 8 * (2 + 4) + 2 * 8 * 8,  # 4 tokens' logits over 8 rows, and a gradient of these
        "communication": (1 + 1) * 4 * 8 * 2,
    }
    assert tiny(held=[LAST]) == expected
    # Offloaded, the heads' gradients wait beside those of earlier micro-batches, and the unembedding's is fp32 so long.
    waiting = {
        "gradients": (2 + 4) * (288 + 648) + 2 * 648,
        "loss_buffers": 4 * 8 * (2 + 4) + 2 * 64 + 4 * 64,
        "optimizer": 0,
    }
    assert tiny(held=[LAST], offload_optimizer=True) == expected | waiting
    alone = tiny(held=[LAST], offload_optimizer=True, micro_batches=1)
    assert alone == expected | waiting | {"gradients": (2 + 4) * (288 + 648)}


def test_joint_heads_by_hand():
    config = ModelConfig(**TINY, n_future_tokens=2)
    memory = estimate(config, "joint", "bf16", chunk_tokens=4, held=[LAST], **{**SPLIT, "zero_stage": 1})
    assert memory.activations == (64 + 2 * (64 + 2 * 4 + 2 * 8)) * 8 * 2
    assert memory.gradients == 4 * (288 + 648) + 2 * 64  # the unembedding's alone waits


def test_unembeddings_of_their_own_by_hand():
    """One table more, of 64 on each rank; joint sums up one in fp32 at a time, sequential all."""
    config = ModelConfig(**TINY, n_future_tokens=2, replicated_unembedding=True)
    split = {**SPLIT, "held": [LAST], "chunk_tokens": 4, "offload_optimizer": True}
    joint, sequential = (
        dataclasses.asdict(estimate(config, mode, "bf16", **split)) for mode in ("joint", "sequential")
    )
    assert joint["weights"] == sequential["weights"] == 2 * (288 + 648 + 64)
    assert joint["gradients"] == (2 + 4) * (288 + 648 + 64) + 2 * 2 * 64
    assert sequential["gradients"] == (2 + 4) * (288 + 648 + 64) + 2 * (648 + 64)
    logits = 4 * 8 * (2 + 4) + 2 * 64
    assert joint["loss_buffers"] == logits + 4 * 64 and sequential["loss_buffers"] == logits + 2 * 4 * 64
    shared = dataclasses.asdict(estimate(ModelConfig(**TINY, n_future_tokens=2), "joint", "bf16", **split))
    assert joint["activations"] == shared["activations"] and joint["temporaries"] == shared["temporaries"]


def test_two_stages_of_one_rank_add_up():
    """But for what only the pass that runs needs."""
    both, first, last = (tiny(held=held) for held in ([FIRST, LAST], [FIRST], [LAST]))
    assert both.pop("temporaries") == first["temporaries"]
    assert both == {purpose: first[purpose] + last[purpose] for purpose in both}


def test_zero_stages_by_hand():
    """2,744 parameters over 4 ranks: optimizer, then gradients, then weights; the heads' gradients wait whole."""
    config = ModelConfig(**TINY, n_future_tokens=2)
    sizes = [estimate(config, "joint", zero_stage=stage, dp_size=4) for stage in range(4)]
    waiting = 4 * 128
    assert [size.optimizer for size in sizes] == [8 * 2744, 12 * 2744 // 4, 12 * 2744 // 4, 12 * 2744 // 4]
    assert [size.gradients for size in sizes] == [4 * 2744, 4 * 2744, 2744 + waiting, 2744 + waiting]
    assert [size.weights for size in sizes] == [4 * 2744, 4 * 2744, 4 * 2744, 2744]


def test_mode_that_null_stands_for():
    config = wide_config(n_layers=7, n_future_tokens=4)
    assert estimate(config, None) == estimate(config, "sequential") != estimate(config, "joint")
    assert estimate(config, None, zero_stage=3) == estimate(config, "joint", zero_stage=3)


@pytest.mark.parametrize("ranks", [2, 4])
def test_micro_batches_in_flight_are_those_of_deepspeeds_schedules(ranks):
    from deepspeed.runtime.pipe import schedule

    for micro_batches, rank in ((m, rank) for m in (1, 3, 2 * ranks, 2 * ranks + 5) for rank in range(ranks)):
        steps = schedule.TrainSchedule(micro_batches, ranks, rank).steps()
        assert peaks(steps) == [micro_batches_in_flight(rank, ranks, micro_batches)]
        if micro_batches >= 2 * ranks:  # DualPipeV takes no fewer
            steps = schedule.DualPipeVSchedule(micro_batches, ranks, rank).steps()
            stages = rank, 2 * ranks - 1 - rank
            assert peaks(steps) == [micro_batches_in_flight(stage, 2 * ranks, micro_batches) for stage in stages]


def peaks(steps):
    """Forward passes whose backward pass is still to come, at most, of each phase of a schedule."""
    now, peak = {}, {}
    for command in (command for step in steps for command in step):
        change = {"ForwardPass": 1, "BackwardPass": -1}.get(command.name, 0)
        phase = getattr(command, "phase", 0)
        if change:
            now[phase] = now.get(phase, 0) + change
            peak[phase] = max(peak.get(phase, 0), now[phase])
    assert not any(now.values())
    return [peak[phase] for phase in sorted(peak)]
