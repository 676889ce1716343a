"""The time model against counted FLOPs and bytes, on devices that do one thing a second and all others at once."""

import dataclasses
import random

import pytest
from torch.utils.flop_counter import FlopCounterMode

from megamtp.config import from_dict
from megamtp.model.model import build_model
from megamtp.planner.devices import DEVICES, Assumptions, Device
from megamtp.planner.estimate import estimate_on, stages_and_traffic
from megamtp.planner.pipeline import Message, Pass
from megamtp.planner.time import StepModel
from megamtp.training.run_config import RunConfig
from tests.model.llama import micro_batch

MODEL = {"vocab_size": 100, "vocab_multiple": 1, "dim": 64, "ffn_dim": 160, "n_layers": 6, "n_heads": 4}
S, B = 24, 2
PERFECT = Assumptions(matmul_share=1, attention_share=1, memory_share=1, network_share=1, overlap=0)
INSTANT = Device(80, 1e30, 1e30, 1e30, 1e30, 1e30, per_node=64)


def run_config(n=2, heads=None, ops=None, parallel=None, training=None, **model):
    values = {
        "run_dir": "run",
        "model": MODEL | {"n_future_tokens": n} | model,
        "heads": heads or {},
        "ops": ops or {},
        "data": {"train": "data", "seq_len": S},
        "parallel": parallel or {},
        "training": {"steps": 10, "global_batch_size": 16, "micro_batch_size": B} | (training or {}),
    }
    return from_dict(RunConfig, values, "test")


def model_of(config, world_size, device, assumptions=PERFECT):
    return StepModel(config, world_size, device, *stages_and_traffic(config, world_size), assumptions)


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("mode", ["joint", "naive"])
def test_flops_against_pytorchs_counter(n, recompute, mode):
    """The counter sees the scores that a causal mask hides, too: (s - 1) / 2 of s positions in each pass."""
    ops = {"attention": "reference", "recompute": recompute}
    config = run_config(n, heads={"mode": mode}, ops=ops, training={"micro_batch_size": 16})
    model = build_model(config.model, config.heads, config.ops, seed=0)
    with FlopCounterMode(display=False) as counter:
        model(*micro_batch(config.model, b=16, s=S)).loss.backward()
    passes = 3 if recompute == "none" else 4
    hidden = passes * config.model.n_layers * 4 * config.model.dim * (S - 1) / 2 * 16 * S
    counted = counter.get_total_flops() - hidden

    step = model_of(config, 1, dataclasses.replace(INSTANT, fp32_tflops=1e-12)).step()
    assert step.seconds.matmul + step.seconds.attention == pytest.approx(counted, rel=0.01)
    if recompute == "none":
        assert estimate_on(config, 1, None).flops_per_step == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("layout", [{"tensor": 2}, {"tensor": 4, "pipeline": 2}, {"tensor": 2, "pipeline": 4}])
@pytest.mark.parametrize("schedule", ["1f1b", "dualpipev"])
def test_no_work_is_lost_in_a_layout(layout, recompute, schedule):
    """All ranks' products together are those of one rank (an even split); sequential heads never recompute."""
    schedule = schedule if "pipeline" in layout else "1f1b"
    one_flop = dataclasses.replace(INSTANT, fp32_tflops=1e-12)
    options = {"ops": {"recompute": recompute}, "n_layers": 10, "training": {"micro_batch_size": 1}}
    config = run_config(parallel=layout | {"schedule": schedule}, **options)
    world_size = layout["tensor"] * layout.get("pipeline", 1)
    total, whole = model_of(config, world_size, one_flop).step(), model_of(run_config(**options), 1, one_flop).step()
    work = (total.seconds.matmul + total.seconds.attention) * world_size
    assert work == pytest.approx(whole.seconds.matmul + whole.seconds.attention, rel=1e-9)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("mode", ["sequential", "joint"])
def test_tensor_parallel_bytes_are_those_of_the_traffic(sequence, recompute, mode):
    """Which tests hold to the messages that are sent. Gradients of norms are not in the time."""
    options = {"heads": {"mode": mode}, "ops": {"recompute": recompute}}
    config = run_config(parallel={"tensor": 2, "sequence": sequence}, **options)
    one_byte = dataclasses.replace(INSTANT, intra_gbs=1e-9)
    step = model_of(config, 2, one_byte).step()
    _, (traffic,) = stages_and_traffic(config, 2)
    assert step.seconds.tensor == pytest.approx(traffic.tensor, rel=0.02)
    # Weights' gradients hide a part of it where computing takes time.
    slower = dataclasses.replace(one_byte, fp32_tflops=1e-12)
    behind = model_of(config, 2, slower, dataclasses.replace(PERFECT, overlap=1)).step()
    assert 0.3 * step.seconds.tensor < behind.seconds.tensor < 0.75 * step.seconds.tensor


