"""Every layout trains as one process does: losses, gradient norm, parameters, evaluation."""

import functools
import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from tests.parallel.cases import QUICK, Case, every_case
from tests.parallel.matrix import RATES, TOLERANCE, Training, errors, record, reference, too_large
from tests.parallel.matrix import train_all as train
from tests.parallel.matrix_report import replace_between, report, run

LAYOUTS = list(dict.fromkeys((case.world, case.layout, case.schedule) for case in every_case()))
EDGES = [
    Case(2, tensor=2, sequence=True, zero=1, clip=0.0),
    Case(2, tensor=2, sequence=True, zero=0, clip=1e-3),
    Case(2, pipeline=2, zero=1, clip=0.0),
    Case(2, zero=3, mode="joint", clip=1e-3),
]
REPLICATED = [
    Case(2, zero=2, replicated=True),
    Case(2, zero=3, mode="joint", recompute="full", replicated=True),
    Case(2, pipeline=2, schedule="dualpipev", zero=0, mode="joint", replicated=True),
    Case(4, tensor=2, pipeline=2, sequence=True, zero=1, replicated=True),
]
MORE_REPLICATED = [
    Case(1, zero=0, replicated=True),
    Case(2, tensor=2, sequence=True, zero=1, offload=True, replicated=True),
    Case(2, tensor=2, zero=0, mode="joint", replicated=True),
    Case(2, pipeline=2, zero=1, replicated=True),
    Case(4, tensor=2, sequence=True, zero=3, mode="joint", replicated=True),
]
POISONED = [
    Case(2, tensor=2, sequence=True, zero=0, poison=(1, 2)),
    Case(2, tensor=2, zero=1, poison=(0, 2)),
    Case(2, pipeline=2, zero=0, poison=(0, 2)),
    Case(2, pipeline=2, zero=1, poison=(1, 2)),
    Case(4, tensor=2, pipeline=2, sequence=True, zero=0, poison=(3, 2)),
    Case(4, tensor=2, pipeline=2, zero=1, poison=(0, 2)),
    Case(4, tensor=2, pipeline=2, sequence=True, zero=1, precision="bf16", poison=(3, 2)),
]
BF16 = [
    Case(1, zero=1, precision="bf16"),
    Case(2, zero=1, precision="bf16"),
    Case(2, zero=2, precision="bf16"),
    Case(2, zero=3, mode="joint", precision="bf16"),
    Case(2, tensor=2, sequence=True, zero=1, precision="bf16"),
    Case(2, tensor=2, zero=2, precision="bf16"),
    Case(2, pipeline=2, zero=1, precision="bf16"),
    Case(2, pipeline=2, schedule="dualpipev", zero=1, precision="bf16"),
    Case(4, tensor=2, pipeline=2, sequence=True, zero=1, mode="joint", precision="bf16"),
]
BF16_REPLICATED = [Case(2, zero=2, precision="bf16", replicated=True)]
MORE_BF16_REPLICATED = [
    Case(1, zero=1, precision="bf16", replicated=True),
    Case(2, tensor=2, zero=1, mode="joint", precision="bf16", replicated=True),
]
# Of bf16: largest relative errors, against fp32 and between layouts.
NEAR = {"loss": 2e-3, "grad_norm": 1e-2, "parameters": 5e-2, "evaluation": 2e-3, "replicas": 0}
TOGETHER = [*QUICK, *EDGES, *REPLICATED, *POISONED, *BF16, *BF16_REPLICATED]


@functools.cache
def trained(world: int, precision: str) -> dict[Case, Training]:
    """All cases of every run of the tests that have so many ranks, in one group of them."""
    cases = [case for case in TOGETHER if (case.world, case.precision) == (world, precision)]
    return dict(zip(cases, train(cases), strict=True))


def expected_running(case: Case) -> dict:
    layers = {"tok_embeddings", "heads", *(f"layers.{i}" for i in range(case.n_trunk_layers))}
    if case.pipeline == 1:
        engine = "DeepSpeedEngine of MultiTokenModel"
    elif case.schedule == "dualpipev":
        engine = "DualPipeVEngine of DualPipeVStages"
    else:
        engine = "PipelineEngine of PipelineStages"
    same = {name: getattr(case, name) for name in ("layout", "sequence", "zero", "offload", "precision", "recompute")}
    return same | {"mode": case.mode, "kv_replicas": max(1, case.tensor // 2), "engine": engine, "layers": layers}


def assert_ran(case: Case, running: dict) -> None:
    """What was on is what was asked for: or a case would be green for another one's sake."""
    held = [layer for rank in running["layers"] for layer in rank]
    assert running | {"layers": set(held)} == expected_running(case)
    assert len(set(held)) == len(held) == case.n_trunk_layers + 2
    assert len(running["layers"]) == case.pipeline and all(running["layers"])


@pytest.mark.parametrize("case", [*QUICK, *EDGES, *REPLICATED], ids=str)
def test_a_case_of_each_kind(case):
    training = trained(case.world, case.precision)[case]
    found = errors(training, reference(case.n_trunk_layers, case.clip, replicated=case.replicated))
    assert not too_large(found), found
    assert_ran(case, training.running)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "layout", "schedule"), LAYOUTS)
