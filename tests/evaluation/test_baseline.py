import numpy as np
import pytest

from megamtp.data.blend import Blend
from megamtp.data.indexed_dataset import IndexedDataset
from megamtp.data.samples import Samples
from megamtp.evaluation.baseline import SAMPLES_PER_CHUNK, bigram_validation_loss
from megamtp.evaluation.ngram import KneserNeyBigram
from tests.training.tiny import write_corpus

VOCAB = 2000  # enough that some pairs occur only once


@pytest.mark.parametrize("mask", [True, False])
def test_the_bigram_sees_the_pairs_of_the_consumed_samples(tmp_path, mask):
    """More samples than a chunk holds, more than an epoch; pairs collected one by one."""
    train = Samples(IndexedDataset(write_corpus(tmp_path / "train", 480, 0, VOCAB)), 16, 4, seed=3)
    validation = Samples(
        IndexedDataset(write_corpus(tmp_path / "validation", 40, 1, VOCAB)), 16, 4, seed=3, shuffle=False
    )

    def pairs(samples, count):
        found = []
        for index in range(count):
            tokens, documents = samples.get(index)
            found += [(tokens[i], tokens[i + 1]) for i in range(16) if not mask or documents[i] == documents[i + 1]]
        return tuple(np.array(column) for column in zip(*found, strict=True))

    consumed = train.samples_per_epoch + 50
    assert consumed > SAMPLES_PER_CHUNK
    expected = (
        KneserNeyBigram(VOCAB).fit([pairs(train, consumed)]).mean_nll(*pairs(validation, validation.samples_per_epoch))
    )
    loss = bigram_validation_loss(
        Blend([train], [(0, [1])]), validation, consumed_samples=consumed, vocab_size=VOCAB, mask_cross_document=mask
    )
    assert loss == pytest.approx(expected, rel=1e-12)
