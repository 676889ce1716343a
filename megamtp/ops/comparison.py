"""A backend against the definition on this device: for the check at start, the tests and the benchmark.

Both sides get the same inputs; the definition computes in fp32. Compared are the output and every gradient.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megamtp.errors import RunFailure
from megamtp.ops.attention import attention, attention_backend
from megamtp.ops.choice import PORTABLE, OpsConfig, backend
from megamtp.ops.cross_entropy import linear_cross_entropy, reference_linear_cross_entropy
from megamtp.ops.elementwise import elementwise_backend, rotary_table
from megamtp.ops.norm import norm_backend

# Relative, of a whole tensor. A GPU may compute fp32 products in TF32, where it is told to: never here by default.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class Shape:
    """b batch, s sequence, h query heads, g key/value heads, hd head_dim, f ffn_dim, V vocabulary; d = h x hd."""

    b: int
    s: int
    h: int
    g: int
    hd: int
    f: int
    vocab: int

    @property
    def dim(self) -> int:
        return self.h * self.hd


@dataclass(frozen=True)
class Comparison:
    """``fast`` and ``definition`` take ``inputs`` and return a tensor whose gradients reach all of them."""

    operation: str  # its key in ``OpsConfig``
    part: str
    backend: str
    fast: Callable[..., Tensor]
    definition: Callable[..., Tensor]
    inputs: list[Tensor]

    def error(self) -> float:
        """The largest relative error of the output and of the gradients; infinite for what is not finite."""
        upstream = torch.randn_like(self.fast(*self.inputs))
        ours = forward_and_backward(self.fast, self.inputs, upstream)
        wide = [x.float() for x in self.inputs]
        wanted = forward_and_backward(self.definition, wide, upstream.float())
        return max(_relative_error(a, b) for a, b in zip(ours, wanted, strict=True))


def forward_and_backward(function: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """The output and the gradient of each input."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def comparisons(ops: OpsConfig, shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    """One for each operation and its backend of ``ops``; attention also with documents. AdamW is not among them."""
    generator = torch.Generator(device).manual_seed(0)
    b, s = shape.b, shape.s

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    name = backend(ops, "attention")
    qkv = [random(b, s, heads, shape.hd) for heads in (shape.h, shape.g, shape.g)]
    for documents in (None, torch.arange(s, device=device).expand(b, s) // max(1, s // 3)):
        sides = [_attention(side, documents) for side in (name, "reference")]
        yield Comparison("attention", "whole" if documents is None else "documents", name, *sides, qkv)

    name = backend(ops, "norm")
    norms = [norm_backend(side) for side in (name, "reference")]
    sides = [lambda x, weight, norm=norm: norm(x, weight, 1e-5) for norm in norms]
    yield Comparison("norm", "norm", name, *sides, [random(b, s, shape.dim), random(shape.dim)])

    name = backend(ops, "elementwise")
    table = rotary_table(torch.arange(s, device=device), shape.hd, 10000.0)
    elementwise = [elementwise_backend(side) for side in (name, "torch")]
    rotary = [lambda x, side=side: side.rotary(x, table) for side in elementwise]
    yield Comparison("elementwise", "rotary", name, *rotary, qkv[:1])
    halves = [random(b, s, shape.f), random(b, s, shape.f)]
    yield Comparison("elementwise", "swiglu", name, *[side.swiglu for side in elementwise], halves)

    name = backend(ops, "cross_entropy")
    targets = torch.randint(shape.vocab, (b * s,), generator=generator, device=device)
    yield Comparison(
        "cross_entropy",
        "loss",
        name,
        lambda hidden, weight: linear_cross_entropy(hidden, weight, targets, backend=name).loss,
        lambda hidden, weight: reference_linear_cross_entropy(hidden, weight, targets).loss,
        [random(b * s, shape.dim), random(shape.vocab, shape.dim) * shape.dim**-0.5],
    )


def check_backends(ops: OpsConfig, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    """Run each chosen backend that is not the portable one, which also compiles it.

    Raises ``RunFailure`` where one is wrong.
    """
    for comparison in comparisons(ops, shape, dtype, device):
        portable = PORTABLE[comparison.operation]
        if comparison.backend == portable:
            continue
        error = comparison.error()
        if not error <= TOLERANCE[dtype]:
            raise RunFailure(
                f"ops.{comparison.operation}: {comparison.backend} is wrong on this device: {comparison.part} differs "
                f"from its definition by {error:.1e} (at most {TOLERANCE[dtype]:.0e}); "
                f"use --ops.{comparison.operation} {portable}"
            )


def _attention(name: str, documents: Tensor | None) -> Callable[..., Tensor]:
    by = attention_backend(name)
    prepared = None if documents is None else by.prepare(documents)
    return lambda q, k, v: attention(q, k, v, backend=by, documents=prepared)


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    if not actual.isfinite().all():
        return float("inf")
    difference = (actual.double() - expected.double()).norm().item()
    return difference / expected.double().norm().clamp_min(1e-30).item()
