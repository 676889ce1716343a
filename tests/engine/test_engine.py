"""One training step of the engine against plain autograd and ``torch.optim.AdamW``."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megamtp.engine.engine import Engine
from megamtp.engine.fragments import fragments
from megamtp.engine.optimizer import OptimizerConfig
from megamtp.model.heads import HeadsConfig
from megamtp.model.model import build_model, logical_parameters
from megamtp.model.transformer import ModelConfig
from megamtp.parallel.groups import ParallelConfig
from tests.distributed import RankError, run_rank, run_ranks
from tests.training.tiny import relative_error

MODEL = ModelConfig(vocab_size=101, dim=32, n_layers=6, n_heads=4, n_kv_heads=2, n_future_tokens=4, ffn_dim=64)
SEQ_LEN = 16
RATES = [1e-3, 3e-3, 2e-3, 1e-3, 5e-4]
# What the engine can run: (precision, ZeRO stage).
SETUPS = [("fp32", 0), ("fp32", 1), ("bf16", 1)]


@dataclass(frozen=True)
class Case:
    """A short training; the global batch is cut into ranks x micro-batches of ``micro_batch_size``."""

    precision: str = "fp32"
    zero_stage: int = 0
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(clip=0.5))
    global_batch_size: int = 6
    micro_batch_size: int = 2
    # The steps whose batches are trained on, in this order.
    steps: tuple[int, ...] = tuple(range(len(RATES)))
    # step -> (rank, what its gradient of one matrix is multiplied by)
    poison: dict[int, tuple[int, float]] = field(default_factory=dict)


@dataclass
class Step:
    """What is known after a step: global means and the whole state by logical name."""

    losses: Tensor  # (n,)
    counts: Tensor  # (n,)
    grad_norm: float
    skipped: bool
    state: dict[str, dict[str, Tensor]]  # kind -> name -> flat fp32
    module: dict[str, Tensor]  # the weights that this rank computes with


def global_batch(case: Case, step: int) -> tuple[Tensor, Tensor]:
    """tokens (b, s) and targets (n, b, s), more of them masked in some rows and heads than in others."""
    generator = torch.Generator().manual_seed(100 + step)
    shape = case.global_batch_size, SEQ_LEN + MODEL.n_future_tokens
    stream = torch.randint(0, MODEL.vocab_size, shape, generator=generator)
    targets = torch.stack([stream[:, k : k + SEQ_LEN] for k in range(1, MODEL.n_future_tokens + 1)])
    keep = torch.rand(targets.shape, generator=generator) < torch.linspace(0.3, 0.95, len(stream))[None, :, None]
    return stream[:, :SEQ_LEN], targets.where(keep, -100)


# --- the reference: nothing of the engine, of the heads' loss or of the optimizer's groups


def naive_training(case: Case) -> list[Step]:
    """The whole global batch at once, in one process."""
    model = build_model(MODEL, seed=3)
    parameters = dict(logical_parameters(model))
    config = case.optimizer
    groups = [
        {"params": [p for name, p in parameters.items() if "norm" not in name], "weight_decay": config.weight_decay},
        {"params": [p for name, p in parameters.items() if "norm" in name], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=betas, eps=config.eps, foreach=False, fused=False)
    weights = case.heads.loss_weights or [1.0] * MODEL.n_future_tokens
    steps = []
    for step in case.steps:
        tokens, targets = global_batch(case, step)
        logits = model(tokens)  # (n, b, s, V)
        sums = torch.stack(
            [F.cross_entropy(logits[k].flatten(0, 1), targets[k].flatten(), reduction="sum") for k in range(4)]
        )
        loss = sum(weight * head for weight, head in zip(weights, sums, strict=True)) / tokens.numel()
        adamw.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in parameters.values()))
        if config.clip and norm > config.clip:
            for parameter in parameters.values():
                parameter.grad *= config.clip / norm
        for group in adamw.param_groups:
            group["lr"] = RATES[step]
        adamw.step()
        counts = (targets != -100).sum((1, 2))
        state = {"weight": {name: p.detach().flatten().clone() for name, p in parameters.items()}}
        for kind in ("exp_avg", "exp_avg_sq"):
            state[kind] = {name: adamw.state[p][kind].flatten().clone() for name, p in parameters.items()}
        steps.append(Step(sums.detach() / counts, counts, norm, False, state, state["weight"]))
    return steps


# --- what runs on the ranks


def engine_training(grid, case: Case) -> list[Step]:
    share = case.global_batch_size // grid.dp_size
    engine = Engine(
        build_model(MODEL, case.heads, seed=3),
        grid=grid,
        parallel=ParallelConfig(zero_stage=case.zero_stage),
        optimizer=case.optimizer,
        precision=case.precision,
        micro_batch_size=case.micro_batch_size,
        micro_batches=share // case.micro_batch_size,
    )
    poison = {"factor": 1.0}
    matrix = engine.module.layers[0].feed_forward.w1.weight
    matrix.register_hook(lambda grad: grad * poison["factor"])
    steps = []
    for step in case.steps:
        rank, factor = case.poison.get(step, (grid.rank, 1.0))
        poison["factor"] = factor if rank == grid.rank else 1.0
        tokens, targets = global_batch(case, step)
        mine = slice(grid.dp_rank * share, (grid.dp_rank + 1) * share)
        pairs = zip(
            tokens[mine].split(case.micro_batch_size), targets[:, mine].split(case.micro_batch_size, 1), strict=True
        )
        inputs = [{"tokens": t, "targets": y, "positions": None, "document_ids": None} for t, y in pairs]
        result = engine.train_step(inputs, RATES[step])
        counts = grid.sum_over_ranks(result.counts.clone())
        losses = grid.sum_over_ranks(result.sums.clone()) / counts
        module = {name: p.detach().clone() for name, p in logical_parameters(engine.module)}
        steps.append(Step(losses, counts, result.grad_norm, bool(result.skipped), whole_state(engine, grid), module))
    return steps


def engine_trainings(grid, cases: list[Case]) -> list[list[Step]]:
    return [engine_training(grid, case) for case in cases]


def whole_state(engine: Engine, grid) -> dict[str, dict[str, Tensor]]:
    """Every rank's fragments put together, by hand: an element that nobody or two ranks own would show."""
    names = {name: p.numel() for name, p in logical_parameters(engine.module)}
    state = {kind: {n: torch.zeros(size) for n, size in names.items()} for kind in ("weight", "exp_avg", "exp_avg_sq")}
    for fragment in fragments(engine):
        if fragment.is_owner:
            for kind, tensor in fragment.tensors.items():
                state[kind][fragment.name][fragment.start : fragment.stop] = tensor
    for tensors in state.values():
        for tensor in tensors.values():
            grid.sum_over_ranks(tensor)
    return state


