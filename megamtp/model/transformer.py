"""A Llama block, top to bottom: norm, attention with rotary positions, SwiGLU feed-forward, residuals.

Shapes, the same letters everywhere: b batch, s sequence, d dim, h query heads, g key/value heads, hd head_dim,
f ffn_dim. A block knows neither its depth nor how it is parallelised.
"""

from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from megamtp.config import REQUIRED, config_dataclass, option
from megamtp.ops.attention import ATTENTION_BACKENDS, Documents, attention
from megamtp.ops.elementwise import apply_rotary, rotary_table, swiglu
from megamtp.ops.norm import rms_norm

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
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


class BlockInputs(NamedTuple):
    """What every block of a micro-batch shares: the rotary table and, where documents are masked, who sees whom."""

    rotary: tuple[Tensor, Tensor]  # cos, sin: (b or 1, s, 1, hd / 2)
    documents: Documents | None


def block_inputs(
    config: ModelConfig,
    attention_backend: str,
    tokens: Tensor,
    positions: Tensor | None,
    document_ids: Tensor | None,
) -> BlockInputs:
    """Prepare, once per micro-batch, what the blocks need; tokens, positions and document_ids are (b, s)."""
    if positions is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
    rotary = rotary_table(positions, config.head_dim, config.rope_theta)
    documents = None if document_ids is None else ATTENTION_BACKENDS[attention_backend].prepare(document_ids)
    return BlockInputs(rotary, documents)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Linear(nn.Module):
    """x (..., d_in) -> (..., d_out), no bias."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, backend: str):
        super().__init__()
        self.head_dim = config.head_dim
        self.backend = ATTENTION_BACKENDS[backend]
        self.wq = Linear(config.dim, config.n_heads * config.head_dim)
        self.wk = Linear(config.dim, config.kv_heads * config.head_dim)
        self.wv = Linear(config.dim, config.kv_heads * config.head_dim)
        self.wo = Linear(config.n_heads * config.head_dim, config.dim)

    def forward(self, x: Tensor, inputs: BlockInputs) -> Tensor:
        q = self.wq(x).unflatten(-1, (-1, self.head_dim))  # (b, s, h, hd)
        k = self.wk(x).unflatten(-1, (-1, self.head_dim))  # (b, s, g, hd)
        v = self.wv(x).unflatten(-1, (-1, self.head_dim))  # (b, s, g, hd)
        q, k = apply_rotary(q, inputs.rotary), apply_rotary(k, inputs.rotary)
        out = attention(q, k, v, backend=self.backend, documents=inputs.documents)  # (b, s, h, hd)
        return self.wo(out.flatten(-2))  # (b, s, d)


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w1 = Linear(config.dim, config.hidden_dim)  # gate
        self.w2 = Linear(config.hidden_dim, config.dim)  # down
        self.w3 = Linear(config.dim, config.hidden_dim)  # up

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(swiglu(self.w1(x), self.w3(x)))


class Block(nn.Module):
    """One transformer layer, of the trunk or a whole head: (b, s, d) -> (b, s, d)."""

    def __init__(self, config: ModelConfig, attention_backend: str):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, attention_backend)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, inputs: BlockInputs) -> Tensor:
        x = x + self.attention(self.attention_norm(x), inputs)
        return x + self.feed_forward(self.ffn_norm(x))


class Embedding(nn.Module):
    """tokens (b, s) -> (b, s, d)."""

    def __init__(self, n_rows: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_rows, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


AttentionBackendName = Literal["sdpa", "reference"]
Recompute = Literal["none", "selective", "full"]
