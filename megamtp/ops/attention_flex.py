"""Attention by PyTorch's FlexAttention: document masks in blocks, of which the empty ones are skipped.

Its forward pass runs anywhere, its backward pass on a GPU with Triton.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from megamtp.ops.attention import AttentionBackend


@cache
def _compiled(function):
    return torch.compile(function, dynamic=False)


def _on(device: torch.device, function):
    """Compiled on a GPU, where the plain function would write the scores; a CPU has it for its definition alone."""
    return _compiled(function) if device.type == "cuda" else function


def block_mask(document_ids: Tensor) -> BlockMask:
    """(b, s) ids -> who sees whom, causality included, in blocks of 128 x 128."""

    def sees(b, h, query, key):
        return (query >= key) & (document_ids[b, query] == document_ids[b, key])

    b, s = document_ids.shape
    device = document_ids.device
    return _on(device, create_block_mask)(sees, b, None, s, s, device=device.type)


def _causal_mask(b, h, query, key):
    return query >= key


def _attend(q: Tensor, k: Tensor, v: Tensor, documents: BlockMask | None, causal: bool) -> Tensor:
    if documents is None and causal:
        s = q.shape[1]
        documents = _on(q.device, create_block_mask)(_causal_mask, None, None, s, s, device=q.device.type)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    grouped = k.shape[2] != q.shape[2]
    return _on(q.device, flex_attention)(*heads_first, block_mask=documents, enable_gqa=grouped).transpose(1, 2)


FLEX = AttentionBackend(block_mask, _attend)
