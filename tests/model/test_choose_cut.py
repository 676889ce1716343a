import itertools

import pytest

from megamtp.model import cost
from megamtp.model.cut import choose_cut
from megamtp.model.transformer import ModelConfig
from megamtp.parallel.groups import ParallelConfig
from tests.model.llama import small_config

SCHEDULES = pytest.mark.parametrize("schedule", ["1f1b", "dualpipev"])


def choose(config, mode="sequential", recompute="none", **parallel):
    return choose_cut(config, mode, ParallelConfig(**parallel), 4096, recompute)


@SCHEDULES
@pytest.mark.parametrize("n", [1, 4])
def test_no_cut_is_faster(n, schedule):
    config = ModelConfig(vocab_size=8000, dim=256, n_layers=10, n_heads=4, n_future_tokens=n)
    costs = cost.layer_train_flops(config, 4096, "full", "joint")

    def slowest(boundaries):
        stages = [sum(costs[a:b]) for a, b in itertools.pairwise(boundaries)]
        return max(a + b for a, b in zip(stages, stages[::-1], strict=True)) if schedule == "dualpipev" else max(stages)

    chosen = choose(config, "joint", "full", pipeline=2, schedule=schedule)
    inner = itertools.combinations(range(1, len(costs)), 1 if schedule == "1f1b" else 3)
    assert slowest(chosen) == pytest.approx(min(slowest([0, *cut, len(costs)]) for cut in inner), rel=1e-12)


def test_unembeddings_and_recomputation_move_the_cut():
    """More unembeddings on the last stage leave it fewer blocks; recomputed blocks make the heads less dear."""
    sizes = {"dim": 1024, "n_layers": 28, "n_heads": 16, "n_future_tokens": 4}
    small, large = (ModelConfig(vocab_size=vocab, **sizes) for vocab in (1000, 32000))
    last = {
        (config.vocab_size, recompute): 26 - choose(config, recompute=recompute, pipeline=2)[1]
        for config in (small, large)
        for recompute in ("none", "full")
    }
    assert last[32000, "none"] < last[1000, "none"]
    assert last[32000, "none"] < last[32000, "full"]


def test_one_stage_is_everything():
    assert choose(small_config(n_layers=6, n_future_tokens=2)) == [0, 6]


@pytest.mark.parametrize(
    ("counts", "schedule", "pipeline", "boundaries"),
    [
        ([6], "1f1b", 1, [0, 8]),
        ([4, 2], "1f1b", 2, [0, 5, 8]),
        ([0, 6], "1f1b", 2, [0, 1, 8]),
        ([6, 0], "1f1b", 2, [0, 7, 8]),
        ([0, 3, 3, 0], "dualpipev", 2, [0, 1, 4, 7, 8]),
    ],
)
def test_by_hand(counts, schedule, pipeline, boundaries):
    config = small_config(n_layers=8, n_future_tokens=2)
    assert choose(config, pipeline=pipeline, schedule=schedule, pipeline_cut=counts) == boundaries


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"pipeline": 2, "pipeline_cut": [4, 3]}, r"holds 7 trunk layers; the model has 6 .*change the entries"),
        ({"pipeline": 3, "pipeline_cut": [3, 0, 3]}, "leaves a stage without layers"),
        ({"pipeline": 9}, "9 stages, more than the 8 layers .*lower parallel.pipeline"),
        ({"pipeline": 5, "schedule": "dualpipev"}, "dualpipev makes 10 stages"),
    ],
)
def test_refused(layout, message):
    with pytest.raises(ValueError, match=message):
        choose(small_config(n_layers=8, n_future_tokens=2), **layout)


@SCHEDULES
def test_one_layer_per_stage(schedule):
    config = small_config(n_layers=8, n_future_tokens=2)
    pipeline = 8 if schedule == "1f1b" else 4
    assert choose(config, pipeline=pipeline, schedule=schedule) == list(range(9))
