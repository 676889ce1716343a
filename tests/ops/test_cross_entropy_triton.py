"""The Triton backend of the linear cross-entropy against autograd through the whole logits in fp64."""

import pytest
import torch

from megamtp.model.heads import HeadsConfig
from megamtp.ops import cross_entropy_triton
from megamtp.ops.choice import OpsConfig
from megamtp.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_with_grads
from tests.model.llama import micro_batch, random_model, small_config
from tests.ops.closeness import relative_error
from tests.ops.test_cross_entropy import TOLERANCE, assert_matches, expected, problem

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def run(hidden, weight, targets, **options):
    inputs = (x.to(DEVICE) for x in (hidden, weight, targets))
    losses, dhidden, dweight = linear_cross_entropy_with_grads(*inputs, backend="triton", **options)
    return type(losses)(*(x.cpu() for x in losses)), *(x if x is None else x.cpu() for x in (dhidden, dweight))


@pytest.fixture(params=[16, 8192], ids=["many-blocks", "one-block"])
def block(request, monkeypatch):
    monkeypatch.setattr(cross_entropy_triton, "LARGEST_BLOCK", request.param)


@pytest.mark.parametrize("chunk", [1, 7, 200])
def test_values_and_gradients_in_fp32(chunk, block):
    inputs = problem(torch.float32)
    assert_matches(run(*inputs, chunk_tokens=chunk), expected(*inputs), TOLERANCE[torch.float32])


def test_bf16_within_its_rounding(block):
    inputs = problem(torch.bfloat16, t=200, d=32, v=96)
    losses, dhidden, dweight = run(*inputs, chunk_tokens=64)
    loss, count, _, expected_dhidden, expected_dweight = expected(*inputs)
    assert losses.count == count and losses.loss.dtype == dweight.dtype == torch.float32
    assert relative_error(losses.loss, loss) <= 2**-10
    assert relative_error(dhidden, expected_dhidden) <= TOLERANCE[torch.bfloat16]
    assert relative_error(dweight, expected_dweight) <= TOLERANCE[torch.bfloat16]


def test_each_token_has_its_scale(block):
    hidden, weight, targets = problem(torch.float32)
    scale = torch.linspace(0.5, 2, len(targets))
    result = run(hidden, weight, targets, grad_scale=scale.to(DEVICE))
    assert_matches(result, expected(hidden, weight, targets, scale), TOLERANCE[torch.float32])


def test_without_gradients_the_logits_are_left(block):
    inputs = problem(torch.float32)
    losses, dhidden, dweight = run(*inputs, need_grads=False)
    assert dhidden is None and dweight is None
    assert relative_error(losses.loss, expected(*inputs)[0]) <= TOLERANCE[torch.float32]


@DTYPES
def test_huge_logits_and_ties(dtype, block):
    """Logits of 1e4 and -1e4, no rounding: a tie for the largest counts as correct."""
    hidden = torch.tensor([[1.0, 0], [0, 1], [1, 1]]).to(dtype) * 9984
    weight = torch.tensor([[1.0, 0], [1, 0], [-1, 1]] + [[0, 0]] * 30).to(dtype)
    targets = torch.tensor([1, 2, 0])
    losses, dhidden, dweight = run(hidden, weight, targets)
    wanted = expected(hidden, weight, targets)
    assert losses.correct == 3 and relative_error(losses.loss, wanted[0]) < 1e-6
    assert relative_error(dweight, wanted[4]) < 1e-6


def test_a_confident_target_keeps_its_gradient(block):
    """1 - p is 3e-5: a hundred roundings of p itself."""
    weight = torch.eye(40)
    hidden = weight[:8] * 14
    losses, dhidden, _ = run(hidden, weight, torch.arange(8))
    wanted = expected(hidden, weight, torch.arange(8))
    assert 2e-5 < wanted[0] / 8 < 4e-5 and relative_error(losses.loss, wanted[0]) < 1e-2
    assert relative_error(dhidden, wanted[3]) < 1e-2


def test_nothing_to_do():
    losses, dhidden, _ = run(torch.zeros(0, 3), torch.ones(5, 3), torch.zeros(0, dtype=torch.long))
    assert losses.loss == losses.count == 0 and dhidden.shape == (0, 3)


def test_as_a_differentiable_function():
    inputs = problem(torch.float32)
    hidden, weight = (x.to(DEVICE).requires_grad_() for x in inputs[:2])
    (3 * linear_cross_entropy(hidden, weight, inputs[2].to(DEVICE), backend="triton").loss).backward()
    _, _, _, dhidden, dweight = expected(*inputs)
    assert relative_error(hidden.grad.cpu(), 3 * dhidden) <= 1e-6
    assert relative_error(weight.grad.cpu(), 3 * dweight) <= 1e-6


@pytest.mark.parametrize("mode", ["sequential", "joint"])
def test_the_heads_use_it(mode, monkeypatch):
    """Loss and gradients of a model are those of the naive heads, and the kernel has been called once a head."""
    config = small_config(n_layers=6, n_future_tokens=4)
    batch = micro_batch(config)
    calls, original = [], cross_entropy_triton.logits_to_gradient
    monkeypatch.setattr(cross_entropy_triton, "logits_to_gradient", lambda *args: calls.append(args) or original(*args))

    def gradients(mode, ops):
        model = random_model(config, HeadsConfig(mode=mode), ops, seed=0).to(DEVICE)
        losses = model(*(None if x is None else x.to(DEVICE) for x in batch))
        losses.loss.backward()
        return losses.loss.item(), {name: p.grad.cpu() for name, p in model.named_parameters()}

    loss, grads = gradients(mode, OpsConfig(cross_entropy="triton"))
    assert len(calls) == 4
    naive_loss, naive_grads = gradients("naive", OpsConfig())
    assert loss == pytest.approx(naive_loss, rel=1e-6)
    for name, grad in grads.items():
        assert relative_error(grad, naive_grads[name]) < 1e-5, name
