"""Initial values from the seed and a parameter's logical name alone, so that every layout starts the same.

Matrices are drawn from N(0, init_std^2); those that write to the residual stream (``wo``, ``w2``) are scaled
down by sqrt(2 n_layers), so that its variance does not grow with depth (Radford et al. 2019). Norms are 1.
"""

import hashlib

import torch
from torch import Tensor

from megamtp.model.transformer import ModelConfig
from megamtp.parallel.tensor import Shard

# Rows are drawn block by block, each block from its own generator: a rank that holds some rows draws only those.
ROWS_PER_BLOCK = 256


def kind_of(name: str) -> str:
    """What the parameter ``name`` is: "wq" of ``layers.0.attention.wq.weight``, "output" of ``output.3.weight``."""
    *_, kind, _weight = (part for part in name.split(".") if not part.isdigit())
    return kind


def initialize_(parameter: Tensor, name: str, config: ModelConfig, seed: int, shard: Shard | None = None) -> None:
    """Fill ``parameter``, the slice ``shard`` of the logical tensor ``name`` (default: all of it), in place.

    Raises ``ValueError`` for an unknown kind.
    """
    kind = kind_of(name)
    shard = shard or Shard(tuple(parameter.shape))
    with torch.no_grad():
        if kind in ("attention_norm", "ffn_norm", "norm"):
            parameter.fill_(1.0)
        elif kind in ("wo", "w2"):
            _normal_(parameter, name, config.init_std / (2 * config.n_layers) ** 0.5, seed, shard)
        elif kind in ("wq", "wk", "wv", "w1", "w3", "tok_embeddings", "output"):
            _normal_(parameter, name, config.init_std, seed, shard)
        else:
            raise ValueError(f"no initialisation for parameter {name}")


def _normal_(parameter: Tensor, name: str, std: float, seed: int, shard: Shard) -> None:
    n_rows, n_columns = shard.shape
    split = shard.length is not None
    first, last = (shard.start, shard.start + shard.length) if split and shard.dim == 0 else (0, n_rows)
    columns = slice(shard.start, shard.start + shard.length) if split and shard.dim == 1 else slice(None)
    for block in range(first // ROWS_PER_BLOCK, -(-last // ROWS_PER_BLOCK)):
        low, high = block * ROWS_PER_BLOCK, min(n_rows, (block + 1) * ROWS_PER_BLOCK)
        digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        rows = torch.randn(high - low, n_columns, generator=generator).mul_(std)
        begin, end = max(low, first), min(high, last)
        parameter[begin - first : end - first].copy_(rows[begin - low : end - low, columns])
