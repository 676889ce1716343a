"""x @ W.T for few rows of x, as decoding has them: bound by reading W, unless the library reads it badly."""

import torch
from torch import Tensor
from torch.nn import functional as F

FEW_ROWS = range(3, 7)


class Product:
    """A weight (d_out, d_in), laid out for the device.

    On a CPU (MKL) in fp32 and fp64, measured on matrices that have left the cache: a wide one is read twice as fast by
    columns as by rows for one or two rows of x; for a few more, a general product copies all of it first, and as
    many one-row products, which find it in the cache, take half the time.
    """

    def __init__(self, weight: Tensor):
        d_out, d_in = weight.shape
        by_columns = weight.device.type == "cpu" and weight.dtype.itemsize >= 4 and d_out > d_in
        self.by_columns = weight.t().contiguous() if by_columns else None  # (d_in, d_out)
        self.weight = None if by_columns else weight

    def outputs(self, start: int, stop: int | None = None) -> "Product":
        """The product with the rows [start, stop) of the weight, a view."""
        part = object.__new__(Product)
        part.weight = None if self.weight is None else self.weight[start:stop]
        part.by_columns = None if self.by_columns is None else self.by_columns[:, start:stop]
        return part

    def __call__(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)."""
        if self.by_columns is None:
            return F.linear(x, self.weight)
        n_rows = x.numel() // x.shape[-1]
        if n_rows in FEW_ROWS:
            each = torch.bmm(x.reshape(n_rows, 1, -1), self.by_columns.expand(n_rows, -1, -1))
            return each.view(*x.shape[:-1], -1)
        return x @ self.by_columns
