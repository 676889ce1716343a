"""Tensor and sequence parallelism: which slice of a tensor a rank holds, and what is sent for it.

A *column-parallel* product splits the rows of its weight and so its outputs; a *row-parallel* one splits its
inputs and leaves each rank a part of the sum (Shoeybi et al. 2019, arXiv:1909.08053). Between two such pairs every
rank holds the whole (b, s, d), or, under sequence parallelism, its slice (b, s / tp, d) (Korthikanti et al. 2022,
arXiv:2205.05198). ``enter`` leads from there into the split region, ``leave`` out of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed both and warns about the names that 2.11 knows.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Shard:
    """The slice of a logical tensor that this rank's parameter holds."""

    shape: tuple[int, ...]  # of the whole logical tensor
    dim: int = 0
    start: int = 0
    length: int | None = None  # along dim; None = all of it
    copies: int = 1  # TP ranks that hold this slice
    replica: int = 0  # of those, the how-manieth this one is: 0 counts it in the norm, and saves it

    @property
    def local_shape(self) -> tuple[int, ...]:
        shape = list(self.shape)
        shape[self.dim] = shape[self.dim] if self.length is None else self.length
        return tuple(shape)

    def of(self, whole: Tensor) -> Tensor:
        """This rank's slice of the whole tensor, a view."""
        return whole if self.length is None else whole.narrow(self.dim, self.start, self.length)


def split_range(total: int, parts: int, index: int) -> tuple[int, int]:
    """(start, length) of part ``index`` of ``parts`` nearly equal ones; the first ``total % parts`` have one more."""
    base, more = divmod(total, parts)
    return index * base + min(index, more), base + (index < more)


@dataclass(frozen=True)
class TensorParallel:
    """This rank's place among the ranks that share each layer. The default is a layer that is not split.

    ``kv_group`` are the ranks that hold the same key/value heads where there are fewer of these than ranks.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    sequence_parallel: bool = False
    kv_group: dist.ProcessGroup | None = None
    kv_replicas: int = 1

    def shard(self, shape: Sequence[int], dim: int) -> Shard:
        """An even (or nearly even) share of ``shape`` along ``dim``."""
        if self.size == 1:
            return Shard(tuple(shape))
        return Shard(tuple(shape), dim, *split_range(shape[dim], self.size, self.rank))

    def kv_shard(self, shape: Sequence[int]) -> Shard:
        """Rows of wk or wv: shared out like any others, or the same for ``kv_replicas`` neighbouring ranks."""
        copies = self.kv_replicas
        if self.size == 1:
            return Shard(tuple(shape))
        rows = split_range(shape[0], self.size // copies, self.rank // copies)
        return Shard(tuple(shape), 0, *rows, copies=copies, replica=self.rank % copies)

    def replicated(self, shape: Sequence[int]) -> Shard:
        """The whole tensor on every rank."""
        return Shard(tuple(shape), copies=self.size, replica=self.rank)

    # --- collectives, outside of autograd; x is (b, s, ...) or, for a slice of the sequence, (b, s / tp, ...)

    def sum(self, x: Tensor, group: dist.ProcessGroup | None = None, async_op: bool = False):
        """All-reduce in place; returns x, or the handle to wait for."""
        work = dist.all_reduce(x, group=group or self.group, async_op=async_op)
        return work if async_op else x

    def gather_sequence(self, x: Tensor) -> Tensor:
        """(b, s / tp, ...) of each rank -> (b, s, ...)."""
        out, work = self.start_gather(x)
        work.wait()
        return from_rank_major(out)

    def scatter_sequence(self, x: Tensor) -> Tensor:
        """(b, s, ...), a part of a sum on each rank -> this rank's (b, s / tp, ...) of the sum."""
        out, work = self.start_scatter(x)
        work.wait()
        return out

    def start_gather(self, x: Tensor) -> tuple[Tensor, dist.Work]:
        """(tp, b, s / tp, ...) when the handle has been waited for: see ``from_rank_major``."""
        out = x.new_empty(self.size, *x.shape)
        return out, _all_gather_single(out.view(-1, *x.shape[1:]), x.contiguous(), group=self.group, async_op=True)

    def start_scatter(self, x: Tensor) -> tuple[Tensor, dist.Work]:
        """This rank's (b, s / tp, ...) when the handle has been waited for."""
        parts = x.unflatten(1, (self.size, -1)).transpose(0, 1).contiguous()  # (tp, b, s / tp, ...): a piece a rank
        out = torch.empty_like(parts[0])
        return out, _reduce_scatter_single(out, parts.flatten(0, 1), group=self.group, async_op=True)

    # --- the same as the layers use them

    def whole_sequence(self, x: Tensor) -> Tensor:
        """What a rank holds between layers -> (b, s, d), outside of autograd."""
        return self.gather_sequence(x) if self.sequence_parallel else x

    def sum_to_held(self, dx: Tensor) -> Tensor:
        """A part of the gradient of ``whole_sequence(x)`` on each rank -> the gradient of x. May overwrite dx."""
        if self.size == 1:
            return dx
        return self.scatter_sequence(dx) if self.sequence_parallel else self.sum(dx.contiguous())

    def enter(self, x: Tensor) -> Tensor:
        """``whole_sequence`` whose backward sums the ranks' gradients."""
        return x if self.size == 1 else _Enter.apply(x, self)

    def leave(self, x: Tensor) -> Tensor:
        """(b, s, d), a part of a sum on each rank -> the sum, or this rank's slice of its sequence."""
        return x if self.size == 1 else _Leave.apply(x, self)

    def replicated_weight(self, weight: Tensor) -> Tensor:
        """A weight that meets only this rank's slice of the sequence: its gradient is summed over the ranks.

        DeepSpeed consumes gradients in hooks on the parameters, so the sum must be a part of autograd.
        """
        return _SumGradient.apply(weight, self) if self.sequence_parallel else weight

    # --- VocabSplit of the cross-entropy

    def all_max(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)
        return values

    def all_sum(self, values: Tensor) -> Tensor:
        return self.sum(values)


WHOLE = TensorParallel()


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tp):
        ctx.tp = tp
        return tp.gather_sequence(x) if tp.sequence_parallel else x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        return ctx.tp.sum_to_held(dx if ctx.tp.sequence_parallel else dx.clone()), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tp):
        ctx.tp = tp
        if tp.sequence_parallel:
            return tp.scatter_sequence(x)
        ctx.mark_dirty(x)  # the product's own output: nobody else reads it
        return tp.sum(x)

    @staticmethod
    def backward(ctx, dx):
        return ctx.tp.whole_sequence(dx), None


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, tp):
        ctx.tp = tp
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, dweight):
        return ctx.tp.sum(dweight.clone()), None


def from_rank_major(x: Tensor) -> Tensor:
    """(tp, b, s / tp, ...) -> (b, s, ...); a view where b is 1."""
    return x.transpose(0, 1).flatten(1, 2)
