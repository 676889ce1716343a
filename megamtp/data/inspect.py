"""What is in a data set: counts, the lengths of its documents, a look at some of them."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from megamtp.data.indexed_dataset import SCAN_ITEMS, IndexedDataset

QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
QUANTILE_DOCUMENTS = 10_000_000  # beyond that the quantiles are those of evenly spaced documents


class Lengths(NamedTuple):
    """Of documents, in tokens, the ends of documents included."""

    documents: int
    empty: int
    shortest: int
    longest: int
    mean: float
    quantiles: dict[float, int]
    octaves: dict[int, tuple[int, int]]  # 2^i <= length < 2^(i + 1) -> (documents, tokens); -1 for empty ones


def document_lengths(dataset: IndexedDataset) -> Lengths:
    """Statistics of the documents' lengths, in bounded memory."""
    documents = np.zeros(64, np.int64)
    tokens = np.zeros(64, np.int64)
    sample: list[np.ndarray] = []
    stride = -(-max(1, dataset.n_documents) // QUANTILE_DOCUMENTS)
    shortest, longest = np.iinfo(np.int64).max, 0
    for lengths in _lengths(dataset):
        octave = np.frexp(lengths)[1]  # 0 for an empty document, else its octave + 1
        documents += np.bincount(octave, minlength=64)
        tokens += np.bincount(octave, weights=lengths, minlength=64).astype(np.int64)
        sample.append(lengths[::stride])
        shortest, longest = min(shortest, int(lengths.min())), max(longest, int(lengths.max()))
    count = int(documents.sum())
    quantiles = np.quantile(np.concatenate(sample), QUANTILES, method="nearest") if count else [0] * len(QUANTILES)
    return Lengths(
        documents=count,
        empty=int(documents[0]),
        shortest=shortest if count else 0,
        longest=longest,
        mean=dataset.n_tokens / max(1, count),
        quantiles=dict(zip(QUANTILES, map(int, quantiles), strict=True)),
        octaves={i - 1: (int(documents[i]), int(tokens[i])) for i in range(64) if documents[i]},
    )


def length_table(lengths: Lengths, width: int = 40) -> str:
    """A histogram by powers of two, as text."""
    most = max((tokens for _, tokens in lengths.octaves.values()), default=0)
    total = sum(tokens for _, tokens in lengths.octaves.values())
    rows = [f"{'length':>21}  {'documents':>13}  {'tokens':>17}  share"]
    for octave, (documents, tokens) in lengths.octaves.items():
        span = f"{2**octave:,} - {2 ** (octave + 1) - 1:,}" if octave >= 0 else "0"
        share = tokens / max(1, total)
        rows.append(
            f"{span:>21}  {documents:>13,}  {tokens:>17,}  {share:6.1%} {'#' * round(width * tokens / max(1, most))}"
        )
    return "\n".join(rows)


def pick_documents(dataset: IndexedDataset, count: int, seed: int) -> list[int]:
    """Numbers of ``count`` documents (or all), drawn without repetition, in file order."""
    count = min(count, dataset.n_documents)
    random = np.random.default_rng(seed)
    chosen: set[int] = set()
    while len(chosen) < count:
        chosen.add(int(random.integers(dataset.n_documents)))
    return sorted(chosen)


def document_tokens(dataset: IndexedDataset, document: int) -> np.ndarray:
    """The tokens of one document (length,), a view."""
    first, last = (int(dataset.document_indices[document + i]) for i in (0, 1))
    if first == last:
        return dataset.tokens[:0]
    start = int(dataset.pointers[first]) // dataset.dtype.itemsize
    return dataset.tokens[start : start + int(dataset.lengths[first:last].sum(dtype=np.int64))]


def _lengths(dataset: IndexedDataset) -> Iterator[np.ndarray]:
    """int64 lengths of documents, some millions at a time."""
    for first in range(0, dataset.n_documents, SCAN_ITEMS):
        bounds = dataset.document_indices[first : first + SCAN_ITEMS + 1]
        sequences = dataset.lengths[bounds[0] : bounds[-1]]
        sums = np.concatenate([[0], np.cumsum(sequences, dtype=np.int64)])
        yield np.diff(sums[bounds - bounds[0]])
