"""Attention by flash-attn 2, 3 or 4 (Dao, arXiv:2307.08691): documents as sequences of their own, no mask anywhere.

The three are separate installations with the same arguments: ``flash-attn``, ``flash_attn_interface`` (built from the
hopper folder of its repository) and ``flash-attn-4``. For fp16 and bf16.
"""

from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from megamtp.ops.attention import AttentionBackend

MODULES = {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute"}


class Sequences(NamedTuple):
    """Where each document of a micro-batch begins, all rows one after another, and the end: (documents + 1,) int32."""

    bounds: Tensor


def sequences(document_ids: Tensor) -> Sequences:
    """(b, s) ids -> bounds. Their number is read from the device, once a micro-batch."""
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    firsts = starts.flatten().nonzero().flatten()
    return Sequences(torch.cat([firsts, firsts.new_tensor([document_ids.numel()])]).to(torch.int32))


def flash_backend(version: int) -> AttentionBackend:
    """Raises ``ImportError`` where that version is not installed."""
    module = import_module(MODULES[version])
    dense, varlen = module.flash_attn_func, module.flash_attn_varlen_func

    def attend(q: Tensor, k: Tensor, v: Tensor, documents: Sequences | None, causal: bool) -> Tensor:
        if documents is None:
            return _output(dense(q, k, v, causal=causal))
        s = q.shape[1]  # no document is longer; the kernel leaves empty blocks at once
        bounds = {"cu_seqlens_q": documents.bounds, "cu_seqlens_k": documents.bounds}
        flat = (x.flatten(0, 1) for x in (q, k, v))
        out = varlen(*flat, **bounds, max_seqlen_q=s, max_seqlen_k=s, causal=True)
        return _output(out).view(q.shape)

    return AttentionBackend(sequences, attend)


def _output(returned: Tensor | tuple) -> Tensor:
    # Some versions return the softmax's statistics as well.
    return returned[0] if isinstance(returned, tuple) else returned
