"""Linear cross-entropy: from (hidden, unembedding, targets) to (loss, dhidden, dweight), chunk by chunk.

The n heads of multi-token prediction multiply the logits by n, so the logits of a micro-batch must never
exist as a whole: a chunk of tokens goes through logits, statistics and gradient in one buffer, and the
buffer is reused (arXiv:2404.19737, section 2, asks for O(V + d) in place of O(nV + d)). Gradients are taken
in the forward pass, so nothing of size V is kept for the backward pass and no product is computed twice.

Shapes: t tokens, d width, V rows of the unembedding, c tokens of a chunk.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE_INDEX = -100
CHUNK_TOKENS = 1024
# On a CPU the softmax runs over a few rows at a time, which stay in its cache between the passes.
CACHE_BYTES = 8 << 20


class TokenLosses(NamedTuple):
    """Sums over the tokens whose target is not ignored; each a scalar."""

    loss: Tensor  # summed cross-entropy, nats, in the statistics' dtype (fp32; fp64 for fp64 input)
    count: Tensor  # int64
    correct: Tensor  # int64; the target's logit is the largest one (a tie counts)


class VocabSplit(Protocol):
    """How statistics over a slice of the vocabulary become statistics over the whole of it."""

    def all_max(self, values: Tensor) -> Tensor:
        """Element-wise maximum over the ranks that hold the other slices."""

    def all_sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over the ranks that hold the other slices."""


@dataclass(frozen=True)
class WholeVocab:
    """This process holds every row of the unembedding."""

    def all_max(self, values: Tensor) -> Tensor:
        return values

    def all_sum(self, values: Tensor) -> Tensor:
        return values


class LinearCrossEntropyResult(NamedTuple):
    losses: TokenLosses
    dhidden: Tensor | None  # (t, d), dtype of hidden
    dweight: Tensor | None  # the accumulator that was passed in, or a new (V, d) one


