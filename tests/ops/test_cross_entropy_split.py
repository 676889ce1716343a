"""Linear cross-entropy with its vocabulary split over 2 and 4 gloo ranks, against the whole in fp64."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megamtp.ops import cross_entropy
from megamtp.ops.cross_entropy import (
    IGNORE_INDEX,
    TokenLosses,
    Workspace,
    linear_cross_entropy,
    linear_cross_entropy_with_grads,
    reference_linear_cross_entropy,
)
from tests.distributed import run_ranks
from tests.ops.closeness import EXACT, relative_error
from tests.ops.observe import LargestTensor

V = 101
TOLERANCE = {torch.float64: EXACT, torch.float32: 1e-6}
SLICES = {"even": {2: (51, 50), 4: (26, 25, 25, 25)}, "uneven": {2: (1, 100), 4: (1, 60, 7, 33)}}


class CountingSplit:
    """Over all ranks, in place; remembers what was reduced."""

    def __init__(self):
        self.calls = []

    def all_max(self, values):
        return self._reduce(values, dist.ReduceOp.MAX)

    def all_sum(self, values):
        return self._reduce(values, dist.ReduceOp.SUM)

    def _reduce(self, values, op):
        self.calls.append((tuple(values.shape), values.dtype))
        dist.all_reduce(values, op)
        return values


@dataclass(frozen=True)
class Case:
    """A problem and how it is cut; the same on every rank."""

    dtype: torch.dtype = torch.float64
    t: int = 23
    d: int = 11
    chunk: int = 5
    slices: str = "even"
    targets: str = "mixed"
    logits: str = "usual"
    need_grads: bool = True
    block_rows: int = 2  # rows that fit into the cache
    backend: str = "torch"

    def problem(self):
        """hidden (t, d), weight (V, d), targets (t,), scale (t,)."""
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(self.t, self.d, generator=generator, dtype=torch.float64)
        weight = torch.randn(V, self.d, generator=generator, dtype=torch.float64) / 2
        if (
            self.logits == "huge"
        ):  # one of 1e4, 0 and -1e4: 11 different logits a token, ties in all slices, no rounding
            hidden = torch.randint(-1, 2, (self.t, self.d), generator=generator).double() * 9984
            weight = torch.eye(self.d, dtype=torch.float64).repeat(V, 1)[:V]
        hidden, weight = hidden.to(self.dtype), weight.to(self.dtype)
        if self.logits == "nan":
            hidden[5, 0] = float("nan")
        targets = torch.randint(V, (self.t,), generator=generator)
        targets[::4] = (hidden[::4].double() @ weight.double().t()).argmax(1)
        if self.logits == "confident":  # 1 - p of a target is about 1e-3: p itself is 1 in bf16
            own = weight[targets].double()
            hidden = (own * 16 / own.square().sum(1, keepdim=True)).to(self.dtype)
        if self.targets == "mixed":
            targets[[i for i in (2, 3, 17) if i < self.t]] = IGNORE_INDEX
        elif self.targets == "ignored":
            targets.fill_(IGNORE_INDEX)
        else:
            targets = targets % 25 + {"first": 0, "last": V - 25}[self.targets]
        return hidden, weight, targets, torch.linspace(0.5, 2, self.t, dtype=torch.float64).to(self.dtype)


CASES = {
    f"{name}-{str(dtype).removeprefix('torch.')}": Case(dtype, **options)
    for dtype in (torch.float64, torch.float32)
    for name, options in {
        "even": {},
        "uneven": {"slices": "uneven"},
        "one-token-chunks": {"chunk": 1},
        "one-chunk": {"chunk": 30, "block_rows": 40},
        "first": {"targets": "first"},
        "last": {"targets": "last", "slices": "uneven"},
        "ignored": {"targets": "ignored"},
        "huge": {"logits": "huge", "slices": "uneven"},
        "no-grads": {"need_grads": False, "slices": "uneven"},
        "no-tokens": {"t": 0},
    }.items()
}
CASES |= {f"triton-{n}": replace(case, backend="triton") for n, case in CASES.items() if case.dtype == torch.float32}
NARROW = {
    f"{slices}-{rows}": Case(torch.bfloat16, t=200, d=32, chunk=64, slices=slices, block_rows=rows)
    for slices in SLICES
    for rows in (7, 64)
}
NARROW["huge"] = Case(torch.bfloat16, logits="huge", slices="uneven")
NARROW["confident"] = Case(torch.bfloat16, t=200, d=32, chunk=64, logits="confident")
NARROW |= {f"triton-{name}": replace(case, backend="triton") for name, case in NARROW.items() if case.block_rows != 64}
NAN = Case(torch.float32, logits="nan")
ALL = CASES | {f"bfloat16-{name}": case for name, case in NARROW.items()} | {"nan": NAN}


def on_slices(grid) -> dict[str, Any]:
    """Everything that needs ranks, of one rank."""
    cache = cross_entropy.CACHE_BYTES
    results = {name: run_case(grid, case) for name, case in ALL.items()}
    cross_entropy.CACHE_BYTES = cache
    return results | {
        "tie": tie(grid),
        "autograd": through_autograd(grid),
        "heads": two_heads(grid),
        "memory": {dtype: largest_tensor(grid, dtype) for dtype in (torch.float32, torch.bfloat16)},
    }


def own_rows(grid, weight, slices="even"):
    sizes = SLICES[slices][grid.world_size]
    start = sum(sizes[: grid.rank])
    return weight[start : start + sizes[grid.rank]], start


def run_case(grid, case: Case):
    hidden, weight, targets, scale = case.problem()
    rows, start = own_rows(grid, weight, case.slices)
    cross_entropy.CACHE_BYTES = case.block_rows * rows.shape[0] * Workspace(1, rows).stats_dtype.itemsize
    split = CountingSplit()
    result = linear_cross_entropy_with_grads(
        hidden,
        rows,
        targets,
        grad_scale=scale,
        need_grads=case.need_grads,
        chunk_tokens=case.chunk,
        backend=case.backend,
        vocab_start=start,
        vocab_size=V,
        split=split,
    )
    return result, split.calls


def tie(grid) -> TokenLosses:
    """All logits equal; the last token's are below the 0 that stands in for a target on another rank."""
    hidden, targets = torch.tensor([1.0, 1, 1, -1]).unsqueeze(1), torch.tensor([0, V - 1, IGNORE_INDEX, 50])
    rows, start = own_rows(grid, torch.ones(V, 1))
    options = {"vocab_start": start, "vocab_size": V, "split": CountingSplit()}
    return linear_cross_entropy_with_grads(hidden, rows, targets, **options).losses


