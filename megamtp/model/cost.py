"""Parameters, FLOPs and bytes of a model: the one place that counts.

FLOPs are multiplications and additions of the matrix products (2 a multiply-add), causal attention counted as
the half that is used; a backward pass costs twice its forward pass. Every head's unembedding counts: that is
the honest price of n heads.
"""

from dataclasses import dataclass

from megamtp.model.transformer import ModelConfig

MACHINE_BALANCE = 300  # FLOP per byte of memory traffic


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


def share(total: int, ranks: int) -> int:
    """The largest of ``ranks`` nearly equal parts."""
    return -(-total // ranks)


def kv_width(config: ModelConfig, tensor: int = 1) -> int:
    """Rows of wk, and of wv, on one of ``tensor`` ranks; a key/value head is never split, but held more than once."""
    return share(config.kv_heads * config.head_dim, min(tensor, config.kv_heads))


def block_parameters(config: ModelConfig, tensor: int = 1) -> int:
    """Parameters of one transformer block, of the trunk or a head, on one of ``tensor`` ranks that share it."""
    attention = 2 * config.dim * share(config.dim, tensor) + 2 * config.dim * kv_width(config, tensor)
    return attention + 3 * config.dim * share(config.hidden_dim, tensor) + 2 * config.dim


def table_parameters(config: ModelConfig, tensor: int = 1) -> int:
    """Parameters of the embedding, or of an unembedding, on one of ``tensor`` ranks that share it."""
    return share(config.padded_vocab_size, tensor) * config.dim


def layer_parameters(config: ModelConfig, tensor: int = 1) -> list[int]:
    """Parameters of each layer of the model's list, on one of ``tensor`` ranks that share it.

    The list is [embedding, a trunk block each, all heads with their norm and unembeddings].
    """
    table, block = table_parameters(config, tensor), block_parameters(config, tensor)
    heads = config.n_future_tokens * block + config.dim + config.n_unembeddings * table
    return [table, *[block] * config.n_trunk_layers, heads]


def parameters(config: ModelConfig) -> Parameters:
    """Parameters by part."""
    table, block = table_parameters(config), block_parameters(config)
    heads, unembedding = config.n_future_tokens * block, config.n_unembeddings * table
    return Parameters(table, config.n_trunk_layers * block, heads, config.dim, unembedding)


def block_forward_flops(config: ModelConfig, seq_len: int) -> float:
    """FLOPs per token of one block's forward pass."""
    matrices = block_parameters(config) - 2 * config.dim
    return 2 * matrices + attention_forward_flops(config, seq_len)


def attention_forward_flops(config: ModelConfig, seq_len: int) -> float:
    """FLOPs per token of the scores and of their product with the values, in one block's forward pass."""
    # 2 * 2 * dim a visible position, (s + 1) / 2 of them on average.
    return 4 * config.dim * (seq_len + 1) / 2


def unembedding_forward_flops(config: ModelConfig) -> float:
    """FLOPs per token of one head's unembedding, which skips the padding rows."""
    return 2 * config.dim * config.vocab_size


def train_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Model FLOPs per token of a training step: forward and backward of all blocks and of n unembeddings.

    What is computed again (``layer_train_flops``) does not count: it trains nothing.
    """
    forward = config.n_layers * block_forward_flops(config, seq_len)
    forward += config.n_future_tokens * unembedding_forward_flops(config)
    return 3 * forward


def embedding_train_flops(config: ModelConfig) -> float:
    """The look-up's time, as the FLOPs per token that a device could have done in it.

    It multiplies nothing but moves memory: a row read and written in the forward pass; in the backward pass the
    gradient read, and added to its row (read and written). Five times dim values of 2 bytes, at the machine balance
    of current GPUs: the H100's 989 TFLOP/s in bf16 over 3.35 TB/s are about 300 FLOP a byte.
    """
    return 5 * 2 * config.dim * MACHINE_BALANCE


def layer_train_flops(config: ModelConfig, seq_len: int, recompute: str, heads_mode: str) -> list[float]:
    """FLOPs per token of a training step for each layer of the model's list, recomputation included.

    The list is [embedding, a trunk block each, all heads with their norm and unembeddings]. ``recompute``: "none";
    "selective", a block's attention runs forward again, "full", the whole block does, either but for its last product,
    whose result no gradient needs. Sequential heads never recompute. Without recomputation and the embedding
    (``embedding_train_flops``) the sum is ``train_flops_per_token``.
    """
    forward = block_forward_flops(config, seq_len)
    whole = forward - 2 * config.hidden_dim * config.dim
    projections = 2 * config.dim * (config.dim + 2 * kv_width(config))
    attention = projections + attention_forward_flops(config, seq_len)
    again = {"none": 0.0, "selective": attention, "full": whole}[recompute]
    head = 3 * (forward + unembedding_forward_flops(config)) + (again if heads_mode in ("joint", "naive") else 0)
    blocks = [3 * forward + again] * config.n_trunk_layers
    return [embedding_train_flops(config), *blocks, config.n_future_tokens * head]
