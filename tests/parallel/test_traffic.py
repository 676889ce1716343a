"""The bytes that the planner's formulas say, and the messages that two ranks really send, to the byte."""

import sys
from pathlib import Path

import pytest

from megamtp.parallel.groups import ParallelConfig
from tests.distributed import run_ranks

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

MODEL = dict(vocab_size=250, dim=32, n_layers=4, n_heads=4, n_kv_heads=2, n_future_tokens=2, ffn_dim=64)


REPLICATED = MODEL | dict(replicated_unembedding=True)


def bytes_of_a_step(_, parallel: ParallelConfig, options: dict, model: dict = MODEL) -> tuple[float, float, float]:
    """(sent, of control messages, by the formula) of this rank in one step."""
    from scaling import Run, Size
    from wire import Wire

    run = Run(Size(model, seq_len=16, micro_batch=2, global_batch=8), parallel, **options)
    run.step()  # the first one sends shapes along the pipeline, and much of what ZeRO-3 does
    run.step()
    wire = Wire()
    run.step()
    return *wire.sent(), run.expected


@pytest.mark.parametrize(
    ("parallel", "options"),
    [
        pytest.param({"tensor": 2, "sequence": False}, {}, id="tp"),
        pytest.param({"tensor": 2, "sequence": True}, {"recompute": "full"}, id="tp-sequence-recompute"),
        pytest.param({"tensor": 2, "sequence": True}, {"recompute": "selective"}, id="tp-sequence-selective"),
        pytest.param({"zero_stage": 0}, {}, id="dp"),
        pytest.param({"zero_stage": 1}, {"precision": "bf16"}, id="dp-zero1-bf16"),
        pytest.param({"zero_stage": 2}, {}, id="dp-zero2"),
        pytest.param({"zero_stage": 3}, {}, id="dp-zero3"),
        pytest.param({"pipeline": 2}, {"documents": True}, id="pp"),
        pytest.param({"pipeline": 2, "schedule": "dualpipev"}, {"documents": True}, id="pp-dualpipev"),
    ],
)
def test_two_ranks_send_what_the_formula_says(parallel, options):
    for sent, control, formula in run_ranks(2, bytes_of_a_step, ParallelConfig(**parallel), options):
        assert formula > 0
        assert sent == pytest.approx(formula, rel=1e-12)
        assert control < 100


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_two_ranks_send_an_unembedding_for_each_head(zero_stage):
    """ZeRO-3 keeps tables of so few values whole on every rank, once each."""
    parallel = ParallelConfig(zero_stage=zero_stage)
    for sent, _, formula in run_ranks(2, bytes_of_a_step, parallel, {}, REPLICATED):
        assert sent == pytest.approx(formula, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel",
    [
        pytest.param({"tensor": 4, "sequence": True}, id="tp4-shared-key-value-heads"),
        pytest.param({"tensor": 2, "pipeline": 2}, id="tp2-pp2"),
        pytest.param({"tensor": 2, "zero_stage": 3}, id="tp2-dp2-zero3"),
        pytest.param({"pipeline": 4}, id="pp4"),
    ],
)
def test_four_ranks_send_what_the_formula_says(parallel):
    for sent, control, formula in run_ranks(4, bytes_of_a_step, ParallelConfig(**parallel), {}):
        assert sent == pytest.approx(formula, rel=1e-12)
        assert control < 100
