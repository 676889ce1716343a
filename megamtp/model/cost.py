"""Parameters, FLOPs and bytes of a model: the one place that counts.

FLOPs are multiplications and additions of the matrix products (2 a multiply-add), causal attention counted as
the half that is used; a backward pass costs twice its forward pass. Every head's unembedding counts: that is
the honest price of n heads.
"""

from dataclasses import dataclass

from megamtp.model.transformer import ModelConfig


@dataclass(frozen=True)
class Parameters:
    """Parameters by part, counting the vocabulary's padding."""

    embedding: int
    trunk: int
    heads: int
    norm: int
    unembedding: int

    @property
    def total(self) -> int:
        return self.embedding + self.trunk + self.heads + self.norm + self.unembedding


def block_parameters(config: ModelConfig) -> int:
    """Parameters of one transformer block, of the trunk or a head."""
    attention = 2 * config.dim * config.dim + 2 * config.dim * config.kv_heads * config.head_dim
    return attention + 3 * config.dim * config.hidden_dim + 2 * config.dim


def parameters(config: ModelConfig) -> Parameters:
    """Parameters by part."""
    table = config.padded_vocab_size * config.dim
    block = block_parameters(config)
    return Parameters(table, config.n_trunk_layers * block, config.n_future_tokens * block, config.dim, table)


def block_forward_flops(config: ModelConfig, seq_len: int) -> float:
    """FLOPs per token of one block's forward pass."""
    matrices = block_parameters(config) - 2 * config.dim
    # Scores and their product with the values: 2 * 2 * dim a visible position, (s + 1) / 2 of them on average.
    return 2 * matrices + 4 * config.dim * (seq_len + 1) / 2


def unembedding_forward_flops(config: ModelConfig) -> float:
    """FLOPs per token of one head's unembedding, which skips the padding rows."""
    return 2 * config.dim * config.vocab_size


def train_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """FLOPs per token of a training step: forward and backward of all blocks and of n unembeddings."""
    forward = config.n_layers * block_forward_flops(config, seq_len)
    forward += config.n_future_tokens * unembedding_forward_flops(config)
    return 3 * forward
