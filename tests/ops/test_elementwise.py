import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from megamtp.ops.elementwise import apply_rotary, elementwise_backend, rotary_table, swiglu
from tests.ops.closeness import EXACT, relative_error

B, S, H, HD = 2, 9, 3, 8


def heads(dtype=torch.float32, seed=0, h=H):
    return torch.randn(B, S, h, HD, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("per_row", [False, True])
def test_rotary_matches_transformers(per_row, theta):
    positions = (
        torch.stack([torch.arange(S), torch.tensor([0, 1, 2, 0, 1, 0, 1, 2, 3])]) if per_row else torch.arange(S)
    )
    table = rotary_table(positions, HD, theta)
    config = LlamaConfig(hidden_size=H * HD, num_attention_heads=H, rope_theta=theta)
    q, k = heads(), heads(seed=1, h=1)
    cos, sin = LlamaRotaryEmbedding(config)(q, positions.expand(B, S))
    theirs = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    assert relative_error(apply_rotary(q, table), theirs[0]) <= 1e-6
    assert relative_error(apply_rotary(k, table), theirs[1]) <= 1e-6


def test_rotary_turns_pairs_of_halves():
    """Pair (i, i + hd/2) as a complex number times exp(j p theta^(-2i/hd))."""
    x, positions = heads(torch.float64), torch.arange(S)
    out = apply_rotary(x, rotary_table(positions, HD, 100.0)).numpy()
    angles = np.arange(S)[:, None] * 100.0 ** (-2 * np.arange(HD // 2) / HD)
    pairs = x.numpy()[..., : HD // 2] + 1j * x.numpy()[..., HD // 2 :]
    turned = pairs * np.exp(1j * angles)[:, None]
    np.testing.assert_allclose(out, np.concatenate([turned.real, turned.imag], -1), atol=2e-6)  # the table is fp32


def test_rotary_table():
    cos, sin = rotary_table(torch.tensor([[0, 5], [2, 3]]), HD, 10000.0)
    assert cos.shape == sin.shape == (2, 2, 1, HD // 2) and cos.dtype == sin.dtype == torch.float32
    assert rotary_table(torch.arange(S), HD, 10000.0)[0].shape == (1, S, 1, HD // 2)
    assert cos[0, 0].eq(1).all() and sin[0, 0].eq(0).all()
    assert cos[1, 1, 0, 1].item() == pytest.approx(math.cos(3 / 10))


def test_scores_depend_on_relative_positions_alone():
    q, k = heads(torch.float64), heads(torch.float64, seed=1)

    def scores(offset):
        table = rotary_table(torch.arange(S) + offset, HD, 10000.0)
        return torch.einsum("bqhd,bkhd->bhqk", apply_rotary(q, table), apply_rotary(k, table))

    assert relative_error(scores(37), scores(0)) <= 1e-5  # angles of the fp32 table
    q.copy_(q[:, :1].expand_as(q)), k.copy_(k[:, :1].expand_as(k))
    same = scores(0)
    assert relative_error(same[..., 1:, 1:], same[..., :-1, :-1]) <= 1e-6
    assert relative_error(same[..., 1:, :], same[..., :-1, :]) > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rotary_keeps_dtype_and_length(dtype):
    x = heads(dtype)
    out = apply_rotary(x, rotary_table(torch.arange(S), HD, 10000.0))
    assert out.dtype == dtype
    tolerance = {torch.bfloat16: 4e-3, torch.float32: 1e-6, torch.float64: 1e-6}[dtype]
    assert relative_error(out.double().norm(dim=-1), x.double().norm(dim=-1)) <= tolerance


def test_bf16_is_turned_in_fp32():
    """Far out, angles in bf16 would be wrong by whole turns; the only rounding left is the result's."""
    x, positions = heads(torch.bfloat16), torch.arange(S) + 4001
    wanted = apply_rotary(x.double(), rotary_table(positions, HD, 10000.0))
    out = apply_rotary(x, rotary_table(positions, HD, 10000.0)).double()
    assert ((out - wanted).abs() <= 1.01 * 2**-8 * wanted.abs() + 1e-6).all()


def test_swiglu():
    gate, up = heads(torch.float64), heads(torch.float64, seed=1)
    g = gate.numpy()
    assert relative_error(swiglu(gate, up), torch.from_numpy(g / (1 + np.exp(-g)) * up.numpy())) <= EXACT


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FAST = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])


def gradients(function, inputs, upstream):
    inputs = [x.to(DEVICE).requires_grad_() for x in inputs]
    out = function(*inputs)
    return [x.cpu() for x in (out.detach(), *torch.autograd.grad(out, inputs, upstream.to(DEVICE)))]


@FAST
@pytest.mark.parametrize("shape", [(2, 9, 3, 8), (1, 40, 5, 64), (3, 700, 1, 2)], ids=str)  # the last: several blocks
@pytest.mark.parametrize("per_row", [False, True])
def test_rotary_by_triton(per_row, shape, dtype, tolerance):
    b, s, _, hd = shape
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    positions = torch.randint(0, 5000, (b, s), generator=generator) if per_row else torch.arange(s)
    table = rotary_table(positions, hd, 10000.0)
    on_device = tuple(half.to(DEVICE) for half in table)
    rotary = elementwise_backend("triton").rotary
    ours = gradients(lambda x: rotary(x, on_device), [x], upstream)
    wanted = gradients(lambda x: apply_rotary(x, on_device).double(), [x.double()], upstream.double())
    assert ours[0].dtype == ours[1].dtype == dtype
    for a, b in zip(ours, wanted, strict=True):
        assert relative_error(a, b) <= tolerance


@FAST
@pytest.mark.parametrize("shape", [(3,), (2, 9, 24), (1, 1025)], ids=str)
def test_swiglu_by_triton(shape, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    gate, up, upstream = (4 * torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    ours = gradients(elementwise_backend("triton").swiglu, [gate, up], upstream)
    wanted = gradients(swiglu, [gate.double(), up.double()], upstream.double())
    assert all(x.dtype == dtype for x in ours)
    for a, b in zip(ours, wanted, strict=True):
        assert relative_error(a, b) <= tolerance


def test_triton_takes_slices_that_do_not_lie_together():
    """What one product of several projections gives: every second head, a transposed gradient."""
    both = torch.randn(2, 9, 6, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    table = tuple(half.to(DEVICE) for half in rotary_table(torch.arange(9), 8, 10000.0))
    triton = elementwise_backend("triton")
    assert torch.allclose(triton.rotary(both[:, :, ::2], table), apply_rotary(both[:, :, ::2], table), atol=1e-6)
    gate, up = both.chunk(2, -1)
    assert torch.allclose(triton.swiglu(gate, up), swiglu(gate, up), atol=1e-6)
    leaf = both.requires_grad_()
    (grad,) = torch.autograd.grad(triton.rotary(leaf, table).transpose(1, 2).sum(1).sum(), leaf)
    (wanted,) = torch.autograd.grad(apply_rotary(leaf, table).sum(), leaf)
    assert torch.allclose(grad, wanted, atol=1e-6)


def test_compiled():
    x, up = heads(torch.bfloat16), heads(torch.bfloat16, seed=1)
    table, compiled = rotary_table(torch.arange(S), HD, 10000.0), elementwise_backend("compiled")
    for fast, plain in ((lambda x: compiled.rotary(x, table), lambda x: apply_rotary(x, table)), (compiled[1], swiglu)):
        inputs = [x, up] if plain is swiglu else [x]
        ours = gradients(fast, inputs, up)
        wanted = gradients(lambda *x, plain=plain: plain(*x).double(), [x.double() for x in inputs], up.double())
        for a, b in zip(ours, wanted, strict=True):
            assert a.dtype == torch.bfloat16 and relative_error(a, b) <= 2**-7