def assert_close(ours: list[Step], reference: list[Step], precision: str = "fp32") -> None:
    loss, norm, weights = (2e-6, 1e-5, 1e-4) if precision == "fp32" else (1e-3, 1e-2, 5e-2)
    for index, (a, b) in enumerate(zip(ours, reference, strict=True)):
        assert a.counts.tolist() == b.counts.tolist(), f"step {index}"
        assert relative_error(a.losses.double(), b.losses.double()) < loss, f"step {index}: losses"
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=norm), f"step {index}"
        for name, weight in b.state["weight"].items():
            assert relative_error(a.state["weight"][name], weight) < weights, f"step {index}: {name}"
        for kind, tensors in b.state.items():
            ours_whole, whole = (torch.cat(list(part.values())) for part in (a.state[kind], tensors))
            assert relative_error(ours_whole, whole) < (1e-4 if precision == "fp32" else 2e-2), f"step {index}: {kind}"


def assert_same_state(a: Step, b: Step) -> None:
    for kind, tensors in b.state.items():
        for name, tensor in tensors.items():
            assert torch.equal(a.state[kind][name], tensor), f"{kind} of {name} differs"
    for name, tensor in b.module.items():
        assert torch.equal(a.module[name], tensor), name


# --- the tests


@pytest.mark.parametrize("mode", ["sequential", "joint", "naive"])
@pytest.mark.parametrize(("precision", "zero_stage"), SETUPS)
def test_steps_equal_plain_autograd_and_adamw(precision, zero_stage, mode):
    heads = HeadsConfig(mode=mode, loss_weights=[1.0, 0.5, 2.0, 0.25], chunk_tokens=7)
    case = Case(precision, zero_stage, heads)
    reference = naive_training(case)
    assert all(step.grad_norm > case.optimizer.clip for step in reference)  # clipping is active
    [ours] = run_rank(engine_trainings, [case])
    assert_close(ours, reference, precision)
    if precision == "bf16":
        for step in ours:
            for name, master in step.state["weight"].items():
                assert not torch.equal(master.bfloat16().float(), master), f"{name} has no fp32 master"
                assert torch.equal(step.module[name].flatten(), master.bfloat16()), name


