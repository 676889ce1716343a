"""Layers whose one weight is split over the tensor-parallel ranks: by its rows, by its columns, by the vocabulary.

Shapes: b batch, s sequence, d dim, tp ranks. Held between layers is the whole (b, s, d), or, under sequence
parallelism, this rank's slice (b, s / tp, d).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megamtp.parallel.tensor import WHOLE, Shard, TensorParallel, from_rank_major


class Layer(nn.Module):
    """One weight, of which this rank holds the slice ``shard``."""

    def __init__(self, shard: Shard):
        super().__init__()
        self.shard = shard
        self.weight = nn.Parameter(torch.empty(shard.local_shape))


class ColumnParallel(Layer):
    """Rows of a weight (d_out, d_in), and so columns of the output; ``column_parallel`` multiplies. No bias.

    With ``kv``, neighbouring ranks hold the same rows where there are fewer key/value heads than ranks.
    """

    def __init__(self, d_in: int, d_out: int, tp: TensorParallel = WHOLE, kv: bool = False):
        super().__init__(tp.kv_shard((d_out, d_in)) if kv else tp.shard((d_out, d_in), 0))


class RowParallel(Layer):
    """x (b, s, d_in / tp) -> what is held between layers, of width d_out. No bias."""

    def __init__(self, d_in: int, d_out: int, tp: TensorParallel = WHOLE):
        super().__init__(tp.shard((d_out, d_in), 1))
        self.tp = tp

    def forward(self, x: Tensor) -> Tensor:
        return self.tp.leave(F.linear(x, self.weight))


class VocabParallelEmbedding(Layer):
    """tokens (b, s) -> what is held between layers; each rank looks up the tokens among its rows."""

    def __init__(self, n_rows: int, dim: int, tp: TensorParallel = WHOLE):
        super().__init__(tp.shard((n_rows, dim), 0))
        self.tp = tp

    def forward(self, tokens: Tensor) -> Tensor:
        if self.tp.size == 1:
            return F.embedding(tokens, self.weight)
        local = tokens - self.shard.start
        foreign = (local < 0) | (local >= self.weight.shape[0])
        rows = F.embedding(local.masked_fill(foreign, 0), self.weight)
        return self.tp.leave(rows.masked_fill(foreign.unsqueeze(-1), 0))


def column_parallel(x: Tensor, tp: TensorParallel, *layers: ColumnParallel) -> tuple[Tensor, ...]:
    """x as it is held between layers -> (b, s, rows_i) of each layer: x is gathered once for all products.

    In the backward pass the gradient of x travels while the weights' gradients are computed.
    """
    weights = [layer.weight for layer in layers]
    if tp.size == 1:
        return tuple(F.linear(x, weight) for weight in weights)
    return _ColumnParallel.apply(x, tp, [layer.shard.copies > 1 for layer in layers], *weights)


class _ColumnParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tp, in_copies, *weights):
        # x as it is held: the whole sequence is gathered again in the backward pass, for 1 / tp of the memory.
        ctx.save_for_backward(x, *weights)
        ctx.tp, ctx.in_copies = tp, in_copies
        whole = tp.whole_sequence(x)
        return tuple(F.linear(whole, weight) for weight in weights)

    @staticmethod
    def backward(ctx, *dys):
        x, *weights = ctx.saved_tensors
        tp, gathering = ctx.tp, None
        if tp.sequence_parallel:
            gathered, gathering = tp.start_gather(x)
        dys = [dy.flatten(0, 1) for dy in dys]
        dx = dys[0] @ weights[0]
        for dy, weight in zip(dys[1:], weights[1:], strict=True):
            dx.addmm_(dy, weight)
        dx = dx.view(x.shape[0], -1, x.shape[-1])
        if tp.sequence_parallel:
            gathering.wait()
            x = from_rank_major(gathered)
            dx, work = tp.start_scatter(dx)
        else:
            work = tp.sum(dx, async_op=True)
        x = x.flatten(0, 1)
        dweights = [dy.t() @ x for dy in dys]
        work.wait()
        for dweight, in_copies in zip(dweights, ctx.in_copies, strict=True):
            if in_copies:
                tp.sum(dweight, tp.kv_group)
        return dx, None, None, *dweights
