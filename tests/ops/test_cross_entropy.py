import numpy as np
import pytest
import torch
from torch.nn import functional as F

from megamtp.ops import cross_entropy
from megamtp.ops.cross_entropy import (
    IGNORE_INDEX,
    Workspace,
    linear_cross_entropy,
    linear_cross_entropy_with_grads,
    reference_linear_cross_entropy,
)
from tests.ops.closeness import EXACT, relative_error
from tests.ops.observe import LargestTensor

T, D, V = 23, 11, 37
# Relative errors; bf16 rounds each value by up to 2^-8, logits and their gradient once each.
TOLERANCE = {torch.float64: EXACT, torch.float32: 1e-6, torch.bfloat16: 2**-7}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])


def problem(dtype=torch.float64, t=T, d=D, v=V, seed=0, ignored=(2, 3, 17)):
    """hidden (t, d), weight (v, d) and targets (t,), a quarter of them the likeliest token; logits of a few units."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(t, d, generator=generator, dtype=torch.float64).to(dtype)
    weight = (torch.randn(v, d, generator=generator, dtype=torch.float64) / 2).to(dtype)
    targets = torch.randint(v, (t,), generator=generator)
    targets[::4] = (hidden[::4].double() @ weight.double().t()).argmax(1)
    targets[[i for i in ignored if i < t]] = IGNORE_INDEX
    return hidden, weight, targets


def expected(hidden, weight, targets, scale=1.0, ignore_index=IGNORE_INDEX):
    """(loss, count, correct, dhidden, dweight) in fp64 by autograd through the whole logits."""
    hidden, weight = (x.detach().double().clone().requires_grad_() for x in (hidden, weight))
    logits = hidden @ weight.t()
    losses = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")
    dhidden, dweight = torch.autograd.grad((losses * scale).sum(), [hidden, weight])
    valid = targets != ignore_index
    correct = (logits.argmax(1) == targets) & valid
    return losses.sum().detach(), valid.sum(), correct.sum(), dhidden, dweight


def assert_matches(result, wanted, tolerance):
    losses, dhidden, dweight = result
    loss, count, correct, expected_dhidden, expected_dweight = wanted
    assert losses.count == count and losses.correct == correct
    assert losses.count.dtype == losses.correct.dtype == torch.int64
    assert relative_error(losses.loss, loss) <= tolerance
    assert relative_error(dhidden, expected_dhidden) <= tolerance
    assert relative_error(dweight, expected_dweight) <= tolerance


@pytest.mark.parametrize("chunk", [1, 3, 7, T, T + 10])
@DTYPES
def test_values_and_gradients(dtype, chunk):
    inputs = problem(dtype)
    wanted = expected(*inputs)
    assert 0 < wanted[2] < wanted[1] == T - 3  # some targets are hit, some missed, some ignored
    result = linear_cross_entropy_with_grads(*inputs, chunk_tokens=chunk)
    assert_matches(result, wanted, TOLERANCE[dtype])
    assert result.losses.loss.dtype == result.dhidden.dtype == result.dweight.dtype == dtype


@pytest.mark.parametrize("chunk", [1, 7, 200])
def test_bf16_within_its_rounding(chunk):
    inputs = problem(torch.bfloat16, t=200, d=32, v=96)
    result = linear_cross_entropy_with_grads(*inputs, chunk_tokens=chunk)
    loss, count, _, dhidden, dweight = expected(*inputs)
    assert result.losses.count == count
    assert result.losses.loss.dtype == torch.float32 and result.dweight.dtype == torch.float32
    assert result.dhidden.dtype == torch.bfloat16
    # The loss averages 200 roundings of logits: it must be better than one of them.
    assert relative_error(result.losses.loss, loss) <= 2**-10
    assert relative_error(result.dhidden, dhidden) <= TOLERANCE[torch.bfloat16]
    assert relative_error(result.dweight, dweight) <= TOLERANCE[torch.bfloat16]


def test_dweight_accumulates_in_fp32():
    """2048 chunks add the same small gradient; a bf16 sum stands still after the 256th."""
    hidden, weight, targets = problem(torch.bfloat16, t=1, d=8, v=16, ignored=())
    once = linear_cross_entropy_with_grads(hidden, weight, targets).dweight
    many = linear_cross_entropy_with_grads(hidden.expand(2048, 8), weight, targets.expand(2048), chunk_tokens=1)
    assert relative_error(many.dweight, 2048 * once) <= 1e-5


@DTYPES
def test_all_targets_ignored(dtype):
    hidden, weight, _ = problem(dtype)
    losses, dhidden, dweight = linear_cross_entropy_with_grads(hidden, weight, torch.full((T,), IGNORE_INDEX))
    assert losses.loss == losses.count == losses.correct == 0
    assert torch.equal(dhidden, torch.zeros(T, D, dtype=dtype)) and torch.equal(dweight, torch.zeros(V, D, dtype=dtype))


def test_ignored_target_is_never_correct():
    """Not even where all logits are below the 0 that stands in for its own."""
    hidden, targets = -torch.ones(2, D), torch.tensor([IGNORE_INDEX, 1])
    losses = linear_cross_entropy_with_grads(hidden, torch.ones(V, D), targets).losses
    assert losses.count == losses.correct == 1


def test_no_tokens():
    hidden, weight, targets = problem(t=0)
    losses, dhidden, dweight = linear_cross_entropy_with_grads(hidden, weight, targets)
    assert losses.loss == losses.count == losses.correct == 0
    assert dhidden.shape == (0, D) and torch.equal(dweight, torch.zeros(V, D, dtype=torch.float64))


@pytest.mark.parametrize("ignore_index", [-1, 5])
def test_other_ignore_index(ignore_index):
    hidden, weight, targets = problem()
    targets[:4] = 5
    targets[targets == IGNORE_INDEX] = ignore_index
    wanted = expected(hidden, weight, targets, ignore_index=ignore_index)
    assert 0 < wanted[1] < T
    assert_matches(
        linear_cross_entropy_with_grads(hidden, weight, targets, chunk_tokens=5, ignore_index=ignore_index),
        wanted,
        EXACT,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_huge_logits(dtype):
    """Logits of 1e4 and -1e4: a target with probability 1 costs nothing, one with exp(-2e4) costs 2e4."""
    hidden = torch.tensor([[1e4, -1e4], [1e4, -1e4], [1e4, 1e4]], dtype=dtype)
    weight = torch.eye(2, dtype=dtype)
    targets = torch.tensor([0, 1, 1])
    high = hidden[0, 0].item()  # 1e4 in bf16 is 9984
    losses, dhidden, dweight = linear_cross_entropy_with_grads(hidden, weight, targets, chunk_tokens=2)
    assert losses.loss.item() == pytest.approx(2 * high + np.log(2), rel=1e-6)
    assert losses.correct == 2  # the tie counts
    assert torch.equal(dhidden, torch.tensor([[0, 0], [1, -1], [0.5, -0.5]], dtype=dtype))
    assert torch.equal(dweight.double(), torch.tensor([[1.5, -0.5], [-1.5, 0.5]], dtype=torch.float64) * high)


def test_vanishing_probability_among_many():
    hidden, weight, targets = problem(torch.float32)
    hidden, targets = hidden * 1e3, (hidden @ weight.t()).argmin(1)  # the least likely token of each
    result = linear_cross_entropy_with_grads(hidden, weight, targets, chunk_tokens=7)
    wanted = expected(hidden, weight, targets)
    assert wanted[0] / T > 1e3
    assert_matches(result, wanted, 2e-6)


@pytest.mark.parametrize("per_token", [False, True])
def test_grad_scale_scales_gradients_and_not_the_loss(per_token):
    inputs = problem()
    scale = torch.linspace(-2, 3, T, dtype=torch.float64) if per_token else 0.3
    result = linear_cross_entropy_with_grads(*inputs, grad_scale=scale, chunk_tokens=5)
    assert_matches(result, expected(*inputs, scale=scale), EXACT)


@DTYPES
def test_calls_share_accumulator_and_workspace(dtype):
    weight = problem(dtype)[1]
    workspace = Workspace(10, weight, chunk_tokens=7)
    dweight = torch.full((V, D), 0.5, dtype=dtype)
    total = dweight.double().clone()
    for t, seed, scale in [(3, 1, 1.0), (T, 2, 0.25), (7, 3, -2.0)]:  # fewer tokens than a chunk, several chunks, one
        hidden, _, targets = problem(dtype, t=t, seed=seed)
        result = linear_cross_entropy_with_grads(
            hidden, weight, targets, grad_scale=scale, dweight=dweight, workspace=workspace
        )
        loss, count, _, dhidden, own = expected(hidden, weight, targets, scale=scale)
        total = total + own
        assert result.dweight is dweight
        assert result.losses.count == count and relative_error(result.losses.loss, loss) <= TOLERANCE[dtype]
        assert relative_error(result.dhidden, dhidden) <= TOLERANCE[dtype]
    assert relative_error(dweight, total) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_small_cache_cuts_rows_and_slabs(dtype, monkeypatch):
    inputs = problem(dtype)
    monkeypatch.setattr(cross_entropy, "CACHE_BYTES", 5 * V * Workspace(1, inputs[1]).stats_dtype.itemsize)
    assert Workspace(T, inputs[1], 13).n_rows == 5
    if dtype == torch.bfloat16:
        assert 1 < cross_entropy.CACHE_BYTES // (D * 2) < V  # the slabs of its accumulation
    result = linear_cross_entropy_with_grads(*inputs, chunk_tokens=13)
    wanted = expected(*inputs)
    tolerance = TOLERANCE[dtype]
    assert relative_error(result.losses.loss, wanted[0]) <= tolerance
    assert relative_error(result.dhidden, wanted[3]) <= tolerance
    assert relative_error(result.dweight, wanted[4]) <= tolerance


@pytest.mark.parametrize("need_grads", [True, False])
def test_whole_logits_never_exist(need_grads):
    """Without gradients, nothing of their size exists either."""
    t, d, v, chunk = 64, 16, 128, 8
    inputs = problem(torch.float32, t, d, v)
    if need_grads:
        inputs[1].requires_grad_()
    with LargestTensor() as largest:
        linear_cross_entropy(*inputs, chunk_tokens=chunk)
    assert largest.elements == (v * d if need_grads else chunk * v) < t * v


@pytest.mark.parametrize("foreign", [V, V + 100, -1, -99])
def test_target_outside_of_the_vocabulary(foreign):
    hidden, weight, targets = problem()
    targets[5] = foreign
    with pytest.raises(IndexError, match=f"target {foreign} is outside of the vocabulary of {V}"):
        linear_cross_entropy_with_grads(hidden, weight, targets)


@pytest.mark.parametrize(
    "shapes",
    [((T, D), (V, D + 1), (T,)), ((T, D), (V, D), (T - 1,)), ((1, T, D), (V, D), (T,)), ((T, D), (D,), (T,))],
)
def test_shapes_that_do_not_fit(shapes):
    hidden, weight, targets = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match="must be"):
        linear_cross_entropy_with_grads(hidden, weight, targets.long())


@pytest.mark.parametrize("upstream", [1.0, -0.37, 0.0])
@DTYPES
def test_differentiable_function(dtype, upstream):
    """Inside a larger graph, with another gradient than 1 arriving from above."""
    hidden, weight, targets = problem(dtype)
    hidden.requires_grad_(), weight.requires_grad_()
    losses = linear_cross_entropy(hidden * 2, weight, targets, chunk_tokens=7)
    assert not losses.count.requires_grad and not losses.correct.requires_grad
    (losses.loss * upstream).backward()
    loss, count, correct, dhidden, dweight = expected(2 * hidden.detach(), weight.detach(), targets, scale=upstream)
    assert losses.count == count and losses.correct == correct
    assert relative_error(losses.loss.detach(), loss) <= TOLERANCE[dtype]
    assert relative_error(hidden.grad, 2 * dhidden) <= TOLERANCE[dtype]
    assert relative_error(weight.grad, dweight) <= TOLERANCE[dtype]


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_one_frozen_input(frozen):
    hidden, weight, targets = problem()
    _, _, _, dhidden, dweight = expected(hidden, weight, targets)
    trained, gradient = (weight, dweight) if frozen == "hidden" else (hidden, dhidden)
    trained.requires_grad_()
    linear_cross_entropy(hidden, weight, targets).loss.backward()
    assert relative_error(trained.grad, gradient) <= EXACT
    assert (hidden if frozen == "hidden" else weight).grad is None


def test_function_with_grad_scale():
    hidden, weight, targets = problem()
    hidden.requires_grad_()
    scale = torch.linspace(0, 1, T, dtype=torch.float64)
    losses = linear_cross_entropy(hidden, weight, targets, grad_scale=scale)
    losses.loss.backward()
    loss, _, _, dhidden, _ = expected(hidden.detach(), weight, targets, scale=scale)
    assert relative_error(losses.loss.detach(), loss) <= EXACT and relative_error(hidden.grad, dhidden) <= EXACT


def test_without_gradients():
    hidden, weight, targets = problem()
    hidden.requires_grad_()
    with torch.no_grad():
        losses = linear_cross_entropy(hidden, weight, targets, chunk_tokens=4)
    wanted = expected(hidden.detach(), weight, targets)
    assert not losses.loss.requires_grad
    assert losses.count == wanted[1] and losses.correct == wanted[2]
    assert relative_error(losses.loss, wanted[0]) <= EXACT
    result = linear_cross_entropy_with_grads(hidden.detach(), weight, targets, need_grads=False)
    assert result.dhidden is None and result.dweight is None


def test_reference_against_the_definition():
    """-log softmax in numpy."""
    hidden, weight, targets = problem()
    losses = reference_linear_cross_entropy(hidden, weight, targets)
    logits = hidden.numpy() @ weight.numpy().T
    valid = [i for i in range(T) if targets[i] != IGNORE_INDEX]
    loss = sum(np.log(np.exp(logits[i]).sum()) - logits[i, targets[i]] for i in valid)
    assert losses.loss.item() == pytest.approx(loss, rel=1e-12)
    assert losses.count == len(valid)
    assert losses.correct == sum(logits[i].argmax() == targets[i].item() for i in valid)
