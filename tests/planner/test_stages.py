import re

import pytest

from megamtp.model import cost
from megamtp.model.heads import HeadsConfig
from megamtp.model.transformer import ModelConfig
from megamtp.parallel.groups import ParallelConfig
from megamtp.planner.memory import HeldLayers, estimate_memory
from megamtp.planner.stages import plan_stages, stage_table

CONFIG = ModelConfig(vocab_size=8000, dim=256, n_layers=10, n_heads=4, n_future_tokens=2)
STEP = {"seq_len": 512, "micro_batch_size": 2, "precision": "bf16", "dp_size": 4, "recompute": "selective"}


def plan(micro_batches=8, **parallel):
    return plan_stages(CONFIG, HeadsConfig(), ParallelConfig(**parallel), micro_batches=micro_batches, **STEP)


def memory(held, mode="sequential", **layout):
    layout = {"zero_stage": 1, "micro_batches": 8, **STEP, **layout}
    return estimate_memory(CONFIG, HeadsConfig(mode=mode), held=[HeldLayers(*part) for part in held], **layout)


def test_stages_of_1f1b():
    stages = plan(pipeline=3, tensor=2, pipeline_cut=[4, 3, 1])
    assert [stage.layers for stage in stages] == ["embedding, 0-3", "4-6", "7, heads"]
    assert [(stage.number, stage.rank, stage.begin, stage.end) for stage in stages] == [
        (0, 0, 0, 5),
        (1, 1, 5, 8),
        (2, 2, 8, 10),
    ]
    block, count = cost.block_parameters(CONFIG), cost.parameters(CONFIG)
    assert [stage.parameters for stage in stages] == [
        count.embedding + 4 * block,
        3 * block,
        3 * block + 256 + count.unembedding,
    ]
    embedding, block_flops, *_, heads = cost.layer_train_flops(CONFIG, 512, "selective", "sequential")
    flops = [embedding + 4 * block_flops, 3 * block_flops, block_flops + heads]
    assert [stage.flops for stage in stages] == pytest.approx(flops, rel=1e-12)
    assert [stage.rank_share for stage in stages] == pytest.approx([value / max(flops) for value in flops])
    split = {"tensor": 2, "sequence_parallel": True}
    assert [stage.rank_memory for stage in stages] == [
        memory([(0, 5, 3)], **split),
        memory([(5, 8, 2)], **split),
        memory([(8, 10, 1)], **split),
    ]


def test_stages_of_dualpipev():
    """The two stages of a rank show the rank's load and memory."""
    stages = plan(pipeline=2, schedule="dualpipev", pipeline_cut=[0, 3, 4, 1])
    assert [stage.layers for stage in stages] == ["embedding", "0-2", "3-6", "7, heads"]
    assert [stage.rank for stage in stages] == [0, 1, 1, 0]
    assert [stage.number for stage in stages] == [0, 1, 2, 3]
    flops = [stage.flops for stage in stages]
    ranks = [flops[0] + flops[3], flops[1] + flops[2]]
    expected = [ranks[stage.rank] / max(ranks) for stage in stages]
    assert [stage.rank_share for stage in stages] == pytest.approx(expected)
    outer, inner = memory([(0, 1, 4), (8, 10, 1)]), memory([(1, 4, 3), (4, 8, 2)])
    assert [stage.rank_memory for stage in stages] == [outer, inner, inner, outer]


def test_fewer_micro_batches_than_stages():
    early, late = plan(micro_batches=1, pipeline=2, pipeline_cut=[5, 3]), plan(pipeline=2, pipeline_cut=[5, 3])
    assert early[0].rank_memory.activations < late[0].rank_memory.activations
    assert early[1].rank_memory.activations == late[1].rank_memory.activations


def test_one_stage_is_the_whole_model():
    (stage,) = plan(zero_stage=2, offload_optimizer=True)
    assert stage.layers == "embedding, 0-7, heads" and stage.rank_share == 1
    assert stage.parameters == cost.parameters(CONFIG).total
    expected = memory([(0, 10, 1)], zero_stage=2, offload_optimizer=True)
    assert stage.rank_memory == expected and expected.optimizer == 0


@pytest.mark.parametrize("schedule", ["1f1b", "dualpipev"])
def test_nothing_is_lost(schedule):
    stages = plan(pipeline=3, schedule=schedule)
    assert sum(stage.parameters for stage in stages) == cost.parameters(CONFIG).total
    total = sum(cost.layer_train_flops(CONFIG, 512, "selective", "sequential"))
    assert sum(stage.flops for stage in stages) == pytest.approx(total, rel=1e-12)
    assert max(stage.rank_share for stage in stages) == 1


def test_table():
    stages = plan(pipeline=2, schedule="dualpipev", pipeline_cut=[0, 3, 4, 1])
    title, header, *lines = stage_table(stages).splitlines()
    assert title.startswith("pipeline stages") and title.endswith(":")
    columns = ["stage", "rank", "layers", "parameters", "GFLOP/token", "rank's load", "rank's GiB"]
    assert re.split(r"\s{2,}", header.strip()) == columns
    assert len({len(line) for line in [header, *lines]}) == 1
    for stage, line in zip(stages, lines, strict=True):
        number, rank, layers, parameters, flops, load, gib = re.split(r"\s{2,}", line.strip())
        assert (number, rank, layers) == (str(stage.number), str(stage.rank), stage.layers)
        assert int(parameters.replace(",", "")) == stage.parameters
        assert float(flops) == pytest.approx(stage.flops / 1e9, abs=6e-4)
        assert float(load.rstrip("%")) == pytest.approx(100 * stage.rank_share, abs=0.06)
        assert float(gib) == pytest.approx(stage.rank_memory.total / 2**30, abs=6e-3)


def test_each_of_these_lowers_memory():
    layouts = [
        {"recompute": "none"},
        {"recompute": "none", "tensor": 2},
        {"recompute": "none", "tensor": 2, "sequence_parallel": True},
        {"recompute": "full", "tensor": 2, "sequence_parallel": True},
        *({"recompute": "full", "tensor": 2, "sequence_parallel": True, "zero_stage": stage} for stage in (2, 3)),
    ]
    layouts.append(layouts[-1] | {"offload_optimizer": True})
    memories = [memory([(0, 10, 2)], mode="joint", **layout) for layout in layouts]
    # ZeRO's buckets have their size whatever the model's.
    sizes = [each.total - each.communication for each in memories]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
