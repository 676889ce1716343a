import pytest
import torch

from megamtp.ops.norm import norm_backend
from tests.ops.closeness import EXACT, relative_error
from tests.ops.fake_libraries import fused_rms_norm_affine, install

NORMS = pytest.mark.parametrize("norm", ["apex", "compiled", "torch", "reference"], indirect=True)


@pytest.fixture
def norm(request, monkeypatch):
    install(monkeypatch, "apex.normalization.fused_layer_norm", fused_rms_norm_affine=fused_rms_norm_affine)
    return norm_backend(request.param)


def by_definition(x, weight, eps):
    x, weight = x.double().numpy(), weight.double().numpy()
    return torch.from_numpy(x / ((x**2).mean(-1, keepdims=True) + eps) ** 0.5 * weight)


def inputs(dtype, d=48, magnitude=1.0):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, d, generator=generator, dtype=torch.float64) * magnitude
    return x.to(dtype), (1 + torch.randn(d, generator=generator, dtype=torch.float64) / 4).to(dtype)


@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 1e4])  # eps matters, hardly, not at all
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, EXACT), (torch.float32, 3e-7), (torch.bfloat16, 3e-3)]
)
@NORMS
def test_definition(norm, dtype, tolerance, magnitude):
    x, weight = inputs(dtype, magnitude=magnitude)
    out = norm(x, weight, 1e-5)
    assert out.dtype == dtype
    assert relative_error(out, by_definition(x, weight, 1e-5)) <= tolerance


@NORMS
def test_bf16_keeps_statistics_in_fp32(norm):
    """4096 squares of 300: a bf16 sum stands still after 256 of them, and would give 4 in place of 1."""
    x, weight = torch.full((1, 4096), 300.0, dtype=torch.bfloat16), torch.ones(4096, dtype=torch.bfloat16)
    assert torch.equal(norm(x, weight, 1e-5), weight.unsqueeze(0))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, EXACT), (torch.float32, 1e-6)])
@NORMS
def test_gradients_match_the_reference(norm, dtype, tolerance):
    x, weight = (tensor.requires_grad_() for tensor in inputs(dtype))
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    ours, theirs = (
        torch.autograd.grad(norm(x, weight, 1e-3), [x, weight], upstream) for norm in (norm, norm_backend("reference"))
    )
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) <= tolerance
