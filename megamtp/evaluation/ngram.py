"""An interpolated Kneser-Ney bigram: the loss that a model must beat to have learned more than pair counts."""

from collections.abc import Iterable

import numpy as np

from megamtp.errors import UserError


class KneserNeyBigram:
    """Interpolated Kneser-Ney over (context, target) pairs of token ids in [0, vocab_size).

    With c(v, w) the count of a pair, N(v, .) the number of distinct targets after v, N(., w) the number of
    distinct contexts before w and N(., .) the number of distinct pairs:

        p(w | v) = (max(c(v, w) - D, 0) + D N(v, .) p_cont(w)) / c(v)       p_cont(w) for a context never seen
        p_cont(w) = (max(N(., w) - D, 0) + D |{w : N(., w) > 0}| / V) / N(., .)
        D = n1 / (n1 + 2 n2),  n_i = the number of pairs that occur exactly i times

    Kneser & Ney 1995, "Improved backing-off for m-gram language modeling": continuation counts. Chen & Goodman
    1998, "An empirical study of smoothing techniques for language modeling", TR-10-98: sections 2.6 (absolute
    discounting, the estimate of D) and 2.7 (the interpolated form). The last level is uniform, so every token
    has a probability above zero and every context's distribution sums to one.

    The target need not be the next token: pairs (x_t, x_{t+k}) give the baseline of head k.
    ``discount`` in (0, 1] replaces the estimate of D.
    """

    def __init__(self, vocab_size: int, discount: float | None = None):
        if vocab_size < 1:
            raise UserError(f"Kneser-Ney bigram: vocab_size is {vocab_size}; give at least 1")
        if discount is not None and not 0 < discount <= 1:
            raise UserError(f"Kneser-Ney bigram: discount is {discount}; give a number above 0 and at most 1")
        self.vocab_size = vocab_size
        self._given_discount = discount
        self._codes: np.ndarray | None = None

    def fit(self, chunks: Iterable[tuple[np.ndarray, np.ndarray]]) -> "KneserNeyBigram":
        """Count the pairs of all chunks, each (prev, next) integer arrays of equal shape; replaces an earlier fit.

        Raises ``UserError`` for no pairs, ids outside the vocabulary, or a discount that cannot be estimated.
        """
        counted = [np.unique(self._encode(prev, next).reshape(-1), return_counts=True) for prev, next in chunks]
        if not sum(codes.size for codes, _ in counted):
            raise UserError("Kneser-Ney bigram: no pairs to fit; give at least one (context, target) pair")
        codes, counts = _merge(counted)
        self.discount = self._given_discount or _estimate_discount(counts)

        size, discount = self.vocab_size, self.discount
        context, target = np.divmod(codes, size)
        context_total = np.bincount(context, weights=counts, minlength=size)  # c(v)      (V,)
        context_types = np.bincount(context, minlength=size)  # N(v, .)   (V,)
        target_types = np.bincount(target, minlength=size)  # N(., w)   (V,)

        reserved = discount * np.count_nonzero(target_types)
        self._continuation = (np.maximum(target_types - discount, 0.0) + reserved / size) / codes.size  # (V,)
        # An unseen context has no discounted mass: all of it backs off.
        self._backoff = np.ones(size)  # (V,)
        np.divide(discount * context_types, context_total, out=self._backoff, where=context_total > 0)
        self._discounted = np.maximum(counts - discount, 0.0) / context_total[context]  # (distinct pairs,)
        self._codes = codes
        return self

    def log_prob(self, prev: np.ndarray, next: np.ndarray) -> np.ndarray:
        """Natural log of p(next | prev), float64, of the shape of ``prev`` and ``next``.

        Raises ``UserError`` for ids outside the vocabulary or shapes that differ.
        """
        return np.log(self._probability(self._encode(prev, next)))

    def mean_nll(self, prev: np.ndarray, next: np.ndarray) -> float:
        """Mean of -log p(next | prev) in nats per token. Raises ``UserError`` as ``log_prob``, and for no pairs."""
        # Each distinct pair is scored once, in order: on long texts several times faster than in text order.
        codes, counts = np.unique(self._encode(prev, next), return_counts=True)
        if not codes.size:
            raise UserError("Kneser-Ney bigram: no pairs to score; give at least one (context, target) pair")
        return -float(np.average(np.log(self._probability(codes)), weights=counts))

    def _probability(self, codes: np.ndarray) -> np.ndarray:
        if self._codes is None:
            raise RuntimeError("KneserNeyBigram: call fit before scoring")
        place = np.minimum(np.searchsorted(self._codes, codes), self._codes.size - 1)
        discounted = np.where(self._codes[place] == codes, self._discounted[place], 0.0)
        context, target = np.divmod(codes, self.vocab_size)
        return discounted + self._backoff[context] * self._continuation[target]

    def _encode(self, prev: np.ndarray, next: np.ndarray) -> np.ndarray:
        """One int64 a pair, prev * V + next: sorted codes are sorted by context, then target."""
        prev, next = np.asarray(prev), np.asarray(next)
        if prev.shape != next.shape:
            raise UserError(f"Kneser-Ney bigram: contexts {prev.shape} and targets {next.shape}; give equal shapes")
        for name, ids in (("context", prev), ("target", next)):
            if ids.dtype.kind not in "iu":
                raise UserError(f"Kneser-Ney bigram: {name} ids are {ids.dtype}; give integers")
            if ids.size and not (0 <= ids.min() and ids.max() < self.vocab_size):
                raise UserError(
                    f"Kneser-Ney bigram: {name} ids span {ids.min()}..{ids.max()}, "
                    f"outside 0..{self.vocab_size - 1}; give the tokenizer's vocab_size"
                )
        return prev.astype(np.int64) * self.vocab_size + next.astype(np.int64)


def _merge(counted: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Sorted distinct codes and their summed counts, from each chunk's."""
    if len(counted) == 1:
        return counted[0]
    codes = np.concatenate([codes for codes, _ in counted])
    counts = np.concatenate([counts for _, counts in counted])
    order = np.argsort(codes, kind="stable")
    codes, counts = codes[order], counts[order]
    first = np.flatnonzero(np.concatenate([[True], codes[1:] != codes[:-1]]))
    return codes[first], np.add.reduceat(counts, first)


def _estimate_discount(counts: np.ndarray) -> float:
    once, twice = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
    if not once:
        raise UserError(
            "Kneser-Ney bigram: no pair occurs exactly once, so the discount cannot be estimated; "
            "fit more text or give discount=0.75"
        )
    return once / (once + 2 * twice)
