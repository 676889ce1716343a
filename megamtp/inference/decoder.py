"""The forward pass of decoding: only new positions are computed, keys and values of the others come from the cache.

The same model as ``megamtp.model``, laid out for few positions at a time: products that read the same input are one
product, and rotary pairs lie side by side, so that turning them is one complex multiplication. On any device, in any
dtype; ``megamtp.inference.native`` is faster on a CPU in fp32. Shapes: b rows, t new positions, d dim, h query heads,
g key/value heads, r = h / g, hd head_dim, f ffn_dim, V vocabulary without padding.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from megamtp.inference.cache import KVCache
from megamtp.inference.tree import Tree
from megamtp.model.transformer import ModelConfig
from megamtp.ops.elementwise import rotary_table, swiglu


@dataclass(frozen=True)
class Positions:
    """New positions of some rows of a cache, prepared once for all blocks."""

    first_row: int
    rows: Tensor  # (b, 1) of the cache
    slots: Tensor  # (b, t) where their keys and values go
    rotary: Tensor  # (b, t, 1, hd / 2) complex
    n_slots: int  # that any of them may look at
    mask: Tensor | None  # (b, 1, r * t or 1, n_slots), added to the scores; None = all slots
    is_prompt: bool = False  # nothing lies in the cache before them: causal attention among themselves


class BlockWeights:
    """One transformer block, its products fused."""

    def __init__(self, prefix: str, config: ModelConfig, tensor: Callable[[str], Tensor]):
        def of(*names: str) -> Tensor:
            return torch.cat([tensor(f"{prefix}.{name}.weight") for name in names])

        n_rotated = (config.n_heads + config.kv_heads) * config.head_dim
        wqkv = of("attention.wq", "attention.wk", "attention.wv")  # ((h + 2g) hd, d)
        # From halves (i, i + hd / 2) to neighbours (2i, 2i + 1): scores do not change, as q and k change alike.
        turned = wqkv[:n_rotated].unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2)
        wqkv[:n_rotated] = turned.flatten(0, 2)
        n_queries = config.n_heads * config.head_dim
        self.wqkv, self.wq, self.wkv = wqkv, wqkv[:n_queries], wqkv[n_queries:]
        self.wo = of("attention.wo")
        self.w13 = of("feed_forward.w1", "feed_forward.w3")  # (2f, d)
        self.w2 = of("feed_forward.w2")
        self.attention_norm, self.ffn_norm = of("attention_norm"), of("ffn_norm")


class Decoder:
    """Weights of trunk and heads, and the forward passes over them.

    ``tensor`` gives a logical parameter (vocabulary tables with or without padding rows) in the dtype and on the device
    to compute in. Layers of a cache are counted trunk first, then the heads.
    """

    always_masks = False  # even where all slots that are read count

    def __init__(self, config: ModelConfig, tensor: Callable[[str], Tensor], context: int):
        self.config, self.context = config, context
        self.embedding = tensor("tok_embeddings.weight")[: config.vocab_size]
        names = [config.unembedding_name(k) for k in range(config.n_unembeddings)]
        self.unembeddings = [tensor(name)[: config.vocab_size] for name in names]  # one, or one for each head
        self.dtype, self.device = self.embedding.dtype, self.embedding.device
        self.norm_weight = tensor("norm.weight")
        names = [*(f"layers.{i}" for i in range(config.n_trunk_layers)), *(f"heads.{k}" for k in range(self.n_heads))]
        self.blocks = [BlockWeights(name, config, tensor) for name in names]
        self._angles = _complex_angles(config, context, self.dtype, self.device)

    @property
    def n_heads(self) -> int:
        return self.config.n_future_tokens

    def new_cache(self, n_rows: int, capacity: int, n_draft_heads: int) -> KVCache:
        """For the trunk, head 1 and the next ``n_draft_heads`` heads."""
        n_layers = self.config.n_trunk_layers + 1 + n_draft_heads
        if capacity > len(self._angles):  # drafts may reach past the context
            self._angles = _complex_angles(self.config, capacity, self.dtype, self.device)
        return KVCache(self.config, n_layers, n_rows, capacity, self.dtype, self.device)

    def prompt_positions(self, row: int, n_tokens: int) -> Positions:
        """Positions 0 ... n_tokens - 1 of an empty row."""
        slots = torch.arange(n_tokens, device=self.device)[None]
        rows = torch.full((1, 1), row, device=self.device)
        return Positions(row, rows, slots, self._angles[:n_tokens][None, :, None], n_tokens, None, is_prompt=True)

    def next_positions(self, lengths: list[int], n_new: int, tree: Tree | None = None) -> Positions:
        """``n_new`` positions behind each of the first rows of a cache, whose ``lengths`` are given.

        Each sees the positions before it, or, in a ``tree``, its ancestors; then its depth is its rotary position.
        """
        at = torch.tensor(lengths, device=self.device)[:, None]  # (b, 1)
        slots = at + torch.arange(n_new, device=self.device)
        n_slots = self._slots_to_read(max(lengths) + n_new)
        seen = torch.arange(n_slots, device=self.device)
        mask = None
        if tree is not None:
            sees = (seen < at).unsqueeze(1).repeat(1, n_new, 1)  # (b, t, n_slots)
            sees.scatter_(2, slots.unsqueeze(1).expand(-1, n_new, -1), tree.ancestors.expand(len(lengths), -1, -1))
            mask = self._added(sees)
        elif self.always_masks or n_new > 1 or n_slots > min(lengths) + n_new:
            mask = self._added(seen <= slots.unsqueeze(-1))
        places = slots if tree is None else at + tree.depths
        return self._positions(slots, places, n_slots, mask)

    def path_positions(self, lengths: list[int], counts: list[int]) -> Positions:
        """max(counts) positions behind each of the first rows, of which the ``counts[b]``-th alone looks back."""
        at = torch.tensor(lengths, device=self.device)[:, None]
        slots = at + torch.arange(max(counts), device=self.device)
        ends = [length + count for length, count in zip(lengths, counts, strict=True)]
        n_slots, mask = self._slots_to_read(max(ends)), None
        if self.always_masks or n_slots > min(ends):
            seen = torch.arange(n_slots, device=self.device)
            mask = self._added((seen < torch.tensor(ends, device=self.device)[:, None]).unsqueeze(1), copies=1)
        return self._positions(slots, slots, n_slots, mask)

    def _slots_to_read(self, n_slots: int) -> int:
        """Of each row, where ``n_slots`` are wanted."""
        return n_slots

    def _positions(self, slots: Tensor, places: Tensor, n_slots: int, mask: Tensor | None) -> Positions:
        rows = torch.arange(len(slots), device=self.device)[:, None]
        return Positions(0, rows, slots, self._angles[places].unsqueeze(2), n_slots, mask)

    def _added(self, sees: Tensor, copies: int = 0) -> Tensor:
        """(b, t, slots) bool -> (b, 1, r * t, slots) to add to scores, a copy for each query head of a group."""
        copies = copies or self.config.n_heads // self.config.kv_heads
        mask = torch.zeros(sees.shape, dtype=self.dtype, device=self.device).masked_fill_(~sees, -torch.inf)
        return mask.unsqueeze(1).repeat(1, copies, 1, 1).flatten(1, 2).unsqueeze(1)

    def trunk(self, tokens: Tensor, at: Positions, cache: KVCache) -> Tensor:
        """tokens (b, t) -> z (b, t, d)."""
        z = F.embedding(tokens, self.embedding)
        for layer in range(self.config.n_trunk_layers):
            z = self._block(layer, z, at, cache)
        return z

    def head_1(self, z: Tensor, at: Positions, cache: KVCache) -> Tensor:
        """z (b, t, d) -> logits of the next token (b, t, V)."""
        return self._logits(0, self._block(self.config.n_trunk_layers, z, at, cache))

    def head_1_at_end(self, z: Tensor, at: Positions, cache: KVCache) -> Tensor:
        """As ``head_1``, for the last position alone: (b, 1, V)."""
        last = torch.full((len(z),), z.shape[1] - 1, device=self.device)
        return self._logits(0, self._block_at(self.config.n_trunk_layers, z, at, last, cache))

    def draft(self, z: Tensor, at: Positions, counts: list[int], n_heads: int, cache: KVCache) -> Tensor:
        """What heads 2 ... n_heads + 1 predict from the ``counts[b]``-th position of z (b, t, d): (b, n_heads, V).

        The other positions leave only their keys and values; ``at`` is of ``path_positions`` or of a prompt.
        """
        return self._drafts(z, at, torch.tensor(counts, device=self.device) - 1, n_heads, cache)

    def _drafts(self, z: Tensor, at: Positions, last: Tensor, n_heads: int, cache: KVCache) -> Tensor:
        first = self.config.n_trunk_layers + 1
        hidden = [self._block_at(first + k, z, at, last, cache) for k in range(n_heads)]
        if len(self.unembeddings) == 1:  # one product for all
            return self._logits(0, torch.cat(hidden, 1))
        return torch.cat([self._logits(k, x) for k, x in enumerate(hidden, start=1)], 1)

    def all_heads(self, tokens: Tensor) -> Tensor:
        """Logits of every head at every position of tokens (1, t): (n, t, V), without what came before."""
        at, cache = self.prompt_positions(0, tokens.shape[1]), self.new_cache(1, tokens.shape[1], self.n_heads - 1)
        z = self.trunk(tokens, at, cache)
        first = self.config.n_trunk_layers
        return torch.cat([self._logits(k, self._block(first + k, z, at, cache)) for k in range(self.n_heads)])

    def _block(self, layer: int, x: Tensor, at: Positions, cache: KVCache) -> Tensor:
        weights, config = self.blocks[layer], self.config
        b, t, _ = x.shape
        qkv = F.linear(self._norm(x, weights.attention_norm), weights.wqkv).view(b, t, -1, config.head_dim)
        n_rotated = config.n_heads + config.kv_heads
        _rotate_(qkv[:, :, :n_rotated], at.rotary)
        cache.write(layer, at.rows, at.slots, qkv[:, :, config.n_heads :])
        if at.is_prompt:
            q, k, v = qkv.transpose(1, 2).split((config.n_heads, config.kv_heads, config.kv_heads), 1)
            grouped = config.kv_heads != config.n_heads
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)  # (b, h, t, hd)
            out = out.transpose(1, 2).reshape(b, t, -1)
        else:
            out = self._attend(qkv[:, :, : config.n_heads], layer, at, cache)
        return self._feed_forward(x + F.linear(out, weights.wo), weights)

    def _block_at(self, layer: int, x: Tensor, at: Positions, last: Tensor, cache: KVCache) -> Tensor:
        """``_block`` whose output is wanted at one position a row: (b, t, d) -> (b, 1, d)."""
        weights, config = self.blocks[layer], self.config
        b, t, _ = x.shape
        normed = self._norm(x, weights.attention_norm)
        kv = F.linear(normed, weights.wkv).view(b, t, -1, config.head_dim)
        _rotate_(kv[:, :, : config.kv_heads], at.rotary)
        cache.write(layer, at.rows, at.slots, kv)
        here = torch.arange(b, device=self.device)[:, None], last[:, None]
        q = F.linear(normed[here], weights.wq).view(b, 1, -1, config.head_dim)
        _rotate_(q, at.rotary[here])
        out = self._attend(q, layer, at, cache)
        return self._feed_forward(x[here] + F.linear(out, weights.wo), weights)

    def _attend(self, q: Tensor, layer: int, at: Positions, cache: KVCache) -> Tensor:
        """q (b, t, h, hd) -> (b, t, h hd). Query heads that share keys and values count as more queries of one head."""
        b, t, h, hd = q.shape
        k, v = cache.read(layer, at.first_row, b, at.n_slots)
        g = k.shape[1]
        q = q.unflatten(2, (g, h // g)).permute(0, 2, 3, 1, 4).reshape(b, g, h // g * t, hd)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=at.mask)
        return out.unflatten(2, (h // g, t)).permute(0, 3, 1, 2, 4).reshape(b, t, h * hd)

    def _feed_forward(self, x: Tensor, weights: BlockWeights) -> Tensor:
        gate, up = F.linear(self._norm(x, weights.ffn_norm), weights.w13).chunk(2, -1)
        return x + F.linear(swiglu(gate, up), weights.w2)

    def _logits(self, k: int, x: Tensor) -> Tensor:
        """What the 0-based head k makes of its block's output x (b, t, d): (b, t, V)."""
        unembedding = self.unembeddings[k % len(self.unembeddings)]
        return F.linear(self._norm(x, self.norm_weight), unembedding)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config.norm_eps)


def _complex_angles(config: ModelConfig, n_positions: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(positions, hd / 2): cos + i sin of the model's own fp32 table."""
    table = rotary_table(torch.arange(n_positions, device=device), config.head_dim, config.rope_theta)
    wide = torch.promote_types(dtype, torch.float32)
    return torch.complex(*(half[0, :, 0].to(wide) for half in table))


def _rotate_(x: Tensor, rotary: Tensor) -> None:
    """Turn the neighbouring pairs of x (b, t, heads, hd) in place, in fp32 or wider."""
    if x.dtype.itemsize >= 4:
        x.view(rotary.dtype).mul_(rotary)
    else:
        x.copy_(torch.view_as_real(torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * rotary).flatten(-2))