def through_autograd(grid):
    hidden, weight, targets, _ = Case().problem()
    rows, start = own_rows(grid, weight)
    hidden, rows = hidden.requires_grad_(), rows.clone().requires_grad_()
    losses = linear_cross_entropy(hidden, rows, targets, chunk_tokens=7, vocab_start=start, split=CountingSplit())
    (losses.loss * -0.5).backward()
    with torch.no_grad():
        again = linear_cross_entropy(hidden, rows, targets, chunk_tokens=7, vocab_start=start, split=CountingSplit())
    return losses.loss.detach(), again.loss, hidden.grad, rows.grad


def two_heads(grid):
    """One accumulator and one workspace for two calls."""
    hidden, weight, targets, _ = Case().problem()
    rows, start = own_rows(grid, weight)
    dweight, workspace = torch.zeros_like(rows), Workspace(23, rows, 5)
    options = {"vocab_start": start, "split": CountingSplit(), "workspace": workspace, "dweight": dweight}
    linear_cross_entropy_with_grads(hidden, rows, targets, **options)
    linear_cross_entropy_with_grads(-hidden, rows, targets.flip(0), **options)
    return dweight


def largest_tensor(grid, dtype) -> tuple[int, int, int]:
    """Elements of the largest tensor allocated with given buffers, and in evaluation without; elements of a chunk."""
    case = Case(dtype, t=64, d=1, chunk=16)
    hidden, weight, targets, _ = case.problem()
    rows, start = own_rows(grid, weight)
    options = {"vocab_start": start, "split": CountingSplit()}
    buffers = {"dweight": torch.zeros(rows.shape), "workspace": Workspace(case.t, rows, case.chunk)}
    with LargestTensor() as with_buffers:
        linear_cross_entropy_with_grads(hidden, rows, targets, **options, **buffers)
    with LargestTensor() as evaluation:
        linear_cross_entropy(hidden, rows, targets, chunk_tokens=case.chunk, **options)
    return with_buffers.elements, evaluation.elements, case.chunk * rows.shape[0]


