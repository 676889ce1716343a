from collections import Counter

import numpy as np
import pytest

from megamtp.errors import UserError
from megamtp.evaluation.ngram import KneserNeyBigram


class NaiveKneserNey:
    """The formula read off the page, with dictionaries and sets."""

    def __init__(self, pairs, vocab_size):
        self.vocab_size = vocab_size
        self.count = Counter(pairs)
        n1 = sum(1 for c in self.count.values() if c == 1)
        n2 = sum(1 for c in self.count.values() if c == 2)
        self.discount = n1 / (n1 + 2 * n2)

    def continuation(self, w):
        before = {v for v, x in self.count if x == w}
        seen_targets = {x for _, x in self.count}
        top = max(len(before) - self.discount, 0)
        return (top + self.discount * len(seen_targets) / self.vocab_size) / len(self.count)

    def probability(self, v, w):
        followers = {x: c for (u, x), c in self.count.items() if u == v}
        if not followers:
            return self.continuation(w)
        total = sum(followers.values())
        seen = max(followers.get(w, 0) - self.discount, 0) / total
        return seen + self.discount * len(followers) / total * self.continuation(w)


def corpus(seed, length, vocab_size, used):
    """Zipf-like tokens from the first ``used`` ids, so that the rest are never seen."""
    weights = 1 / np.arange(1, used + 1)
    tokens = np.random.default_rng(seed).choice(used, size=length, p=weights / weights.sum())
    return tokens[:-1], tokens[1:]


def grid(vocab_size):
    """Every (context, target), each (V, V)."""
    return np.meshgrid(np.arange(vocab_size), np.arange(vocab_size), indexing="ij")


@pytest.mark.parametrize(
    "seed, length, vocab_size, used", [(0, 40, 7, 7), (1, 60, 9, 6), (2, 200, 13, 11), (3, 5, 4, 4)]
)
def test_equals_the_formula(seed, length, vocab_size, used):
    prev, next = corpus(seed, length, vocab_size, used)
    model = KneserNeyBigram(vocab_size).fit([(prev, next)])
    naive = NaiveKneserNey(list(zip(prev.tolist(), next.tolist(), strict=True)), vocab_size)
    assert model.discount == pytest.approx(naive.discount)
    expected = [[naive.probability(v, w) for w in range(vocab_size)] for v in range(vocab_size)]
    np.testing.assert_allclose(np.exp(model.log_prob(*grid(vocab_size))), expected, rtol=1e-12)


@pytest.mark.parametrize("discount", [None, 0.1, 1.0])
def test_every_context_sums_to_one_and_no_token_is_impossible(discount):
    vocab_size, used = 50, 30
    model = KneserNeyBigram(vocab_size, discount).fit([corpus(4, 1000, vocab_size, used)])
    log_probs = model.log_prob(*grid(vocab_size))  # contexts 30..49 are unseen
    assert log_probs.dtype == np.float64 and np.isfinite(log_probs).all()
    np.testing.assert_allclose(np.exp(log_probs).sum(axis=1), 1.0, rtol=1e-12)


def test_chunks_count_as_one_text():
    prev, next = corpus(5, 3000, 40, 40)
    whole = KneserNeyBigram(40).fit([(prev, next)])
    cuts = [0, 1, 1, 700, prev.size]
    parts = KneserNeyBigram(40).fit((prev[a:b], next[a:b]) for a, b in zip(cuts, cuts[1:], strict=False))
    assert parts.discount == whole.discount
    np.testing.assert_array_equal(parts.log_prob(*grid(40)), whole.log_prob(*grid(40)))


def test_fit_forgets_the_fit_before():
    first, second = corpus(6, 500, 20, 20), corpus(7, 500, 20, 20)
    again = KneserNeyBigram(20).fit([first]).fit([second])
    np.testing.assert_array_equal(again.log_prob(*grid(20)), KneserNeyBigram(20).fit([second]).log_prob(*grid(20)))


def test_learns_from_a_text_with_structure():
    """x -> 2x + 1 mod V half of the time: below uniform (log V), above the source's entropy."""
    vocab_size, rng = 64, np.random.default_rng(8)
    tokens = [1]
    for jump in rng.random(20_000) < 0.5:
        tokens.append(int(rng.integers(vocab_size)) if jump else (2 * tokens[-1] + 1) % vocab_size)
    tokens = np.array(tokens, dtype=np.uint16)
    model = KneserNeyBigram(vocab_size).fit([(tokens[:10_000], tokens[1:10_001])])
    hit, miss = 0.5 + 0.5 / vocab_size, 0.5 / vocab_size
    entropy = -hit * np.log(hit) - (vocab_size - 1) * miss * np.log(miss)
    seen = model.mean_nll(tokens[:10_000], tokens[1:10_001])
    unseen = model.mean_nll(tokens[10_000:-1], tokens[10_001:])
    assert seen < unseen < np.log(vocab_size)
    assert entropy - 0.05 < unseen < entropy + 0.3


def test_mean_nll_is_the_mean_over_tokens():
    prev, next = corpus(9, 1000, 20, 20)
    model = KneserNeyBigram(20).fit([(prev, next)])
    assert model.mean_nll(prev, next) == pytest.approx(-model.log_prob(prev, next).mean(), rel=1e-12)


def test_the_largest_code_and_one_token():
    model = KneserNeyBigram(5).fit([(np.array([4, 0]), np.array([4, 1]))])
    assert np.isfinite(model.log_prob(np.array([4]), np.array([4]))).all()
    single = KneserNeyBigram(1).fit([(np.array([0]), np.array([0]))])
    assert single.mean_nll(np.array([0]), np.array([0])) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    "prev, next, message",
    [
        ([0, 5], [1, 1], r"context ids span 0\.\.5, outside 0\.\.4"),
        ([0, 1], [1, -100], r"target ids span -100\.\.1"),
        ([0, 1], [1], "equal shapes"),
        ([0.0], [1.0], "give integers"),
    ],
)
def test_refuses_bad_pairs(prev, next, message):
    prev, next = np.array(prev), np.array(next)
    with pytest.raises(UserError, match=message):
        KneserNeyBigram(5).fit([(prev, next)])
    model = KneserNeyBigram(5).fit([(np.array([0]), np.array([1]))])
    with pytest.raises(UserError, match=message):
        model.log_prob(prev, next)


def test_refuses_what_cannot_be_estimated():
    nothing = np.array([], dtype=np.int64)
    with pytest.raises(UserError, match="no pairs to fit"):
        KneserNeyBigram(5).fit([])
    with pytest.raises(UserError, match="no pairs to fit"):
        KneserNeyBigram(5).fit([(nothing, nothing)])
    with pytest.raises(UserError, match="exactly once"):
        KneserNeyBigram(5).fit([(np.zeros(4, int), np.ones(4, int))])
    with pytest.raises(UserError, match="discount is 0"):
        KneserNeyBigram(5, discount=0)
    with pytest.raises(UserError, match="no pairs to score"):
        KneserNeyBigram(5).fit([(np.array([0]), np.array([1]))]).mean_nll(nothing, nothing)
    with pytest.raises(RuntimeError, match="fit before"):
        KneserNeyBigram(5).log_prob(np.array([0]), np.array([1]))
