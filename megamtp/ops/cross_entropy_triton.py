"""A chunk of logits into its loss statistics and its gradient, in place, by Triton.

What ``cross_entropy`` does in a pass of PyTorch for each step, in one program a row: it reads the row twice, the second
time from the cache, and writes it once. With a split vocabulary two launches, between which three numbers a token
travel. fp32 statistics: for bf16, fp16 and fp32 logits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_BLOCK = 8192


@triton.jit
def _expm1_of_minus(loss):
    """exp(-loss) - 1, of a loss near 0 without cancellation."""
    y = -loss
    near = y * (1 + y * (1 / 2 + y * (1 / 6 + y * (1 / 24 + y * (1 / 120 + y / 720)))))
    return tl.where(loss < 0.125, near, tl.exp(y) - 1)


@triton.jit
def _row_statistics(row, n_columns, BLOCK: tl.constexpr):
    """The largest logit of a row and the sum of exp(logit - largest)."""
    largest, total = float("-inf"), 0.0
    for first in range(0, n_columns, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        logits = tl.load(row + columns, mask=columns < n_columns, other=float("-inf")).to(tl.float32)
        top = tl.maximum(largest, tl.max(logits, 0))
        total = total * tl.exp(largest - top) + tl.sum(tl.exp(logits - top), 0)
        largest = top
    return largest, total


@triton.jit
def _row_gradient(row, n_columns, largest, total, loss, scale, target, BLOCK: tl.constexpr):
    """Overwrite a row of logits with its gradient; ``target`` is negative where the slice does not hold it."""
    factor, at_target = scale / total, _expm1_of_minus(loss) * scale
    for first in range(0, n_columns, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < n_columns
        logits = tl.load(row + columns, mask=inside, other=float("-inf")).to(tl.float32)
        # p - 1 at the target, from the statistics: of a p near 1 the subtraction would leave rounding.
        gradient = tl.where(columns == target, at_target, tl.exp(logits - largest) * factor)
        tl.store(row + columns, gradient.to(row.dtype.element_ty), mask=inside)


@triton.jit
def _whole(logits, stride, n_columns, targets, scales, losses, hits, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0)
    row = logits + token.to(tl.int64) * stride
    target = tl.load(targets + token)
    # Before the reductions, whose barriers keep it from being read after it has been overwritten.
    target_logit = tl.load(row + tl.maximum(target, 0)).to(tl.float32)
    largest, total = _row_statistics(row, n_columns, BLOCK)
    loss = tl.log(total) - (target_logit - largest)
    tl.store(losses + token, loss)
    tl.store(hits + token, target_logit >= largest)
    if GRADIENT:
        _row_gradient(row, n_columns, largest, total, loss, tl.load(scales + token), target, BLOCK)


@triton.jit
def _slice_statistics(logits, stride, n_columns, largest, totals, BLOCK: tl.constexpr):
    token = tl.program_id(0)
    row_largest, total = _row_statistics(logits + token.to(tl.int64) * stride, n_columns, BLOCK)
    tl.store(largest + token, row_largest)
    tl.store(totals + token, total)


@triton.jit
def _slice_gradient(logits, stride, n_columns, largest, totals, losses, scales, targets, BLOCK: tl.constexpr):
    token = tl.program_id(0)
    row = logits + token.to(tl.int64) * stride
    loss, scale, target = tl.load(losses + token), tl.load(scales + token), tl.load(targets + token)
    _row_gradient(row, n_columns, tl.load(largest + token), tl.load(totals + token), loss, scale, target, BLOCK)


def launch_options(n_columns: int) -> dict[str, int]:
    """Two vectors of 16 bytes a thread and block, for rows of bf16 that are long enough."""
    block = min(triton.next_power_of_2(n_columns), LARGEST_BLOCK)
    return {"BLOCK": block, "num_warps": max(4, min(16, block // 512))}


def logits_to_gradient(logits: Tensor, places, split, whole: bool, need_grads: bool) -> tuple[Tensor, Tensor]:
    """logits (c, V) -> ``scale * dloss/dlogits`` in place; losses (c,) in fp32 and correct (c,).

    ``places`` and ``split`` as in ``cross_entropy``; ``whole``: this process has all of the vocabulary.
    """
    n_tokens, n_columns = logits.shape
    targets = places.index.where(places.here, -1)
    launch = launch_options(n_columns)
    row = (logits, logits.stride(0), n_columns)
    losses, largest, totals = torch.empty(3, n_tokens, dtype=torch.float32, device=logits.device)
    if whole:
        hits = torch.empty(n_tokens, dtype=torch.bool, device=logits.device)
        _whole[(n_tokens,)](*row, targets, places.scale, losses, hits, GRADIENT=need_grads, **launch)
    else:
        tokens = torch.arange(n_tokens, device=logits.device)
        target_logit = logits[tokens, places.index].float().where(places.here, 0)
        _slice_statistics[(n_tokens,)](*row, largest, totals, **launch)
        of_all = split.all_max(largest.clone())
        totals, target_logit = split.all_sum(torch.stack([totals * (largest - of_all).exp(), target_logit]))
        losses, hits = totals.log() - (target_logit - of_all), target_logit >= of_all
        if need_grads:
            _slice_gradient[(n_tokens,)](*row, of_all, totals, losses, places.scale, targets, **launch)
    return losses.where(places.valid, 0), hits & places.valid
