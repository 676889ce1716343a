import json
import math
import random
import time
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest

from megamtp.data.blend import Blend
from megamtp.data.packing import PackedSamples
from megamtp.data.samples import Samples
from megamtp.errors import UserError


@dataclass
class Source:
    """Only what mixing needs."""

    samples_per_epoch: int = 10
    seq_len: int = 8
    n_future_tokens: int = 2


def blend(*stages):
    return Blend([Source() for _ in stages[0][1]], stages)


def check_bound(source, weights):
    """|count - N * w| < 1 for every source after every sample, by plain counting."""
    fractions = [Fraction(str(weight)) for weight in weights]
    scale = math.prod({fraction.denominator for fraction in fractions})
    shares = [int(fraction * scale) for fraction in fractions]
    total = sum(shares)
    counts = [0] * len(weights)
    for taken, i in enumerate(source.tolist(), start=1):
        counts[i] += 1
        assert all(abs(count * total - taken * share) < total for count, share in zip(counts, shares, strict=True))
    for count, weight in zip(counts, weights, strict=True):
        assert weight or not count
    return counts


def check_indices(source, index, n_sources, begin=None):
    for i in range(n_sources):
        mine = index[source == i].tolist()
        first = begin[i] if begin else 0
        assert mine == list(range(first, first + len(mine)))


WEIGHTS = [
    [1],
    [0.5, 0.5],
    [0.3, 0.7],
    [1 / 3, 1 / 3, 1 / 3],
    [0.9, *[0.01] * 10],
    [*[0.01] * 10, 0.9],
    [1e-6, 1],
    [0, 3, 0, 1, 0],
    [5, 0],
    [1] * 17,
    [2**-i for i in range(12)],
    [0.123456789, 7.654321, 1e-9, 3],
]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_within_one_of_the_share_at_every_prefix(weights):
    source, index = blend((0, weights)).cursor().take(2000)
    assert source.dtype == np.int32 and index.dtype == np.int64
    counts = check_bound(source, weights)
    check_indices(source, index, len(weights))
    assert sum(counts) == 2000


def test_within_one_for_random_weights():
    generator = random.Random(0)
    for _ in range(150):
        n_sources = generator.randint(2, 15)
        scale = generator.choice([3, 10, 1000])
        weights = [generator.choice([generator.randint(0, scale), generator.random()]) for _ in range(n_sources)]
        if sum(weights):
            check_bound(blend((0, weights)).cursor().take(300)[0], weights)


def naive_order(weights, count):
    """Source by source and sample by sample, with fractions."""
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    taken, order = [0] * len(weights), []
    for place in range(count):
        jobs = [
            (math.ceil((done + 1) / share), i)
            for i, (done, share) in enumerate(zip(taken, shares, strict=True))
            if share and math.floor(done / share) <= place
        ]
        order.append(min(jobs)[1])
        taken[order[-1]] += 1
    return order


def test_order_is_frozen():
    """A change of the order would make every resumed run read other data: then say so, and change the state."""
    assert blend((0, [1, 2, 4])).cursor().take(14)[0].tolist() == [2, 1, 2, 2, 0, 1, 2, 2, 1, 2, 2, 0, 1, 2]
    for weights in ([5, 3, 2], [18, 1, 1], [3, 0, 7, 11, 2], [10, 11, 34], [1, 1, 1], [9, 8, 7, 6, 5, 4]):
        assert blend((0, weights)).cursor().take(300)[0].tolist() == naive_order(weights, 300)


def test_exact_shares_over_a_period():
    source, _ = blend((0, [0.1, 0.2, 0.7])).cursor().take(10 * 500)
    for period in source.reshape(500, 10):
        assert np.bincount(period).tolist() == [1, 2, 7]
    scaled, _ = blend((0, [10, 20, 70.0])).cursor().take(5000)
    assert np.array_equal(source, scaled)


STAGES = [(0, [0.6, 0.3, 0.1, 0]), (37, [0.1, 0.1, 0.1, 0.7]), (38, [1, 0, 0, 0]), (60, [1, 1, 1, 1])]


def test_stages():
    cursor = blend(*STAGES).cursor()
    source, index = cursor.take(200)
    for (first, weights), last in zip(STAGES, [37, 38, 60, 200], strict=True):
        check_bound(source[first:last], weights)
    check_indices(source, index, 4)
    assert cursor.consumed == 200 and cursor.consumed_per_source == np.bincount(source).tolist()
    assert blend(*STAGES).epochs(cursor.consumed_per_source) == [count / 10 for count in np.bincount(source)]


@pytest.mark.parametrize("stages", [STAGES, STAGES[:1], [(0, [0, 1])], [(0, [0.9, *[0.01] * 10])]])
def test_however_it_is_taken_it_is_the_same(stages):
    whole = blend(*stages).cursor().take(130)
    for step in (1, 7, 37, 64):
        cursor, parts = blend(*stages).cursor(), []
        while cursor.consumed < 130:
            parts.append(cursor.take(min(step, 130 - cursor.consumed)))
        assert all(np.array_equal(np.concatenate([part[column] for part in parts]), whole[column]) for column in (0, 1))
    assert [len(part) for part in cursor.take(0)] == [0, 0]
    for consumed in range(131):
        cursor = blend(*stages).cursor()
        cursor.take(consumed)
        state = json.loads(json.dumps(cursor.state_dict()))
        assert state["consumed_samples"] == consumed and sum(state["consumed_per_source"]) == consumed
        resumed = blend(*stages).cursor(state)
        assert resumed.state_dict() == state
        assert all(np.array_equal(a, b[consumed:]) for a, b in zip(resumed.take(130 - consumed), whole, strict=True))


