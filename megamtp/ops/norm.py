"""RMSNorm (Zhang & Sennrich 2019), statistics in fp32 whatever the input's dtype."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

NormName = Literal["torch", "compiled", "apex", "reference"]
Norm = Callable[[Tensor, Tensor, float], Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., d) / sqrt(mean(x^2) + eps) * weight (d,), in the dtype of x."""
    # F.rms_norm keeps fp32 statistics for bf16 input (its accumulation type).
    return F.rms_norm(x, weight.shape, weight, eps)


def reference_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition, in fp32 (fp64 for fp64): what every backend is held to."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def norm_backend(name: NormName) -> Norm:
    """``norm(x, weight, eps)``. Raises ``ImportError`` where its library is not installed."""
    if name == "apex":
        from apex.normalization.fused_layer_norm import fused_rms_norm_affine

        return lambda x, weight, eps: fused_rms_norm_affine(x, weight, weight.shape, eps)
    if name == "compiled":
        return torch.compile(reference_rms_norm)
    return {"torch": rms_norm, "reference": reference_rms_norm}[name]
