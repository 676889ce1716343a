"""The loss that a model has to beat: a bigram fitted on exactly the tokens that the model has seen."""

from collections.abc import Iterator

import numpy as np

from megamtp.data.blend import Blend
from megamtp.data.samples import PADDING, Samples
from megamtp.evaluation.ngram import KneserNeyBigram

Pairs = tuple[np.ndarray, np.ndarray]
SAMPLES_PER_CHUNK = 256


def bigram_validation_loss(
    train: Blend, validation: Samples, *, consumed_samples: int, vocab_size: int, mask_cross_document: bool
) -> float:
    """Mean nats per next token on all of ``validation`` of a Kneser-Ney bigram fitted on the consumed samples.

    The pairs are those on which head 1 is trained and evaluated, document boundaries masked alike.
    """
    cursor = train.cursor()
    seen = (train.fetch(*cursor.take(len(chunk))) for chunk in _chunks(consumed_samples))
    bigram = KneserNeyBigram(vocab_size).fit(_pairs(seen, validation.seq_len, mask_cross_document))
    held_out = map(validation.batch, _chunks(validation.samples_per_epoch))
    chunks = list(_pairs(held_out, validation.seq_len, mask_cross_document))
    previous, following = (np.concatenate(column) for column in zip(*chunks, strict=True))
    return bigram.mean_nll(previous, following)


def _chunks(count: int) -> Iterator[np.ndarray]:
    for begin in range(0, count, SAMPLES_PER_CHUNK):
        yield np.arange(begin, min(count, begin + SAMPLES_PER_CHUNK))


def _pairs(batches: Iterator[Pairs], s: int, mask_cross_document: bool) -> Iterator[Pairs]:
    """(token, next token), each (pairs,), of batches of (tokens, document ids), some hundred samples at a time."""
    for tokens, documents in batches:
        tokens, following = tokens[:, :s], tokens[:, 1 : s + 1]
        valid = (tokens != PADDING) & (following != PADDING)
        if mask_cross_document:
            valid &= documents[:, :s] == documents[:, 1 : s + 1]
        yield tokens[valid], following[valid]
