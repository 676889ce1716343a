"""Linear cross-entropy: from (hidden, unembedding, targets) to (loss, dhidden, dweight), chunk by chunk.

The n heads of multi-token prediction multiply the logits by n, so the logits of a micro-batch must never
exist as a whole: a chunk of tokens goes through logits, statistics and gradient in one buffer, and the
buffer is reused (arXiv:2404.19737, section 2, asks for O(V + d) in place of O(nV + d)). Gradients are taken
in the forward pass, so nothing of size V is kept for the backward pass and no product is computed twice.

The vocabulary may be split over ranks, in slices of any length: each rank holds its rows of the unembedding and all
tokens, and three numbers a token travel, in two collectives a chunk.

Shapes: t tokens, d width, V rows of the unembedding (of this rank's slice of it), c tokens of a chunk.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

CrossEntropyBackend = Literal["triton", "liger", "apex", "torch"]
IGNORE_INDEX = -100
CHUNK_TOKENS = 1024
# On a CPU the softmax runs over a few rows at a time, which stay in its cache between the passes.
CACHE_BYTES = 8 << 20


# A GPU's products want many rows, and each chunk passes over the unembedding's fp32 gradient once more.
LARGEST_CHUNK, SMALLEST_CHUNK = 16_384, 256
SHARE_FOR_LOGITS = 0.1


def chunk_for_memory(free_bytes: float, n_rows: int, n_tokens: int, itemsize: int) -> int:
    """Tokens of a chunk on a GPU: a power of two whose logits (tokens, ``n_rows``) take a tenth of what is free.

    ``n_tokens`` of a micro-batch are never exceeded by more than the next power of two.
    """
    fitting = SHARE_FOR_LOGITS * free_bytes / (n_rows * itemsize)
    chunk = SMALLEST_CHUNK
    while chunk < min(n_tokens, LARGEST_CHUNK) and 2 * chunk <= fitting:
        chunk *= 2
    return chunk


class TokenLosses(NamedTuple):
    """Sums over the tokens whose target is not ignored; each a scalar."""

    loss: Tensor  # summed cross-entropy, nats, in the statistics' dtype (fp32; fp64 for fp64 input)
    count: Tensor  # int64
    correct: Tensor  # int64; the target's logit is the largest one (a tie counts)


class VocabSplit(Protocol):
    """How statistics over a slice of the vocabulary become statistics over the whole of it.

    Every rank must get the same bits. ``values`` are not read again: both may work in place.
    """

    def all_max(self, values: Tensor) -> Tensor:
        """Element-wise maximum over the ranks, this one included; (c,)."""

    def all_sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over the ranks, this one included; (2, c)."""


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

    def __init__(
        self, n_tokens: int, weight: Tensor, chunk_tokens: int = CHUNK_TOKENS, backend: CrossEntropyBackend = "torch"
    ):
        self.backend = backend
        chunk = max(1, min(chunk_tokens, n_tokens))
        self.stats_dtype = torch.promote_types(weight.dtype, torch.float32)
        self.chunk_logits = torch.empty(chunk, weight.shape[0], dtype=weight.dtype, device=weight.device)
        row_bytes = weight.shape[0] * self.stats_dtype.itemsize
        self.n_rows = chunk if weight.device.type != "cpu" else min(chunk, max(1, CACHE_BYTES // row_bytes))
        self._wide_rows = None
        if self.stats_dtype != weight.dtype and backend == "torch":
            shape = (self.n_rows, weight.shape[0])
            self._wide_rows = torch.empty(shape, dtype=self.stats_dtype, device=weight.device)

    def widened(self, rows: Tensor) -> Tensor:
        """``rows`` of the chunk in the statistics' dtype: themselves, or a copy."""
        return rows if self._wide_rows is None else self._wide_rows[: rows.shape[0]].copy_(rows)

    def scale_rows(self, rows: Tensor, factor: Tensor) -> None:
        """``rows`` (r, V) of the chunk times ``factor`` (r,) in the statistics' dtype, in place, rounded once."""
        if self._wide_rows is None or rows.device.type != "cpu":
            rows.mul_(factor.unsqueeze(1))
        else:  # on a CPU a product of two dtypes allocates wide copies of both its input and its result
            rows.copy_(self.widened(rows).mul_(factor.unsqueeze(1)))


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
    backend: CrossEntropyBackend = "torch",
    vocab_start: int = 0,
    vocab_size: int | None = None,
    split: VocabSplit | None = None,
) -> LinearCrossEntropyResult:
    """Summed cross-entropy of ``softmax(hidden @ weight.T)`` and its gradients, outside of autograd.

    hidden (t, d); weight (V, d), the rows ``vocab_start ... vocab_start + V`` of the vocabulary; targets (t,)
    int64, ids of the whole vocabulary or ``ignore_index``. ``grad_scale`` multiplies the gradients, not the
    loss; a tensor of (t,) scales each token. ``dweight`` is an accumulator (V, d) in the statistics' dtype:
    it is added to, so that several heads can share one, as they can share a ``workspace`` (which then decides
    the chunk and the backend). ``backend``: what turns a chunk's logits into their gradient.

    ``split`` reduces over the other ranks' slices, once a chunk: every rank must pass the same hidden, targets,
    scale and chunk. The losses are those of the whole vocabulary, the same on every rank; dweight is that of this
    slice's rows, and dhidden is this slice's part of the gradient, for the caller to sum over the ranks.
    ``vocab_size``, the rows of all slices together, lets targets be checked where there is a ``split``.

    Raises ``ValueError`` for shapes that do not fit and for a slice without rows, and on a CPU ``IndexError`` for a
    target outside of the vocabulary, as far as its size is known.
    """
    split = split or WholeVocab()
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be (t, d) and (V, d)")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {tuple(targets.shape)} must be ({hidden.shape[0]},)")
    if weight.shape[0] == 0:
        raise ValueError("weight has no rows: every rank must hold some of the vocabulary")
    if isinstance(split, WholeVocab):
        vocab_size = weight.shape[0]
    _refuse_foreign_targets(targets, vocab_size, ignore_index)

    n_tokens = hidden.shape[0]
    workspace = workspace or Workspace(n_tokens, weight, chunk_tokens, backend)
    chunk_tokens = workspace.chunk_logits.shape[0]
    losses = torch.zeros(n_tokens, dtype=workspace.stats_dtype, device=hidden.device)
    correct = torch.zeros(n_tokens, dtype=torch.bool, device=hidden.device)
    dhidden = torch.empty_like(hidden) if need_grads else None
    if need_grads and dweight is None:
        dweight = torch.zeros(weight.shape, dtype=workspace.stats_dtype, device=weight.device)

    places = _place(targets, weight, vocab_start, grad_scale, ignore_index, workspace.stats_dtype)
    for begin in range(0, n_tokens, chunk_tokens):
        chunk = slice(begin, min(begin + chunk_tokens, n_tokens))
        logits = workspace.chunk_logits[: chunk.stop - begin]  # (c, V)
        torch.mm(hidden[chunk], weight.t(), out=logits)
        in_chunk = _Places(*(values[chunk] for values in places))
        losses[chunk], correct[chunk] = _logits_to_gradient(logits, in_chunk, workspace, split, need_grads)
        if need_grads:
            torch.mm(logits, weight, out=dhidden[chunk])
            _accumulate(dweight, logits, hidden[chunk])

    return LinearCrossEntropyResult(TokenLosses(losses.sum(), places.valid.sum(), correct.sum()), dhidden, dweight)