class Workspace:
    """A chunk's logits and, where the GEMM's dtype is narrower, some rows of them in the statistics' dtype.

    Allocated once and used for every chunk of every head: memory of this size is slow to come by (page faults).
    """

    def __init__(self, n_tokens: int, weight: Tensor, chunk_tokens: int = CHUNK_TOKENS):
        chunk = max(1, min(chunk_tokens, n_tokens))
        self.stats_dtype = torch.promote_types(weight.dtype, torch.float32)
        self.chunk_logits = torch.empty(chunk, weight.shape[0], dtype=weight.dtype, device=weight.device)
        row_bytes = weight.shape[0] * self.stats_dtype.itemsize
        self.n_rows = chunk if weight.device.type != "cpu" else min(chunk, max(1, CACHE_BYTES // row_bytes))
        self._wide_rows = None
        if self.stats_dtype != weight.dtype:
            shape = (self.n_rows, weight.shape[0])
            self._wide_rows = torch.empty(shape, dtype=self.stats_dtype, device=weight.device)

    def widened(self, rows: Tensor) -> Tensor:
        """``rows`` of the chunk in the statistics' dtype: themselves, or a copy."""
        return rows if self._wide_rows is None else self._wide_rows[: rows.shape[0]].copy_(rows)


def linear_cross_entropy_with_grads(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    grad_scale: float | Tensor = 1.0,
    dweight: Tensor | None = None,
    need_grads: bool = True,
    ignore_index: int = IGNORE_INDEX,
    chunk_tokens: int = CHUNK_TOKENS,
    workspace: Workspace | None = None,
    vocab_start: int = 0,
    split: VocabSplit | None = None,
) -> LinearCrossEntropyResult:
    """Summed cross-entropy of ``softmax(hidden @ weight.T)`` and its gradients, outside of autograd.

    hidden (t, d); weight (V, d), the rows ``vocab_start ... vocab_start + V`` of the vocabulary; targets (t,)
    int64, ids of the whole vocabulary or ``ignore_index``. ``grad_scale`` multiplies the gradients, not the
    loss; a tensor of (t,) scales each token. ``dweight`` is an accumulator (V, d) in the statistics' dtype:
    it is added to, so that several heads can share one, as they can share a ``workspace`` (which then decides
    the chunk). ``split`` reduces over the other ranks' slices; dhidden is then this slice's part of the
    gradient, for the caller to sum over the ranks.

    Raises ``ValueError`` for shapes that do not fit and ``IndexError`` for a target outside the vocabulary.
    """
    split = split or WholeVocab()
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be (t, d) and (V, d)")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {tuple(targets.shape)} must be ({hidden.shape[0]},)")
    _refuse_foreign_targets(targets, weight, split, ignore_index)

    n_tokens = hidden.shape[0]
    workspace = workspace or Workspace(n_tokens, weight, chunk_tokens)
    chunk_tokens = workspace.chunk_logits.shape[0]
    losses = torch.zeros(n_tokens, dtype=workspace.stats_dtype, device=hidden.device)
    correct = torch.zeros(n_tokens, dtype=torch.bool, device=hidden.device)
    dhidden = torch.empty_like(hidden) if need_grads else None
    if need_grads and dweight is None:
        dweight = torch.zeros(weight.shape, dtype=workspace.stats_dtype, device=weight.device)

    token_scale = (targets != ignore_index).to(workspace.stats_dtype) * grad_scale  # (t,), 0 where ignored
    for begin in range(0, n_tokens, chunk_tokens):
        chunk = slice(begin, min(begin + chunk_tokens, n_tokens))
        logits = workspace.chunk_logits[: chunk.stop - begin]  # (c, V)
        torch.mm(hidden[chunk], weight.t(), out=logits)
        for first in range(0, logits.shape[0], workspace.n_rows):
            rows = logits[first : first + workspace.n_rows]
            here = slice(begin + first, begin + first + rows.shape[0])
            wide = workspace.widened(rows)
            valid = targets[here] != ignore_index
            losses[here], correct[here] = _rows_to_gradient(
                wide, targets[here], valid, token_scale[here], vocab_start, split, need_grads
            )
            if need_grads and wide is not rows:
                rows.copy_(wide)
        if need_grads:
            torch.mm(logits, weight, out=dhidden[chunk])
            _accumulate(dweight, logits, hidden[chunk])

    count = (targets != ignore_index).sum()
    return LinearCrossEntropyResult(TokenLosses(losses.sum(), count, correct.sum()), dhidden, dweight)


def _rows_to_gradient(
    logits: Tensor,
    targets: Tensor,
    valid: Tensor,
    scale: Tensor,
    vocab_start: int,
    split: VocabSplit,
    need_grads: bool,
) -> tuple[Tensor, Tensor]:
    """Turn logits (r, V) into ``scale * dloss/dlogits`` in place; return losses (r,) and correct (r,)."""
    local = targets - vocab_start
    here = valid & (local >= 0) & (local < logits.shape[1])
    index = local.where(here, 0).unsqueeze(1)  # (r, 1); column 0 stands in where the target is not here
    local_max = logits.amax(1)
    target_logit = split.all_sum(logits.gather(1, index).squeeze(1).where(here, 0))
    largest = split.all_max(local_max)

    # The softmax of this slice, in place. At the largest logit its value is 1 / sum(exp(logit - max)): the
    # slice's log-sum-exp follows without a pass of its own, exact to rounding since 1/V <= p_max <= 1.
    probabilities = torch.softmax(logits, 1, out=logits)
    local_lse = local_max - probabilities.amax(1).log()
    lse = largest + split.all_sum((local_lse - largest).exp()).log()
    if need_grads:
        probabilities.mul_(((local_lse - lse).exp() * scale).unsqueeze(1))
        probabilities.scatter_add_(1, index, -(scale * here).unsqueeze(1))
    return (lse - target_logit).where(valid, 0), valid & (target_logit >= largest)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, token_scale, options):
        result = linear_cross_entropy_with_grads(hidden, weight, targets, grad_scale=token_scale, **options)
        ctx.grads = result.dhidden, result.dweight.to(weight.dtype)
        ctx.mark_non_differentiable(result.losses.count, result.losses.correct)
        return tuple(result.losses)

    @staticmethod
    def backward(ctx, dloss, *_):
        dhidden, dweight = ctx.grads
        del ctx.grads
        return scale_in_place([dhidden, dweight], dloss)[0], dweight, None, None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, **options) -> TokenLosses:
    """``linear_cross_entropy_with_grads`` as a differentiable function; the same options except the gradients' own.

    The loss is a plain sum; weigh it after, or per token with ``grad_scale`` (which then scales gradients only).
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        token_scale = options.pop("grad_scale", 1.0)
        return TokenLosses(*_LinearCrossEntropy.apply(hidden, weight, targets, token_scale, options))
    return linear_cross_entropy_with_grads(hidden, weight, targets, need_grads=False, **options).losses


def reference_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = IGNORE_INDEX
) -> TokenLosses:
    """The same through the whole logits and ``F.cross_entropy``: what every backend is held to."""
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    valid = targets != ignore_index
    correct = (logits.gather(1, targets.where(valid, 0).unsqueeze(1)).squeeze(1) >= logits.amax(1)) & valid
    loss = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
    return TokenLosses(loss, valid.sum(), correct.sum())


def scale_in_place(grads: list[Tensor], factor: Tensor) -> list[Tensor]:
    """Multiply stored gradients by the incoming one. On a CPU a look at the factor is free and saves the pass."""
    if factor.device.type != "cpu" or factor.item() != 1.0:
        for grad in grads:
            grad.mul_(factor)
    return grads


def _accumulate(dweight: Tensor, dlogits: Tensor, hidden: Tensor) -> None:
    """dweight (V, d) += dlogits.T (V, c) @ hidden (c, d), accumulated in dweight's dtype."""
    if dweight.dtype == dlogits.dtype:
        torch.addmm(dweight, dlogits.t(), hidden, out=dweight)
        return
    # A narrow product cannot be added to a wide accumulator in the GEMM; slabs of it stay in the cache.
    slab = max(1, CACHE_BYTES // (hidden.shape[1] * hidden.dtype.itemsize))
    slab = slab if dweight.device.type == "cpu" else dweight.shape[0]
    for rows, columns in zip(dweight.split(slab), dlogits.split(slab, dim=1), strict=True):
        rows.add_(columns.t() @ hidden)


def _refuse_foreign_targets(targets: Tensor, weight: Tensor, split: VocabSplit, ignore_index: int) -> None:
    """A target beyond the vocabulary would silently get a loss with target logit 0; on a GPU the look would stall."""
    if targets.device.type != "cpu" or not isinstance(split, WholeVocab) or targets.numel() == 0:
        return
    foreign = (targets != ignore_index) & ((targets < 0) | (targets >= weight.shape[0]))
    if foreign.any():
        raise IndexError(f"target {targets[foreign][0].item()} is outside of the vocabulary of {weight.shape[0]}")
