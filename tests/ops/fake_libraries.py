"""Stand-ins for libraries that need a GPU, written from their documented signatures; they compute by plain autograd.

They hold our calls to the arguments that the real ones take: names, shapes, dtypes, what is returned.
"""

import sys
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F


def install(monkeypatch, name: str, **attributes) -> None:
    """``import name`` finds a module with these attributes; its parents are made as needed."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    for key, value in attributes.items():
        setattr(sys.modules[name], key, value)


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    """q (b, s, h, hd), k and v (b, s, g, hd) -> (b, s, h, hd)."""
    assert q.ndim == 4 and k.shape == v.shape and q.is_contiguous()
    return torch.stack([_one(*row, causal) for row in zip(q, k, v, strict=True)])


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False):
    """q (total, h, hd), k and v (total, g, hd), bounds (sequences + 1,) int32 -> (total, h, hd)."""
    assert q.ndim == 3 and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    bounds = cu_seqlens_q.tolist()
    assert bounds[0] == 0 and bounds[-1] == len(q) and torch.equal(cu_seqlens_q, cu_seqlens_k)
    lengths = [b - a for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    assert min(lengths) > 0 and max(lengths) <= min(max_seqlen_q, max_seqlen_k)
    return torch.cat([_one(*part, causal) for part in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)])


def _one(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    s, h, hd = q.shape
    k, v = (x.repeat_interleave(h // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / hd**0.5
    if causal:
        scores = scores + torch.full((s, s), -torch.inf, dtype=q.dtype).triu(1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def install_flash_attn(monkeypatch) -> None:
    """Versions 2, 3 and 4; 4 returns the softmax's statistics as well."""
    functions = {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}
    with_statistics = {
        name: lambda *args, function=function, **options: (function(*args, **options), None)
        for name, function in functions.items()
    }
    install(monkeypatch, "flash_attn.cute", **with_statistics)
    for key, value in functions.items():
        setattr(sys.modules["flash_attn"], key, value)
    install(monkeypatch, "flash_attn_interface", **functions)


def fused_rms_norm_affine(x, weight, normalized_shape, eps=1e-6, memory_efficient=False):
    """apex's."""
    return F.rms_norm(x, normalized_shape, weight, eps)


class SoftmaxCrossEntropyLoss:
    """apex's: where ``labels`` is ``padding_idx`` the loss is 0."""

    @staticmethod
    def apply(logits, labels, smoothing=0.0, padding_idx=0, half_to_float=False):
        losses = F.cross_entropy(logits.float(), labels, reduction="none")
        return losses.masked_fill(labels == padding_idx, 0).to(torch.float32 if half_to_float else logits.dtype)


class FusedAdam(torch.optim.Optimizer):
    """apex's: the count of steps is the group's."""

    __module__ = "apex.optimizers.fused_adam"

    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True):
        assert adam_w_mode and bias_correction
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=0.0))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                adamw_update(p, p.grad, state["exp_avg"], state["exp_avg_sq"], group["step"], group)


def adamw_update(p, grad, exp_avg, exp_avg_sq, step, group) -> None:
    """Loshchilov & Hutter 2019, algorithm 2."""
    beta1, beta2 = group["betas"]
    exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    mean, square = exp_avg / (1 - beta1**step), exp_avg_sq / (1 - beta2**step)
    p.sub_(group["lr"] * (mean / (square.sqrt() + group["eps"]) + group["weight_decay"] * p))