@pytest.mark.parametrize("schedule", ["1f1b", "dualpipev"])
@pytest.mark.parametrize("layout", [{"pipeline": 4}, {"pipeline": 2, "tensor": 2}])
def test_pipeline_bytes_are_those_of_the_traffic(schedule, layout):
    config = run_config(parallel=layout | {"schedule": schedule}, n_layers=10, training={"micro_batch_size": 1})
    model = model_of(config, 4, INSTANT)
    _, traffic = stages_and_traffic(config, 4)
    sizes = model._message_bytes()
    for rank, sent in enumerate(traffic):
        messages = [e.what for e in model.step().events if e.rank == rank and isinstance(e.what, Message)]
        assert sum(sizes[message.of.kind] for message in messages) == pytest.approx(sent.pipeline)


def test_between_replicas():
    config = run_config(parallel={"zero_stage": 1})
    slow = dataclasses.replace(INSTANT, intra_gbs=1e-9)
    _, (traffic,) = stages_and_traffic(config, 4)
    assert model_of(config, 4, slow).step().seconds.data == pytest.approx(traffic.data)
    # ZeRO-3 hides what it may, as far as there is something to hide it behind.
    config = run_config(parallel={"zero_stage": 3})
    _, (traffic,) = stages_and_traffic(config, 4)
    half = dataclasses.replace(PERFECT, overlap=0.5)
    assert model_of(config, 4, slow, half).step().seconds.data == pytest.approx(traffic.data, rel=1e-9)
    busy = dataclasses.replace(slow, fp32_tflops=1e-13)
    assert model_of(config, 4, busy, half).step().seconds.data == pytest.approx(traffic.data / 2)


def test_parts_add_up_to_the_step():
    config = run_config(parallel={"pipeline": 4}, n_layers=12, training={"micro_batch_size": 1})
    device = Device(80, 1, 1e-3, 1, 0.1, 0.1, per_node=2)
    step = model_of(config, 8, device).step()
    last = max(event.end for event in step.events)
    assert step.total == pytest.approx(sum(vars(step.seconds).values()))
    assert last < step.total and step.seconds.waiting > 0 and min(vars(step.seconds).values()) >= 0
    # The passes of an event list are those of the table of stages.
    for event in (event for event in step.events if isinstance(event.what, Pass)):
        assert event.end - event.begin == pytest.approx(getattr(step.stages[event.what.stage], event.what.kind).total)


def test_heads_run_backward_in_the_forward_pass():
    """Sequential heads: their stage's forward pass is the longer one, its backward pass only that of its blocks."""
    heads = {mode: run_config(2, heads={"mode": mode}, parallel={"pipeline": 2}) for mode in ("sequential", "joint")}
    device = dataclasses.replace(INSTANT, fp32_tflops=1e-6)
    sequential, joint = (model_of(config, 2, device).stages[-1] for config in heads.values())
    assert sequential.forward.total > sequential.backward.total
    assert joint.forward.total < sequential.forward.total
    both = [stage.forward.total + stage.backward.total for stage in (sequential, joint)]
    assert both[0] == pytest.approx(both[1], rel=1e-6)


LAYOUTS = [
    {"tensor": 2, "pipeline": 2},
    {"pipeline": 4},
    {"pipeline": 2, "schedule": "dualpipev"},
    {"zero_stage": 2},
    {"zero_stage": 3},
    {"tensor": 4},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_more_is_never_slower(layout):
    config = run_config(parallel=layout, n_layers=10, training={"micro_batch_size": 1})
    source = random.Random(str(layout))
    for _ in range(5):
        figures = {name: source.uniform(0.01, 1) for name in ("fp32_tflops", "bandwidth_gbs", "intra_gbs", "inter_gbs")}
        device = Device(80, 1, per_node=source.choice([1, 2, 4]), **figures)
        base = model_of(config, 4, device, Assumptions())
        assert base.lower_bound() <= base.step().total * (1 + 1e-9)
        for name, value in figures.items():
            better = dataclasses.replace(device, **{name: 2 * value})
            assert model_of(config, 4, better, Assumptions()).step().total <= base.step().total * (1 + 1e-9)


def test_slower_links_between_nodes_are_felt():
    config = run_config(parallel={"tensor": 2}, training={"micro_batch_size": 1})
    h100 = DEVICES["h100-80gb"]
    inside, across = (model_of(config, 16, dataclasses.replace(h100, per_node=n)).step() for n in (16, 8))
    assert across.total > inside.total
    assert across.seconds.tensor == inside.seconds.tensor  # it stays in the node


def test_replicas_that_share_a_node_use_all_of_its_adapters():
    device = DEVICES["h100-80gb"]
    assert device.ring(1, 8, 64) == 450e9
    assert device.ring(1, 64, 64) == 400e9  # 8 adapters of 50 for the 8 members on a node
    assert device.ring(8, 8, 64) == 50e9  # one member on each node
    assert device.ring(2, 32, 64) == 200e9
    assert device.ring(2, 2, 64) == 450e9 and device.ring(8, 2, 8) == 450e9
    assert device.pair(4, 2, 64) == 450e9 and device.pair(4, 4, 64) == device.pair(8, 2, 64) == 50e9