@pytest.mark.parametrize(("precision", "zero_stage"), SETUPS)
def test_two_ranks_equal_plain_autograd_over_the_whole_batch(precision, zero_stage):
    cases = [
        Case(precision, zero_stage, HeadsConfig(mode=mode), global_batch_size=8) for mode in ("sequential", "joint")
    ]
    for first, second in zip(*run_ranks(2, engine_trainings, cases), strict=True):
        assert_close(first, naive_training(cases[0]), precision)
        for a, b in zip(first, second, strict=True):
            assert a.grad_norm == b.grad_norm
            for name, tensor in a.module.items():
                assert torch.equal(tensor, b.module[name]), f"the ranks compute with different weights: {name}"


@pytest.mark.parametrize(("precision", "zero_stage"), SETUPS)
def test_micro_batch_size_does_not_matter(precision, zero_stage):
    small, large = run_rank(engine_trainings, [Case(precision, zero_stage, micro_batch_size=size) for size in (1, 6)])
    assert_close(small, large, precision)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("precision", "zero_stage"), SETUPS)
def test_clipping_scales_the_gradient(precision, zero_stage, world_size):
    """Seen in the moments: AdamW's first update itself hardly depends on the gradient's length."""
    cases = [
        Case(precision, zero_stage, optimizer=OptimizerConfig(clip=clip), global_batch_size=8, steps=(0,))
        for clip in (0.0, 1e3, 0.1)
    ]
    [free], [loose], [tight] = run_ranks(world_size, engine_trainings, cases)[0]
    assert free.grad_norm == loose.grad_norm == tight.grad_norm > 0.1  # the norm before clipping
    scale = 0.1 / free.grad_norm
    for name, moment in free.state["exp_avg"].items():
        assert torch.equal(loose.state["exp_avg"][name], moment)
        assert relative_error(tight.state["exp_avg"][name], moment * scale) < 1e-5, name
        squares = free.state["exp_avg_sq"][name]
        assert relative_error(tight.state["exp_avg_sq"][name], squares * scale**2) < 1e-5, name
    gradient = torch.cat([moment / 0.1 for moment in free.state["exp_avg"].values()])
    assert gradient.norm().item() == pytest.approx(free.grad_norm, rel=1e-5)


@pytest.mark.parametrize(("precision", "zero_stage"), SETUPS)
def test_a_non_finite_gradient_on_one_rank_skips_the_step_on_all(precision, zero_stage):
    case = Case(precision, zero_stage, global_batch_size=8)
    cases = [
        replace(case, steps=(0, 1, 3, 4)),
        replace(case, poison={2: (1, math.inf)}),
        replace(case, poison={2: (0, math.nan)}),
    ]
    for without, *poisoned in run_ranks(2, engine_trainings, cases):
        for steps in poisoned:
            assert [step.skipped for step in steps] == [False, False, True, False, False]
            assert not math.isfinite(steps[2].grad_norm)
            assert_same_state(steps[2], steps[1])
            # What follows is what would have followed had the step's batch never come.
            for a, b in zip(steps[3:], without[2:], strict=True):
                assert a.losses.tolist() == b.losses.tolist()
                assert a.grad_norm == b.grad_norm
                assert_same_state(a, b)