@pytest.fixture(scope="module", params=[2, 4], ids="{}-ranks".format)
def ranks(request):
    return run_ranks(request.param, on_slices)


def expected(hidden, weight, targets, scale=None):
    """(losses, dhidden, dweight) in fp64 by autograd through the whole logits; ``scale`` (t,) of the gradients."""
    hidden, weight = (x.double().requires_grad_() for x in (hidden, weight))
    scale = torch.ones(len(hidden)) if scale is None else scale.double()
    losses = reference_linear_cross_entropy(hidden, weight, targets)
    each = [reference_linear_cross_entropy(h[None], weight, y[None]).loss for h, y in zip(hidden, targets, strict=True)]
    total = sum((loss * factor for loss, factor in zip(each, scale, strict=True)), start=losses.loss * 0)
    return TokenLosses(losses.loss.detach(), *losses[1:]), *torch.autograd.grad(total, [hidden, weight])


def gathered(results):
    """(losses of every rank, dhidden summed, dweight of all rows)."""
    dhidden = sum(result.dhidden.double() for result in results)
    return [result.losses for result in results], dhidden, torch.cat([result.dweight for result in results])


def same_bits(losses: list[TokenLosses]) -> bool:
    return all(torch.equal(a, b) for other in losses[1:] for a, b in zip(losses[0], other, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(ranks, name):
    case, tolerance = CASES[name], TOLERANCE[CASES[name].dtype]
    losses, dhidden, dweight = expected(*case.problem())
    results = [of_rank[name][0] for of_rank in ranks]
    assert same_bits([result.losses for result in results])
    actual = results[0].losses
    assert actual.count == losses.count and actual.correct == losses.correct
    assert actual.loss.dtype == case.dtype and relative_error(actual.loss, losses.loss) <= tolerance
    if not case.need_grads:
        assert all(result.dhidden is None and result.dweight is None for result in results)
        return
    _, actual_dhidden, actual_dweight = gathered(results)
    assert relative_error(actual_dhidden, dhidden) <= tolerance
    assert relative_error(actual_dweight, dweight) <= tolerance


def test_cases_hit_miss_and_ignore():
    losses = expected(*Case().problem())[0]
    assert 0 < losses.correct < losses.count == 20
    losses = expected(*Case(logits="huge").problem())[0]
    assert losses.loss > 1e4 and 0 < losses.correct < losses.count


@pytest.mark.parametrize("name", NARROW)
def test_bf16_is_as_good_as_unsplit(ranks, name):
    case = NARROW[name]
    problem = case.problem()
    wanted, dhidden, dweight = expected(*problem)
    hidden, weight, targets, scale = problem
    whole = linear_cross_entropy_with_grads(hidden, weight, targets, grad_scale=scale, chunk_tokens=case.chunk)
    results = [of_rank[f"bfloat16-{name}"][0] for of_rank in ranks]
    losses, actual_dhidden, actual_dweight = gathered(results)
    assert same_bits(losses) and losses[0].loss.dtype == torch.float32
    # A product of another shape may sum in another order and round a logit to its other neighbour.
    assert losses[0].count == wanted.count and abs(losses[0].correct - whole.losses.correct) <= 2
    error = relative_error(whole.losses.loss, wanted.loss)
    assert relative_error(losses[0].loss, wanted.loss) <= max(1.5 * error, TOLERANCE[torch.float32])
    assert all(result.dhidden.dtype == torch.bfloat16 for result in results) and actual_dweight.dtype == torch.float32
    assert relative_error(actual_dhidden, dhidden) <= 1.5 * relative_error(whole.dhidden, dhidden)
    assert relative_error(actual_dweight, dweight) <= 1.5 * relative_error(whole.dweight, dweight)
    assert max(relative_error(actual_dhidden, dhidden), relative_error(actual_dweight, dweight)) <= 2**-5


@pytest.mark.parametrize("name", ALL)
def test_two_collectives_a_chunk(ranks, name):
    case = ALL[name]
    stats_dtype = torch.promote_types(case.dtype, torch.float32)
    lengths = [min(case.chunk, case.t - begin) for begin in range(0, case.t, case.chunk)]
    wanted = [(shape, stats_dtype) for c in lengths for shape in ((c,), (2, c))]
    assert all(of_rank[name][1] == wanted for of_rank in ranks)


def test_nan_reaches_the_loss_of_every_rank(ranks):
    assert all(of_rank["nan"][0].losses.loss.isnan() for of_rank in ranks)


def test_tie_between_slices_counts_on_every_rank(ranks):
    for of_rank in ranks:
        loss, count, correct = of_rank["tie"]
        assert count == correct == 3
        assert relative_error(loss, 3 * torch.tensor(float(V)).log()) <= TOLERANCE[torch.float32]


def test_differentiable_function(ranks):
    hidden, weight, targets, _ = Case().problem()
    losses, dhidden, dweight = expected(hidden, weight, targets)
    for loss, again, _, _ in (of_rank["autograd"] for of_rank in ranks):
        assert relative_error(loss, losses.loss) <= EXACT and loss == again
    assert relative_error(sum(of_rank["autograd"][2] for of_rank in ranks), -0.5 * dhidden) <= EXACT
    assert relative_error(torch.cat([of_rank["autograd"][3] for of_rank in ranks]), -0.5 * dweight) <= EXACT


def test_calls_share_accumulator_and_workspace(ranks):
    hidden, weight, targets, _ = Case().problem()
    wanted = expected(hidden, weight, targets)[2] + expected(-hidden, weight, targets.flip(0))[2]
    assert relative_error(torch.cat([of_rank["heads"] for of_rank in ranks]), wanted) <= EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_one_chunk(ranks, dtype):
    """Beside the workspace nothing as large as a chunk is allocated, and without gradients nothing but it."""
    for of_rank in ranks:
        with_buffers, evaluation, chunk = of_rank["memory"][dtype]
        assert with_buffers < chunk / 4 and evaluation == chunk


class Refused:
    def all_max(self, values):
        raise AssertionError("nothing may be reduced before the input is checked")

    all_sum = all_max


@pytest.mark.parametrize("foreign", [V, -1])
def test_target_outside_of_the_vocabulary(foreign):
    hidden, weight, targets, _ = Case().problem()
    targets[5] = foreign
    with pytest.raises(IndexError, match=f"target {foreign} is outside of the vocabulary of {V}"):
        linear_cross_entropy_with_grads(hidden, weight[:50], targets, vocab_size=V, split=Refused())


@pytest.mark.parametrize("split", [None, Refused()])
def test_slice_without_rows(split):
    hidden, weight, targets, _ = Case().problem()
    with pytest.raises(ValueError, match="weight has no rows"):
        linear_cross_entropy_with_grads(hidden, weight[:0], targets, vocab_start=V, split=split)