@pytest.mark.parametrize("consumed", [0, 1, 37, 45, 60])
def test_the_future_may_change(consumed):
    cursor = blend(*STAGES).cursor()
    before = cursor.take(consumed)[0]
    past = [stage for stage in STAGES if stage[0] < consumed]
    new = [0.2, 0, 0.8, 0]
    changed = blend(*past, (consumed, new)).cursor(cursor.state_dict())
    source, index = changed.take(50)
    check_bound(source, new)
    check_indices(source, index, 4, begin=np.bincount(before, minlength=4).tolist())
    # The last stage of the past goes on where it was, if the next one is put off.
    if past:
        later = blend(*past, (100, new)).cursor(cursor.state_dict()).take(100 - consumed)[0]
        check_bound(np.concatenate([before, later])[past[-1][0] :], past[-1][1])


def test_a_source_may_be_added():
    cursor = blend((0, [0.5, 0.5])).cursor()
    cursor.take(11)
    resumed = blend((0, [0.5, 0.5, 0]), (11, [0.2, 0.3, 0.5])).cursor(json.loads(json.dumps(cursor.state_dict())))
    source, index = resumed.take(100)
    check_bound(source, [0.2, 0.3, 0.5])
    check_indices(source, index, 3, begin=[*cursor.consumed_per_source, 0])


@pytest.mark.parametrize(
    "stages, message",
    [
        ([(0, [0.5, 0.5])], "stages before sample 40 differ.* from 0: 3:7, from 30: 1:1 and now from 0: 1:1; leave"),
        ([(0, [0.3, 0.7])], "stages before sample 40 differ"),
        ([(0, [0.3, 0.7]), (39, [0.5, 0.5])], "add a stage that begins at sample 40"),
        ([(0, [0.3, 0.7]), (30, [0.5, 0.4])], "differ"),
        ([(0, [0.3, 0.7]), (30, [0.5, 0.5]), (35, [1, 0])], "differ"),
        ([(0, [1])], "made with 2 data sources, now there are 1; .* weight 0 from sample 40 on"),
        ([(0, [0.3, 0.7, 0.1]), (30, [0.5, 0.5, 0])], "differ"),
    ],
)
def test_the_past_must_not_change(stages, message):
    cursor = blend((0, [0.3, 0.7]), (30, [1, 1]), (50, [1, 0])).cursor()
    cursor.take(40)
    with pytest.raises(UserError, match=message) as error:
        blend(*stages).cursor(cursor.state_dict())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "stages, message",
    [
        ([], "begin at samples"),
        ([(1, [1, 1])], r"begin at samples \[1\]; the first must begin at 0"),
        ([(0, [1, 1]), (5, [1, 1]), (5, [1, 0])], "must rise"),
        ([(0, [1, 1]), (7, [1, 1]), (5, [1, 0])], "must rise"),
        ([(0, [1])], "give 2 numbers"),
        ([(0, [])], "give 2 numbers"),
        ([(0, [0, 0])], "not all 0"),
        ([(0, [1, 1]), (9, [1, -0.1])], r"\[1, -0.1\] from sample 9 on.*none negative"),
        ([(0, [1, float("nan")])], "data weights"),
        ([(0, [1, float("inf")])], "data weights"),
    ],
)
def test_bad_stages(stages, message):
    with pytest.raises(UserError, match=message):
        Blend([Source(), Source()], stages)


def test_sources_of_different_shapes():
    with pytest.raises(ValueError):
        Blend([Source(), Source(seq_len=9)], [(0, [1, 1])])


def test_fetch(write_dataset):
    sources = [
        Samples(write_dataset([100, 50]), 8, 2, seed=0),
        PackedSamples(write_dataset([5, 9, 30, 2]), 8, 2, seed=0),
        Samples(write_dataset([40] * 9), 8, 2, seed=1),
    ]
    mixed = Blend(sources, [(0, [0.5, 0.2, 0.3]), (40, [0, 0, 1])])
    cursor = mixed.cursor()
    for _ in range(10):
        source, index = cursor.take(7)
        tokens, ids = mixed.fetch(source, index)
        assert tokens.dtype == np.int64 and ids.dtype == np.int32 and tokens.shape == ids.shape == (7, 10)
        for row, (i, j) in enumerate(zip(source.tolist(), index.tolist(), strict=True)):
            expected = sources[i].get(j)
            assert np.array_equal(tokens[row], expected[0]) and np.array_equal(ids[row], expected[1])
    assert mixed.identity() == [source.identity() for source in sources]
    assert (mixed.seq_len, mixed.n_future_tokens) == (8, 2)


def test_fast():
    """2048 samples of 20 sources take milliseconds (5 here; the bound leaves room for a busy machine)."""
    generator = random.Random(1)
    cursor = blend((0, [generator.random() for _ in range(20)])).cursor()
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        cursor.take(2048)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.05
