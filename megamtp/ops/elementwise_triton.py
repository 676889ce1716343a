"""Rotary positions and SwiGLU by Triton: each one pass over memory, forward and backward, computed in fp32.

PyTorch makes several passes of each and keeps silu(gate) for the backward pass; here gate and up suffice. Turning is
linear, so its backward pass is to turn the other way, and keeps nothing. For bf16, fp16 and fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _rotate(
    x,
    out,
    cos,
    sin,
    n_pairs,
    n_heads,
    seq_len,
    row_stride,
    HALF: tl.constexpr,
    BACK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A pair of halves a lane: of position p and head h, elements i and i + HALF."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < n_pairs
    vector, i = pair // HALF, pair % HALF  # vector counts (b, s, h)
    position = vector // n_heads
    angle = position // seq_len * row_stride + position % seq_len * HALF + i
    c, s = tl.load(cos + angle, mask=inside), tl.load(sin + angle, mask=inside)
    if BACK:
        s = -s
    first = vector * (2 * HALF) + i
    a = tl.load(x + first, mask=inside).to(tl.float32)
    b = tl.load(x + first + HALF, mask=inside).to(tl.float32)
    kind = out.dtype.element_ty
    tl.store(out + first, (a * c - b * s).to(kind), mask=inside)
    tl.store(out + first + HALF, (b * c + a * s).to(kind), mask=inside)


@triton.jit
def _swiglu_forward(gate, up, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    g, u = tl.load(gate + at, mask=inside).to(tl.float32), tl.load(up + at, mask=inside).to(tl.float32)
    tl.store(out + at, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(gate, up, dout, dgate, dup, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    g, u = tl.load(gate + at, mask=inside).to(tl.float32), tl.load(up + at, mask=inside).to(tl.float32)
    dy = tl.load(dout + at, mask=inside).to(tl.float32)
    share = tl.sigmoid(g)
    kind = dgate.dtype.element_ty
    tl.store(dgate + at, (dy * u * share * (1 + g * (1 - share))).to(kind), mask=inside)
    tl.store(dup + at, (dy * g * share).to(kind), mask=inside)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    x = x.contiguous()
    b, s, h, hd = x.shape
    out, n_pairs = torch.empty_like(x), x.numel() // 2
    row_stride = 0 if len(cos) == 1 else s * hd // 2
    grid = (triton.cdiv(n_pairs, BLOCK),)
    _rotate[grid](x, out, cos, sin, n_pairs, h, s, row_stride, HALF=hd // 2, BACK=back, BLOCK=BLOCK)
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, back=False)

    @staticmethod
    def backward(ctx, dy):
        return _turned(dy, *ctx.saved_tensors, back=True), None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        out, n = torch.empty_like(gate), gate.numel()
        _swiglu_forward[(triton.cdiv(n, BLOCK),)](gate, up, out, n, BLOCK=BLOCK)
        return out

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        dgate, dup, n = torch.empty_like(gate), torch.empty_like(up), gate.numel()
        _swiglu_backward[(triton.cdiv(n, BLOCK),)](gate, up, dy.contiguous(), dgate, dup, n, BLOCK=BLOCK)
        return dgate, dup


def apply_rotary(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """As ``elementwise.apply_rotary``: x (b, s, h, hd), table (b or 1, s, 1, hd / 2) in fp32."""
    return _Rotary.apply(x, *(half.contiguous() for half in table))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of equal shapes."""
    return _SwiGLU.apply(gate, up)
