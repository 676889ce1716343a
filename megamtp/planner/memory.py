"""Bytes that one rank needs for a training step, before it is launched."""

from dataclasses import dataclass

from megamtp.model.cost import parameters
from megamtp.model.heads import HeadsConfig
from megamtp.model.transformer import ModelConfig


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank, by purpose. Allocator slack and libraries are not in it."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss_buffers: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss_buffers


def estimate_memory(
    config: ModelConfig,
    heads: HeadsConfig,
    *,
    seq_len: int,
    micro_batch_size: int,
    precision: str,
    zero_stage: int,
    dp_size: int,
) -> MemoryEstimate:
    """Peak of a training step without recomputation."""
    count = parameters(config).total
    width = 4 if precision == "fp32" else 2
    # ZeRO-1 keeps its own fp32 masters and two moments, 1/dp of each; ZeRO-0 updates the weights in place.
    shards = dp_size if zero_stage else 1
    optimizer = (12 if zero_stage else 8) * count // shards
    gradients = (width + (4 if precision == "bf16" else 0)) * count
    tokens = seq_len * micro_batch_size
    live_blocks = config.n_trunk_layers + (1 if heads.mode == "sequential" else config.n_future_tokens)
    activations = live_blocks * tokens * block_activation_values(config) * width
    chunk = tokens * config.n_future_tokens if heads.mode == "naive" else min(tokens, heads.chunk_tokens)
    # fp32 logits (and their copy in the GEMM's dtype); naive keeps logits, log-softmax and their gradient.
    per_logit = 12 if heads.mode == "naive" else 4 + (2 if width == 2 else 0)
    loss = chunk * config.vocab_size * per_logit
    return MemoryEstimate(width * count, gradients, optimizer, activations, loss)


def block_activation_values(config: ModelConfig) -> int:
    """Values per token that one block keeps for its backward pass.

    Norm inputs and outputs and both residual sums (6 dim), q, k before and after rotary, v, the attention's output,
    and gate, silu(gate), up and their product.
    """
    kv = config.kv_heads * config.head_dim
    return 6 * config.dim + 3 * config.dim + 3 * kv + 4 * config.hidden_dim
