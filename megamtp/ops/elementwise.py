"""Rotary positions and SwiGLU.

Rotary pairs are halves, (i, i + hd/2), as in Hugging Face's Llama: weights move there without a permutation.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ElementwiseName = Literal["triton", "compiled", "torch"]


class Elementwise(NamedTuple):
    """``rotary`` as ``apply_rotary``, ``swiglu`` as below."""

    rotary: Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]
    swiglu: Callable[[Tensor, Tensor], Tensor]


def rotary_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """positions (b, s) or (s,) -> cos and sin (b or 1, s, 1, head_dim / 2) in fp32 (Su et al. 2021, RoPE)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.to(torch.float32).unsqueeze(-1) / theta**exponents
    angles = angles.reshape(-1, positions.shape[-1], 1, head_dim // 2)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x (b, s, h, hd) by its positions' angles; computed in fp32 (fp64 for fp64), returned in x's dtype."""
    cos, sin = table
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, GLU variants)."""
    return F.silu(gate) * up


def elementwise_backend(name: ElementwiseName) -> Elementwise:
    """Raises ``ImportError`` where Triton is asked for and not installed."""
    if name == "triton":
        from megamtp.ops import elementwise_triton

        return Elementwise(elementwise_triton.apply_rotary, elementwise_triton.swiglu)
    plain = Elementwise(apply_rotary, swiglu)
    return Elementwise(*map(torch.compile, plain)) if name == "compiled" else plain