def test_every_case(world, layout, schedule):
    cases = [case for case in every_case() if (case.world, case.layout, case.schedule) == (world, layout, schedule)]
    records = run(cases)
    assert {r["case"]: r["errors"] for r in records if r["failed"]} == {}
    for case, entry in zip(cases, records, strict=True):
        assert_ran(case, entry["running"])


@pytest.mark.slow
@pytest.mark.parametrize("case", [*MORE_REPLICATED, *MORE_BF16_REPLICATED], ids=str)
def test_more_layouts_of_heads_with_unembeddings_of_their_own(case):
    (training,) = train([case])
    found = errors(training, reference(case.n_trunk_layers, case.clip, replicated=True))
    assert not too_large(found, TOLERANCE if case.precision == "fp32" else NEAR), found
    assert_ran(case, training.running)


def test_the_reference_says_something():
    """Clipping is active, targets are masked unevenly, all parameters move, and what is compared is not all alike."""
    result, free = reference(3), reference(3, 0.0)
    assert min(result.grad_norms) > 0.5
    counts = np.array(result.counts)
    assert (counts < 8 * 16).all() and counts.min() > 0 and (counts[:, 0] > 1.5 * counts[:, 3]).all()
    assert errors(free, replace(result, counts=free.counts))["parameters"] > 1e-3  # clipping shows in them
    first, last = result.weights[0], result.weights[-1]
    assert all(np.linalg.norm(last[name] - first[name]) / np.linalg.norm(first[name]) > 1e-3 for name in first)
    own = reference(3, replicated=True).weights[-1]
    assert {name for name in own if name.startswith("output.")} == {f"output.{k}.weight" for k in range(4)}


def test_every_case_is_a_cross_product():
    cases = every_case()
    assert len(set(cases)) == len(cases) == 315
    for _, layout, schedule in LAYOUTS:
        members = [case for case in cases if (case.layout, case.schedule) == (layout, schedule)]
        assert {case.mode for case in members} == {"sequential", "joint"}
        assert {case.recompute for case in members} == {"none", "selective", "full"}


@pytest.mark.parametrize("case", POISONED, ids=str)
def test_a_non_finite_gradient_on_one_rank_skips_the_step_on_all(case):
    training, step = trained(case.world, case.precision)[case], case.poison[1]
    assert training.skipped == [index == step for index in range(len(RATES))]
    assert not math.isfinite(training.grad_norms[step])
    weights = training.weights
    assert all(np.array_equal(weights[step][name], weights[step - 1][name]) for name in weights[step])
    assert any(not np.array_equal(weights[step + 1][name], weights[step][name]) for name in weights[step])
    found = errors(training, reference(case.n_trunk_layers, case.clip, step))
    assert not too_large(found, TOLERANCE if case.precision == "fp32" else NEAR), found


@pytest.mark.parametrize("case", [*BF16, *BF16_REPLICATED], ids=str)
def test_bf16_is_near_fp32(case):
    training = trained(case.world, case.precision)[case]
    found = errors(training, reference(case.n_trunk_layers, case.clip, replicated=case.replicated))
    assert not too_large(found, NEAR), found
    assert_ran(case, training.running)


def test_bf16_layouts_are_near_each_other():
    results = {str(case): trained(case.world, case.precision)[case] for case in BF16}
    for (name, a), (other, b) in combinations(results.items(), 2):
        found = errors(a, b)
        assert not too_large(found, NEAR), (name, other, found)


def test_the_report_is_made_from_the_records():
    case = QUICK[0]
    entry = record(case, trained(1, "fp32")[case])
    text = report([entry])
    assert "1 cases, 0 outside" in text and "| TP1 PP1 DP1 | DeepSpeedEngine | 1 | off | 0 | full |" in text
    entry["failed"] = ["loss"]
    assert "1 cases, 1 outside" in report([entry]) and "1, 1 failed" in report([entry])
    page = replace_between("a\n<!-- layouts:begin -->\nold\n<!-- layouts:end -->\nb\n", "new")
    assert page == "a\n<!-- layouts:begin -->\nnew\n<!-- layouts:end -->\nb\n"
