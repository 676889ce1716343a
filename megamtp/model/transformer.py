"""A Llama block, top to bottom: norm, attention with rotary positions, SwiGLU feed-forward, residuals.

Shapes, the same letters everywhere: b batch, s sequence, d dim, h query heads, g key/value heads, hd head_dim,
f ffn_dim. Under tensor parallelism h, g and f are this rank's share; under sequence parallelism (b, s, d) between
attention and feed-forward is this rank's slice (b, s / tp, d). A block does not know its depth.
"""

from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megamtp.config import REQUIRED, config_dataclass, option
from megamtp.ops.attention import Documents, attention, attention_backend
from megamtp.ops.choice import OpsConfig, backend
from megamtp.ops.elementwise import elementwise_backend, rotary_table
from megamtp.ops.norm import norm_backend
from megamtp.parallel.layers import ColumnParallel, Layer, RowParallel, column_parallel
from megamtp.parallel.tensor import WHOLE, TensorParallel

PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]


@config_dataclass
class ModelConfig:
    """The architecture. Two runs whose values here are equal can exchange checkpoints."""

    vocab_size: PositiveInt = option(REQUIRED, "tokens of the vocabulary; padding is added by vocab_multiple")
    dim: PositiveInt = option(REQUIRED, "width of the residual stream")
    n_layers: PositiveInt = option(REQUIRED, "layers as the paper counts: trunk layers + heads")
    n_heads: PositiveInt = option(REQUIRED, "query heads")
    n_kv_heads: PositiveInt | None = option(None, "key/value heads; null = n_heads")
    n_future_tokens: PositiveInt = option(1, "heads; head k predicts the k-th next token; 1 is a plain Llama")
    replicated_unembedding: bool = option(
        False, "an unembedding for each head, as the paper's byte-level models have; false = one that all heads share"
    )
    ffn_dim: PositiveInt | None = option(None, "feed-forward width; null = 8/3 dim rounded up to a multiple of 256")
    norm_eps: PositiveFloat = option(1e-5, "added to the mean square in RMSNorm")
    rope_theta: PositiveFloat = option(10000.0, "base of the rotary frequencies")
    vocab_multiple: PositiveInt = option(128, "the vocabulary is padded to a multiple of this")
    init_std: PositiveFloat = option(0.02, "standard deviation of the initial weights")

    def __post_init__(self):
        if self.n_future_tokens >= self.n_layers:
            raise ValueError(
                f"n_future_tokens {self.n_future_tokens} must be smaller than n_layers {self.n_layers}: "
                "each head takes one layer, and the trunk needs at least one"
            )
        if self.dim % self.n_heads:
            raise ValueError(f"dim {self.dim} must be a multiple of n_heads {self.n_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} (dim / n_heads) must be even: rotary turns pairs")
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_heads {self.n_heads} must be a multiple of n_kv_heads {self.n_kv_heads}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def hidden_dim(self) -> int:
        """f: the paper's 11008 at 4096 and 13824 at 5120 where ffn_dim is not given."""
        return self.ffn_dim or -(-(8 * self.dim // 3) // 256) * 256

    @property
    def n_trunk_layers(self) -> int:
        return self.n_layers - self.n_future_tokens

    @property
    def n_unembeddings(self) -> int:
        return self.n_future_tokens if self.replicated_unembedding else 1

    def unembedding_name(self, k: int) -> str:
        """Logical name of the matrix that the 0-based head k uses."""
        return f"output.{k}.weight" if self.replicated_unembedding else "output.weight"

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


class BlockInputs(NamedTuple):
    """What every block of a micro-batch shares: the rotary table and, where documents are masked, who sees whom."""

    rotary: tuple[Tensor, Tensor]  # cos, sin: (b or 1, s, 1, hd / 2)
    documents: Documents | None


def block_inputs(
    config: ModelConfig,
    ops: OpsConfig,
    seq_len: int,
    device: torch.device,
    positions: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> BlockInputs:
    """Prepare, once per micro-batch, what the blocks need; positions and document_ids are (b, s)."""
    if positions is None:
        positions = torch.arange(seq_len, device=device)
    rotary = rotary_table(positions, config.head_dim, config.rope_theta)
    documents = None
    if document_ids is not None:
        documents = attention_backend(backend(ops, "attention")).prepare(document_ids)
    return BlockInputs(rotary, documents)


class RMSNorm(Layer):
    def __init__(self, config: ModelConfig, ops: OpsConfig, tp: TensorParallel = WHOLE):
        super().__init__(tp.replicated((config.dim,)))
        self.eps, self.tp, self.norm = config.norm_eps, tp, norm_backend(backend(ops, "norm"))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, self.tp.replicated_weight(self.weight), self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, ops: OpsConfig, tp: TensorParallel = WHOLE):
        super().__init__()
        self.head_dim, self.tp = config.head_dim, tp
        self.backend, self.recompute = attention_backend(backend(ops, "attention")), ops.recompute == "selective"
        self.rotary = elementwise_backend(backend(ops, "elementwise")).rotary
        self.wq = ColumnParallel(config.dim, config.n_heads * config.head_dim, tp)
        self.wk = ColumnParallel(config.dim, config.kv_heads * config.head_dim, tp, kv=True)
        self.wv = ColumnParallel(config.dim, config.kv_heads * config.head_dim, tp, kv=True)
        self.wo = RowParallel(config.n_heads * config.head_dim, config.dim, tp)

    def forward(self, x: Tensor, inputs: BlockInputs) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            # With the projections: fused attention keeps no scores, so that it alone would save nothing.
            return checkpoint(self._forward, x, inputs, use_reentrant=False, preserve_rng_state=False)
        return self._forward(x, inputs)

    def _forward(self, x: Tensor, inputs: BlockInputs) -> Tensor:
        q, k, v = column_parallel(x, self.tp, self.wq, self.wk, self.wv)
        q = self.rotary(q.unflatten(-1, (-1, self.head_dim)), inputs.rotary)  # (b, s, h, hd)
        k = self.rotary(k.unflatten(-1, (-1, self.head_dim)), inputs.rotary)  # (b, s, g, hd)
        v = v.unflatten(-1, (-1, self.head_dim))  # (b, s, g, hd)
        out = attention(q, k, v, backend=self.backend, documents=inputs.documents)  # (b, s, h, hd)
        return self.wo(out.flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig, ops: OpsConfig, tp: TensorParallel = WHOLE):
        super().__init__()
        self.tp, self.swiglu = tp, elementwise_backend(backend(ops, "elementwise")).swiglu
        self.w1 = ColumnParallel(config.dim, config.hidden_dim, tp)  # gate
        self.w2 = RowParallel(config.hidden_dim, config.dim, tp)  # down
        self.w3 = ColumnParallel(config.dim, config.hidden_dim, tp)  # up

    def forward(self, x: Tensor) -> Tensor:
        gate, up = column_parallel(x, self.tp, self.w1, self.w3)
        return self.w2(self.swiglu(gate, up))


class Block(nn.Module):
    """One transformer layer, of the trunk or a whole head: (b, s, d) -> (b, s, d)."""

    def __init__(self, config: ModelConfig, ops: OpsConfig, tp: TensorParallel = WHOLE):
        super().__init__()
        self.recompute = ops.recompute == "full"
        self.attention_norm = RMSNorm(config, ops, tp)
        self.attention = Attention(config, ops, tp)
        self.ffn_norm = RMSNorm(config, ops, tp)
        self.feed_forward = FeedForward(config, ops, tp)
        if ops.compile:  # blocks of one shape share what is compiled
            self.compile(fullgraph=True, dynamic=False)

    def forward(self, x: Tensor, inputs: BlockInputs) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._forward, x, inputs, use_reentrant=False, preserve_rng_state=False)
        return self._forward(x, inputs)

    def _forward(self, x: Tensor, inputs: BlockInputs) -> Tensor:
        x = x + self.attention(self.attention_norm(x), inputs)
        return x + self.feed_forward(self.ffn_norm(x))
