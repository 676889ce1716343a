"""Causal attention behind one function; the backend is a choice made once.

Here are the definition and PyTorch's own; flash-attn and FlexAttention have a module each, imported when chosen.
Shapes: b batch, s sequence, h query heads, g key/value heads (g divides h), hd head_dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

AttentionName = Literal["flash4", "flash3", "flash2", "cudnn", "flex", "sdpa", "reference"]
Documents = Any  # which positions may see each other, prepared once per micro-batch in the form that the backend wants


@dataclass(frozen=True)
class AttentionBackend:
    """``prepare(document_ids (b, s)) -> Documents``; ``attend(q, k, v, documents, causal) -> (b, s, h, hd)``.

    Equal ids in neighbouring positions are the same document.
    """

    prepare: Callable[[Tensor], Documents]
    attend: Callable[[Tensor, Tensor, Tensor, Documents | None, bool], Tensor]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    backend: AttentionBackend,
    documents: Documents | None = None,
    causal: bool = True,
) -> Tensor:
    """Softmax attention scaled by 1/sqrt(hd): q (b, s, h, hd), k and v (b, s, g, hd) -> (b, s, h, hd).

    With ``documents``, a position sees only its own document. Raises ``ValueError`` where g does not divide h,
    or documents are asked for without causality.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{k.shape[2]} key/value heads do not divide {q.shape[2]} query heads")
    if documents is not None and not causal:
        raise ValueError("document masks are causal; pass causal=True")
    return backend.attend(q, k, v, documents, causal)


def document_mask(document_ids: Tensor) -> Tensor:
    """(b, s) ids -> (b, 1, s, s) bool: the same document, and not the future."""
    s = document_ids.shape[1]
    same = document_ids.unsqueeze(2) == document_ids.unsqueeze(1)
    return same.logical_and_(torch.ones(s, s, dtype=torch.bool, device=document_ids.device).tril()).unsqueeze(1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal and mask is None,
        enable_gqa=k.shape[2] != q.shape[2],
    )
    return out.transpose(1, 2)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    # Where cuDNN does not take the shape, PyTorch goes on to the next.
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        return _sdpa(q, k, v, mask, causal)


def _reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Scores, mask, softmax, product: what every backend is held to."""
    b, s, h, hd = q.shape
    k, v = (x.repeat_interleave(h // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k).to(torch.promote_types(q.dtype, torch.float32)) / hd**0.5
    if causal:
        mask = mask if mask is not None else torch.ones(s, s, dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1).to(v.dtype), v)


def attention_backend(name: AttentionName) -> AttentionBackend:
    """Raises ``ImportError`` where its library is not installed."""
    if name.startswith("flash"):
        from megamtp.ops.attention_flash import flash_backend

        return flash_backend(int(name[-1]))
    if name == "flex":
        from megamtp.ops.attention_flex import FLEX

        return FLEX
    return AttentionBackend(document_mask, {"sdpa": _sdpa, "cudnn": _cudnn, "reference": _reference}[name])