class _Places(NamedTuple):
    """Where the tokens' targets are among a slice's rows, and what their gradients are multiplied by."""

    valid: Tensor  # (t,) bool; not ignored
    here: Tensor  # (t,) bool; valid and in this slice
    index: Tensor  # (t,) int64; 0 stands in where the target is not here
    scale: Tensor  # (t,) in the statistics' dtype; 0 where ignored


def _place(
    targets: Tensor,
    weight: Tensor,
    vocab_start: int,
    grad_scale: float | Tensor,
    ignore_index: int,
    stats_dtype: torch.dtype,
) -> _Places:
    valid, local = targets != ignore_index, targets - vocab_start
    here = valid & (local >= 0) & (local < weight.shape[0])
    scale = (valid.to(stats_dtype) * grad_scale).to(stats_dtype)
    return _Places(valid, here, local.where(here, 0), scale)


def _logits_to_gradient(
    logits: Tensor, places: _Places, workspace: Workspace, split: VocabSplit, need_grads: bool
) -> tuple[Tensor, Tensor]:
    """Turn a chunk's logits (c, V) into ``scale * dloss/dlogits`` in place; return losses (c,) and correct (c,).

    Statistics are relative to the largest logit: their rounding does not grow with the logits.
    """
    whole = isinstance(split, WholeVocab)
    if workspace.backend == "triton":
        from megamtp.ops.cross_entropy_triton import logits_to_gradient

        return logits_to_gradient(logits, places, split, whole, need_grads)
    if workspace.backend != "torch":
        from megamtp.ops import cross_entropy_libraries

        if not whole:
            raise ValueError(f"cross-entropy by {workspace.backend} needs the whole vocabulary; use triton or torch")
        return cross_entropy_libraries.logits_to_gradient(workspace.backend, logits, places, need_grads)
    valid, here, index, scale = places
    blocks = [slice(first, first + workspace.n_rows) for first in range(0, logits.shape[0], workspace.n_rows)]
    tokens = torch.arange(logits.shape[0], device=logits.device)
    target_logit = logits[tokens, index].to(workspace.stats_dtype).where(here, 0)
    local_max, local_top = target_logit.new_empty(2, logits.shape[0])
    for block in blocks:
        rows = logits[block]
        wide = workspace.widened(rows)
        torch.amax(wide, 1, out=local_max[block])
        torch.softmax(wide, 1, out=wide)
        torch.amax(wide, 1, out=local_top[block])
        if need_grads:
            if whole:
                wide.mul_(scale[block].unsqueeze(1))
            if wide is not rows:
                rows.copy_(wide)

    # At the largest logit the softmax is 1 / sum(exp(logit - max)): the sum needs no exponentials of its own, and is
    # exact to rounding since 1/V <= top <= 1.
    largest = split.all_max(local_max.clone())
    local_sum = (local_max - largest).exp() / local_top
    exp_sum, target_logit = split.all_sum(torch.stack([local_sum, target_logit]))
    losses = exp_sum.log() - (target_logit - largest)
    if need_grads:
        if not whole:  # this slice's own softmax becomes its part of the whole one
            share = local_sum / exp_sum * scale
            for block in blocks:
                workspace.scale_rows(logits[block], share[block])
        # p - 1 at the target, from the statistics: of a p near 1 the logits' dtype may have rounded it away.
        # By index: on a CPU a bf16 ``scatter_`` widens the whole chunk and narrows it again.
        exact = (torch.expm1(-losses) * scale).to(logits.dtype)
        logits[tokens, index] = exact.where(here, logits[tokens, index])
    return losses.where(valid, 0), valid & (target_logit >= largest)


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
    With ``split`` the loss is the same on every rank and hidden's gradient is the slice's part of it: whatever made
    hidden must sum its gradient over the ranks.
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
        torch._foreach_mul_(grads, factor)
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


def _refuse_foreign_targets(targets: Tensor, vocab_size: int | None, ignore_index: int) -> None:
    """A target beyond the vocabulary would silently get a loss with target logit 0; on a GPU the look would stall."""
    if targets.device.type != "cpu" or vocab_size is None or targets.numel() == 0:
        return
    foreign = (targets != ignore_index) & ((targets < 0) | (targets >= vocab_size))
    if foreign.any():
        raise IndexError(f"target {targets[foreign][0].item()} is outside of the vocabulary of {vocab_size}")
