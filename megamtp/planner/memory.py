"""Bytes that one rank needs for a training step, before it is launched."""

from collections.abc import Sequence
from dataclasses import dataclass

from megamtp.engine.engine import BUCKET
from megamtp.model.cost import kv_width, layer_parameters, share, table_parameters
from megamtp.model.heads import HeadsConfig
from megamtp.model.transformer import ModelConfig
from megamtp.planner.traffic import LIVE_VALUES


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank, by purpose: the tensors at the peak of a training step.

    What else a device needs, libraries and what the allocator cannot use, is in ``DeviceMemory``.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int  # kept for backward passes
    temporaries: int  # of the block whose backward pass runs
    loss_buffers: int
    communication: int  # what the pipeline holds, ZeRO's buckets, the layers that ZeRO-3 gathers

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class HeldLayers:
    """The layers ``begin : end`` of [embedding, trunk blocks, heads], ``in_flight`` micro-batches at a time."""

    begin: int
    end: int
    in_flight: int = 1


def micro_batches_in_flight(stage: int, n_stages: int, micro_batches: int) -> int:
    """Micro-batches that are forward but not yet backward on a stage, at most; DualPipeV has 2 x pipeline stages.

    Exact for DeepSpeed's ``TrainSchedule`` (1F1B). Of ``DualPipeVSchedule`` it is the peak of each of the two stages
    of a rank, 2P - r and r + 1; they coincide when rank r has just run one forward pass in its main loop.
    """
    return min(n_stages - stage, micro_batches)


def estimate_memory(
    config: ModelConfig,
    heads: HeadsConfig,
    *,
    seq_len: int,
    micro_batch_size: int,
    precision: str,
    zero_stage: int,
    dp_size: int,
    micro_batches: int = 1,
    recompute: str = "none",
    tensor: int = 1,
    sequence_parallel: bool = False,
    offload_optimizer: bool = False,
    held: Sequence[HeldLayers] | None = None,
) -> MemoryEstimate:
    """Peak of a training step on a rank that holds the layers ``held``, split over ``tensor`` ranks.

    ``held`` defaults to the whole model. ``micro_batches`` is the rank's number per optimizer step. With
    ``offload_optimizer`` the optimizer's states are in host memory and count 0 here.
    """
    mode = heads.mode_under(zero_stage)
    held = held or [HeldLayers(0, config.n_trunk_layers + 2)]
    holds_heads = any(part.end == config.n_trunk_layers + 2 for part in held)
    layers = layer_parameters(config, tensor)
    count = sum(sum(layers[part.begin : part.end]) for part in held)
    width = 4 if precision == "fp32" else 2
    tokens = seq_len * micro_batch_size

    weights = width * count // (dp_size if zero_stage == 3 else 1)
    # bf16: their sum in fp32, and the micro-batch's own, which ZeRO-1 without offload adds one by one and frees.
    own = 0 if precision == "bf16" and zero_stage == 1 and not offload_optimizer else width
    gradients = (own + (4 if precision == "bf16" else 0)) * count // (dp_size if zero_stage >= 2 else 1)
    # ZeRO-1 keeps its own fp32 masters and two moments, 1/dp of each; ZeRO-0 updates the weights in place.
    optimizer = 0 if offload_optimizer else (12 if zero_stage else 8) * count // (dp_size if zero_stage else 1)

    kept = block_activation_values(config, recompute, tensor, sequence_parallel)
    values = sum(part.in_flight * _trunk_blocks(config, part) for part in held) * kept
    # One block at a time: the one that is computed again, or (sequential) the one head that runs.
    whole_block = block_activation_values(config, "none", tensor, sequence_parallel)
    at_a_time = whole_block if recompute == "full" else whole_block - kept
    between, ffn = _between_layers(config, tensor, sequence_parallel), share(config.hidden_dim, tensor)

    loss_buffers = 0
    if holds_heads:
        final_norm = 2 * between  # its input, and that normalised
        if mode == "sequential":
            # And the head's output, its gradient, and that of the trunk's output, summed.
            at_a_time = whole_block + final_norm + 3 * between
        else:
            # joint: and the heads' hidden states side by side, and their gradients.
            hidden = 2 * config.dim if mode == "joint" else 0
            values += config.n_future_tokens * (kept + final_norm + hidden)
        loss_buffers = _loss_bytes(config, heads, mode, tokens, width, tensor)
        table, n_tables = table_parameters(config, tensor), config.n_unembeddings
        # Sequential heads add to the accumulated gradients themselves where these are whole tensors on the device.
        if not (mode == "sequential" and zero_stage <= 1 and not offload_optimizer):
            if precision == "bf16" and mode != "naive":
                # An unembedding's gradient is summed in fp32; joint narrows each before it begins the next.
                loss_buffers += 4 * table * (n_tables if mode == "sequential" else 1)
            # Stored from the heads' forward pass to backward, beside those of earlier micro-batches (or ZeRO's share).
            if micro_batches > 1 or zero_stage >= 2:
                gradients += width * {"sequential": layers[-1], "joint": n_tables * table, "naive": 0}[mode]
    return MemoryEstimate(
        weights,
        gradients,
        optimizer,
        activations=tokens * (values + at_a_time) * width,
        # Where the feed-forward is multiplied: gradients of gate and up beside all that was kept, that of the block's
        # output, and a weight's gradient before it is added to the others.
        temporaries=width * (tokens * (2 * ffn + between) + config.dim * ffn),
        loss_buffers=loss_buffers,
        communication=tokens * between * width * _pipeline_messages(config, held)
        + _zero_buffers(zero_stage, precision, width, count),
    )


