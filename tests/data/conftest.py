from collections.abc import Callable, Sequence

import pytest

from megamtp.data.dataset_writer import IndexedDatasetWriter
from megamtp.data.indexed_dataset import IndexedDataset


@pytest.fixture
def write_dataset(tmp_path) -> Callable[[Sequence[int]], IndexedDataset]:
    """Documents of the given lengths; token t of the stream is the number t, so a cut shows where it is from."""
    count = 0

    def write(lengths: Sequence[int]) -> IndexedDataset:
        nonlocal count
        prefix = tmp_path / f"data{(count := count + 1)}"
        start = 0
        with IndexedDatasetWriter(prefix, "int32") as writer:
            for length in lengths:
                writer.add_document(range(start, start + length))
                start += length
        return IndexedDataset(prefix)

    return write
