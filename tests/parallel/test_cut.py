import itertools

import numpy as np
import pytest

from megamtp.parallel.cut import cut_stage_pairs, cut_stages, rank_costs


def every_cut(n_layers, n_stages):
    for inner in itertools.combinations(range(1, n_layers), n_stages - 1):
        yield [0, *inner, n_layers]


def stage_costs(costs, boundaries):
    return [sum(costs[a:b]) for a, b in itertools.pairwise(boundaries)]


def value(costs, boundaries, pairs):
    """(slowest rank, sum of squares of the stages): what is minimised, in this order."""
    stages = stage_costs(costs, boundaries)
    ranks = [a + b for a, b in zip(stages, stages[::-1], strict=True)] if pairs else stages
    return max(ranks), sum(stage * stage for stage in stages)


def random_costs(seed):
    """Integers, so that sums are exact: zeros and ties are frequent, some layers are far larger than others."""
    generator = np.random.default_rng(seed)
    costs = generator.integers(0, generator.choice([2, 4, 100]), generator.integers(6, 11))
    costs[generator.random(len(costs)) < 0.2] *= 20
    return costs.tolist()


@pytest.mark.parametrize("n_stages", [1, 2, 3, 4, 5, 6])
def test_stages_against_every_cut(n_stages):
    for seed in range(40):
        costs = random_costs(seed)
        boundaries = cut_stages(costs, n_stages)
        assert boundaries in list(every_cut(len(costs), n_stages))
        best = min(value(costs, cut, pairs=False) for cut in every_cut(len(costs), n_stages))
        assert value(costs, boundaries, pairs=False) == best, (costs, boundaries)


@pytest.mark.parametrize("n_ranks", [1, 2, 3])
def test_pairs_against_every_cut(n_ranks):
    for seed in range(40):
        costs = random_costs(seed)
        boundaries = cut_stage_pairs(costs, n_ranks)
        assert boundaries in list(every_cut(len(costs), 2 * n_ranks))
        best = min(value(costs, cut, pairs=True) for cut in every_cut(len(costs), 2 * n_ranks))
        assert value(costs, boundaries, pairs=True) == best, (costs, boundaries)


def test_more_ranks_against_every_cut():
    costs = [1, 5, 0, 3, 3, 3, 2, 4, 1, 1, 6, 12]
    for pairs, boundaries in ((False, cut_stages(costs, 8)), (True, cut_stage_pairs(costs, 4))):
        best = min(value(costs, cut, pairs) for cut in every_cut(len(costs), 8))
        assert value(costs, boundaries, pairs) == best


@pytest.mark.parametrize("costs", [[3, 1, 2, 5], [0, 0, 0, 0], [0.1, 1e12, 0, 7]])
def test_one_layer_per_stage(costs):
    assert cut_stages(costs, 4) == cut_stage_pairs(costs, 2) == [0, 1, 2, 3, 4]


def test_known_cuts():
    assert cut_stages([1] * 6, 3) == [0, 2, 4, 6]
    assert cut_stages([1, 1, 1, 1, 1, 1, 3], 3) == [0, 3, 6, 7]
    # Rank 0 holds the heavy end alone with a light beginning; the middle is rank 1's.
    assert cut_stage_pairs([0, 1, 1, 1, 1, 1, 1, 6], 2) == [0, 1, 4, 7, 8]


def test_rounding_is_no_difference():
    """0.1 + 0.1 + 0.1 differs from 0.3 in the last digit; the even cut is chosen all the same."""
    assert cut_stages([0.1, 0.1, 0.1, 0.3, 0.3], 3) == [0, 3, 4, 5]
    assert cut_stages([0.3, 0.2, 0.1, 0.3, 0.2, 0.3, 0.1, 0.1], 4) == [0, 1, 3, 5, 8]
    assert cut_stages([0.1] * 12, 4) == [0, 3, 6, 9, 12]
    assert cut_stage_pairs([0.1] * 12, 2) == [0, 3, 6, 9, 12]


def test_rank_costs():
    assert rank_costs([1, 2, 3, 4, 5], [0, 2, 3, 4, 5], dualpipev=False) == [3, 3, 4, 5]
    assert rank_costs([1, 2, 3, 4, 5], [0, 2, 3, 4, 5], dualpipev=True) == [8, 7]


@pytest.mark.parametrize(
    ("cut", "costs", "n", "message"),
    [
        (cut_stages, [1, 2], 3, "2 layers cannot be cut into 3 stages"),
        (cut_stage_pairs, [1, 2, 3], 2, "3 layers cannot be cut into 4 stages"),
        (cut_stages, [1, 2], 0, "0 stages"),
        (cut_stages, [1, -2, 3], 2, "not negative"),
        (cut_stage_pairs, [1, float("nan")], 1, "finite"),
    ],
)
def test_refused(cut, costs, n, message):
    with pytest.raises(ValueError, match=message):
        cut(costs, n)