def block_activation_values(
    config: ModelConfig, recompute: str = "none", tensor: int = 1, sequence_parallel: bool = False
) -> int:
    """Values per token that one of ``tensor`` ranks keeps of one block for its backward pass.

    Held between layers, whole or a slice of the sequence: the norms' inputs, outputs and what lies between (6 dim; a
    fused norm keeps 4). Split: q and k after rotary, v, the attention's output, and gate, silu(gate), up and their
    product. Full recomputation keeps the block's input alone; selective all but what lies between the attention's
    input and output. The scores, which fused attention never writes, are counted nowhere.
    """
    between = _between_layers(config, tensor, sequence_parallel)
    if recompute == "full":
        return between
    attention = 0 if recompute == "selective" else 2 * share(config.dim, tensor) + 2 * kv_width(config, tensor)
    return 6 * between + attention + 4 * share(config.hidden_dim, tensor)


def _pipeline_messages(config: ModelConfig, held: Sequence[HeldLayers]) -> int:
    """Hidden states that a pipeline rank holds beside its layers' own: each output until its backward pass, gradients.

    Nothing where the layers are all held: there is no pipeline.
    """
    if sum(part.end - part.begin for part in held) == config.n_trunk_layers + 2:
        return 0
    return sum(part.in_flight + 1 for part in held)


def _zero_buffers(zero_stage: int, precision: str, width: int, count: int) -> int:
    """Bytes of the buckets in which gradients travel and, under ZeRO-3, of ``count`` weights that are gathered."""
    if zero_stage == 0 or (zero_stage == 1 and precision == "bf16"):  # it sends them after the backward passes
        return 0
    if zero_stage < 3:
        return width * BUCKET
    return 4 * BUCKET + width * min(count, LIVE_VALUES)


def _between_layers(config: ModelConfig, tensor: int, sequence_parallel: bool) -> int:
    return share(config.dim, tensor) if sequence_parallel else config.dim


def _trunk_blocks(config: ModelConfig, part: HeldLayers) -> int:
    return max(0, min(part.end, config.n_trunk_layers + 1) - max(part.begin, 1))


def _loss_bytes(config: ModelConfig, heads: HeadsConfig, mode: str, tokens: int, width: int, tensor: int) -> int:
    """A chunk's fp32 logits; in bf16 their copy in the GEMM's dtype, too, and its part of the unembedding's gradient.

    naive keeps logits, log-softmax and their gradient.
    """
    rows = min(config.vocab_size, share(config.padded_vocab_size, tensor))
    if mode == "naive":
        return tokens * config.n_future_tokens * rows * 12
    chunk = min(tokens, heads.chunk)
    return 4 * chunk * rows + (2 * (chunk + config.dim) * rows if width == 2 else 0)
