"""The loss that a model has to beat: a bigram fitted on exactly the tokens that the model has seen."""

from collections.abc import Iterator

import numpy as np

from megamtp.data.samples import Samples
from megamtp.evaluation.ngram import KneserNeyBigram

Pairs = tuple[np.ndarray, np.ndarray]
SAMPLES_PER_CHUNK = 256


def bigram_validation_loss(
    train: Samples, validation: Samples, *, consumed_samples: int, vocab_size: int, mask_cross_document: bool
) -> float:
    """Mean nats per next token on all of ``validation`` of a Kneser-Ney bigram fitted on the consumed samples.

    The pairs are those on which head 1 is trained and evaluated, document boundaries masked alike.
    """
    bigram = KneserNeyBigram(vocab_size).fit(_pairs(train, consumed_samples, mask_cross_document))
    chunks = list(_pairs(validation, validation.samples_per_epoch, mask_cross_document))
    previous, following = (np.concatenate(column) for column in zip(*chunks, strict=True))
    return bigram.mean_nll(previous, following)


def _pairs(samples: Samples, count: int, mask_cross_document: bool) -> Iterator[Pairs]:
    """(token, next token) of the first ``count`` samples, each (pairs,), some hundred samples at a time."""
    s = samples.seq_len
    for begin in range(0, count, SAMPLES_PER_CHUNK):
        columns = [samples.get(index) for index in range(begin, min(count, begin + SAMPLES_PER_CHUNK))]
        tokens = np.stack([tokens for tokens, _ in columns])
        documents = np.stack([documents for _, documents in columns])
        valid = documents[:, :s] == documents[:, 1 : s + 1]
        valid |= not mask_cross_document
        yield tokens[:, :s][valid], tokens[:, 1 : s + 1][valid]
