"""Keys and values of the positions that a batch has seen, allocated once.

A row is a sequence. Position p of a row lies in slot p; what lies in slots beyond a row's length is never looked at
and overwritten later, so a rejected draft is taken back by not counting it.
"""

import torch
from torch import Tensor

from megamtp.model.transformer import ModelConfig


class KVCache:
    """Of ``n_layers`` blocks and ``n_rows`` sequences of at most ``capacity`` positions; g key/value heads of hd."""

    def __init__(
        self, config: ModelConfig, n_layers: int, n_rows: int, capacity: int, dtype: torch.dtype, device: torch.device
    ):
        shape = (n_layers, n_rows, capacity, 2 * config.kv_heads, config.head_dim)  # keys, then values
        self.blocks = list(torch.zeros(shape, dtype=dtype, device=device))  # (rows, capacity, 2g, hd) each
        self.n_rows, self.capacity, self.n_kv_heads = n_rows, capacity, config.kv_heads

    def write(self, layer: int, rows: Tensor, slots: Tensor, keys_values: Tensor) -> None:
        """Put keys_values (b, t, 2g, hd) into ``slots`` (b, t) of ``rows`` (b, 1)."""
        self.blocks[layer].index_put_((rows, slots), keys_values)

    def read(self, layer: int, first_row: int, n_rows: int, n_slots: int) -> tuple[Tensor, Tensor]:
        """Keys and values (rows, g, slots, hd), views."""
        both = self.blocks[layer][first_row : first_row + n_rows, :n_slots].transpose(1, 2)
        return both[:, : self.n_kv_heads], both[:, self.n_kv_heads :]

    def move(self, layers: range, row: int, sources: list[int], first: int) -> None:
        """Copy the slots ``sources`` of a row to the slots from ``first`` on."""
        for block in self.blocks[layers.start : layers.stop]:
            block[row, first : first + len(sources)] = block[row, sources]

    def move_row(self, source: int, target: int, n_slots: int) -> None:
        """Copy the first ``n_slots`` of a row over another's."""
        for block in self.blocks:
            block[target, :n_slots] = block[source, :n_slots]
