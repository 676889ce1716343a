"""RMSNorm (Zhang & Sennrich 2019), statistics in fp32 whatever the input's dtype."""

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., d) / sqrt(mean(x^2) + eps) * weight (d,), in the dtype of x."""
    # F.rms_norm keeps fp32 statistics for bf16 input (its accumulation type).
    return F.rms_norm(x, weight.shape, weight, eps)


def reference_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition, in fp32 (fp64 for fp64): what every backend is held to."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)
