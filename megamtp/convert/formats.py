"""How other programs name and order our parameters: one table a format, read in both directions.

A block, of the trunk or a whole head, has the same parameters everywhere; a format says what they are called, where
the blocks of trunk + head 1 lie, where those of heads 2..n, and which rows of q and k rotary positions pair.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megamtp.errors import UserError
from megamtp.model.initialize import kind_of
from megamtp.model.transformer import ModelConfig

VOCABULARY_TABLES = ("tok_embeddings", "output")  # kinds whose rows are padded to padded_vocab_size here


@dataclass(frozen=True)
class Format:
    """Logical name -> the format's name, of a table or norm (``top``) and of what is in a block (``inner``).

    The last of ``top`` is the unembedding: that of all heads, or of head 1.
    """

    top: dict[str, str]
    inner: dict[str, str]
    block: str  # prefix of the blocks of the trunk and, after them, head 1; {i} counts them
    extra_head: str  # prefix of heads 2..n; {j} = 0 is head 2
    extra_output: str | None  # an unembedding of one of heads 2..n alone; None: the format has no such
    interleaved_rotary: bool  # pairs (2i, 2i + 1) of a head's rows; else halves (i, i + head_dim / 2), as here

    def names(self, config: ModelConfig) -> dict[str, str]:
        """Logical name -> the format's name of every parameter, in the order of the model; heads 2..n come last.

        ``UserError`` for heads with unembeddings of their own where the format has no place for them.
        """
        blocks = [(f"layers.{i}", self.block.format(i=i)) for i in range(config.n_trunk_layers)]
        blocks.append(("heads.0", self.block.format(i=config.n_trunk_layers)))
        extra = [(f"heads.{j + 1}", self.extra_head.format(j=j)) for j in range(config.n_future_tokens - 1)]
        first, *others, (_, output) = self.top.items()
        others.append((config.unembedding_name(0), output))
        return dict([first, *self._inside(blocks), *others, *self._inside(extra), *self._extra_outputs(config)])

    def _extra_outputs(self, config: ModelConfig) -> list[tuple[str, str]]:
        if config.n_unembeddings == 1:
            return []
        if self.extra_output is None:
            raise UserError(
                f"model.replicated_unembedding: a format with one unembedding cannot hold {config.n_unembeddings}; "
                "export to Hugging Face's"
            )
        heads = range(1, config.n_unembeddings)
        return [(config.unembedding_name(k), self.extra_output.format(j=k - 1)) for k in heads]

    def _inside(self, blocks: list[tuple[str, str]]) -> list[tuple[str, str]]:
        inner = self.inner.items()
        return [(f"{ours}.{name}", f"{theirs}.{their}") for ours, theirs in blocks for name, their in inner]

    def rows(self, tensor: Tensor, name: str, start: int, stop: int, head_dim: int) -> Tensor:
        """Rows [start, stop) of the logical parameter ``name``, which ``tensor`` holds in this format's order."""
        if self.interleaved_rotary and name.endswith(("attention.wq.weight", "attention.wk.weight")):
            return tensor[halves_of_interleaved(start, stop, head_dim)]
        return tensor[start:stop]


_INNER_LLAMA = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
}

LLAMA = Format(
    top={
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    },
    inner=_INNER_LLAMA,
    block="model.layers.{i}",
    extra_head="extra_heads.{j}",
    extra_output="extra_lm_heads.{j}.weight",
    interleaved_rotary=False,
)

META = Format(
    top={name: name for name in LLAMA.top},
    inner={name: name for name in _INNER_LLAMA},
    block="layers.{i}",
    extra_head="extra_heads.{j}",
    extra_output=None,
    interleaved_rotary=True,
)


def halves_of_interleaved(start: int, stop: int, head_dim: int) -> Tensor:
    """Where rows [start, stop) of q or k in our order lie in a tensor whose rotary pairs are interleaved: (rows,)."""
    row = torch.arange(start, stop)
    place = row % head_dim
    half = head_dim // 2
    return row - place + torch.where(place < half, 2 * place, 2 * (place - half) + 1)


def extra_head(name: str) -> bool:
    """Whether the logical parameter ``name`` is of one of the heads 2..n."""
    kind, number, *_ = name.split(".")
    return kind in ("heads", "output") and number.isdigit() and number != "0"


def logical_names(config: ModelConfig) -> list[str]:
    """Every parameter, in the order of the model; heads 2..n come last."""
    return list(LLAMA.names(config))


def logical_shape(name: str, config: ModelConfig) -> tuple[int, ...]:
    """Of a logical parameter, the vocabulary tables with vocab_size rows: no padding."""
    return _shape(name, config, config.vocab_size)


def padded_shape(name: str, config: ModelConfig) -> tuple[int, ...]:
    """As the model and its checkpoints have it, the vocabulary tables with padded_vocab_size rows."""
    return _shape(name, config, config.padded_vocab_size)


def _shape(name: str, config: ModelConfig, vocab_size: int) -> tuple[int, ...]:
    d, f = config.dim, config.hidden_dim
    shapes = {"wq": (d, d), "wo": (d, d), "w2": (d, f)} | dict.fromkeys(("w1", "w3"), (f, d))
    shapes |= dict.fromkeys(("wk", "wv"), (config.kv_heads * config.head_dim, d))
    shapes |= dict.fromkeys(VOCABULARY_TABLES, (vocab_size, d))
    return shapes.get(kind_of(name), (d,))