@pytest.mark.parametrize(("precision", "zero_stage"), SETUPS)
def test_a_huge_gradient_is_either_clipped_or_skipped(precision, zero_stage):
    """Finite, but its squares are not in fp32: what is reported must be what happens."""
    case = Case(precision, zero_stage, poison={2: (0, 1e30)})
    [steps] = run_rank(engine_trainings, [case])
    before, after = steps[1].state, steps[2].state
    changed = any(not torch.equal(after[kind][name], before[kind][name]) for kind in before for name in before[kind])
    assert steps[2].skipped != changed
    assert steps[2].skipped != math.isfinite(steps[2].grad_norm)
    # A clipped gradient of length 0.5 cannot have made the second moments huge.
    assert max(tensor.max().item() for tensor in after["exp_avg_sq"].values()) < 1.0


@pytest.mark.parametrize(("precision", "zero_stage"), SETUPS)
def test_only_norms_are_not_decayed(precision, zero_stage):
    """All loss weights 0: the gradient is 0, and AdamW's update is the decay alone."""
    optimizer = OptimizerConfig(weight_decay=0.5)
    case = Case(precision, zero_stage, HeadsConfig(loss_weights=[0.0] * 4), optimizer, steps=(1,))
    [[step]] = run_rank(engine_trainings, [case])
    assert step.grad_norm == 0.0
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    for name, parameter in logical_parameters(build_model(MODEL, seed=3, dtype=dtype)):
        initial = parameter.detach().float().flatten()
        expected = initial if "norm" in name else initial * (1 - RATES[1] * 0.5)
        torch.testing.assert_close(step.state["weight"][name], expected, rtol=1e-6, atol=0, msg=name)


def evaluate_and_train(grid, mode: str) -> dict[str, Any]:
    case = Case(heads=HeadsConfig(mode=mode))
    engine = Engine(
        build_model(MODEL, case.heads, seed=3),
        grid=grid,
        parallel=ParallelConfig(zero_stage=1),
        optimizer=case.optimizer,
        precision="fp32",
        micro_batch_size=2,
        micro_batches=1,
    )
    tokens, targets = global_batch(case, 0)
    targets[:, 4:] = -100  # the last micro-batch is padding
    inputs = [
        {"tokens": t, "targets": y, "positions": None, "document_ids": None}
        for t, y in zip(tokens.split(2), targets.split(2, 1), strict=True)
    ]
    before = whole_state(engine, grid)
    first = engine.evaluate(inputs)
    second = engine.evaluate(iter(inputs))
    return {
        "first": first,
        "second": second,
        "none": engine.evaluate([]),
        "unchanged": all(
            torch.equal(a, whole_state(engine, grid)[kind][name])
            for kind, tensors in before.items()
            for name, a in tensors.items()
        ),
        "gradients": [name for name, p in logical_parameters(engine.module) if p.grad is not None],
    }


@pytest.mark.parametrize("mode", ["sequential", "joint"])
def test_evaluation_equals_the_logits_and_changes_nothing(mode):
    result = run_rank(evaluate_and_train, mode)
    tokens, targets = global_batch(Case(), 0)
    tokens, targets = tokens[:4], targets[:, :4]
    with torch.no_grad():
        logits = build_model(MODEL, seed=3)(tokens)
    sums = [F.cross_entropy(logits[k].flatten(0, 1), targets[k].flatten(), reduction="sum").item() for k in range(4)]
    hits = [((logits[k].argmax(-1) == targets[k]) & (targets[k] != -100)).sum().item() for k in range(4)]
    assert result["first"][0].tolist() == pytest.approx(sums, rel=2e-6)
    assert result["first"][1].tolist() == (targets != -100).sum((1, 2)).tolist()
    assert result["first"][2].tolist() == hits
    assert all(torch.equal(a, b) for a, b in zip(result["first"], result["second"], strict=True))
    assert [total.tolist() for total in result["none"]] == [[0.0] * 4] * 3
    assert result["unchanged"]
    assert result["gradients"] == []


def train_with_too_few_batches(grid) -> None:
    engine = Engine(
        build_model(MODEL, seed=3),
        grid=grid,
        parallel=ParallelConfig(zero_stage=0),
        optimizer=OptimizerConfig(),
        precision="fp32",
        micro_batch_size=2,
        micro_batches=3,
    )
    engine.train_step([], 1e-3)


def test_the_wrong_number_of_micro_batches_is_refused():
    with pytest.raises(RankError, match="expected 3 micro-batches, got 0"):
        run_rank(train_with_too_few_batches)
