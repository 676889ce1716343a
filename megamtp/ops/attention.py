"""Causal attention behind one function; the backend is a choice made once.

Shapes: b batch, s sequence, h query heads, g key/value heads (g divides h), hd head_dim.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Documents:
    """Which positions may see each other, prepared once per micro-batch in the form that the backend wants."""

    ids: Tensor  # (b, s) int; equal ids = the same document
    mask: Tensor  # (b, 1, s, s) bool, True = may attend; causality included


@dataclass(frozen=True)
class AttentionBackend:
    """``prepare(document_ids) -> Documents``; ``attend(q, k, v, documents, causal) -> (b, s, h, hd)``."""

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


def _prepare_mask(document_ids: Tensor) -> Documents:
    return Documents(document_ids, document_mask(document_ids))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, causal: bool) -> Tensor:
    mask = None if documents is None else documents.mask
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal and mask is None,
        enable_gqa=k.shape[2] != q.shape[2],
    )
    return out.transpose(1, 2)


def _reference(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, causal: bool) -> Tensor:
    """Scores, mask, softmax, product: what every backend is held to."""
    b, s, h, hd = q.shape
    k, v = (x.repeat_interleave(h // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k).to(torch.promote_types(q.dtype, torch.float32)) / hd**0.5
    if causal:
        mask = documents.mask if documents is not None else torch.ones(s, s, dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1).to(v.dtype), v)


ATTENTION_BACKENDS = {
    "sdpa": AttentionBackend(_prepare_mask, _sdpa),
    "reference": AttentionBackend(_prepare_mask, _reference),
}
