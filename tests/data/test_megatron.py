"""Megatron's own reader and writer on the other side (megatron-core, which `make test` installs)."""

import warnings

import numpy as np
import pytest
import torch

from megamtp.data.dataset_writer import IndexedDatasetWriter
from megamtp.data.indexed_dataset import IndexedDataset, token_dtype
from megamtp.data.manifest import Manifest, make_manifest
from megamtp.data.merge import merge

DOCUMENTS = [[3, 1, 4, 1, 5], [], [9], [], [2, 6, 5, 3, 5, 8, 9, 7, 9]]


@pytest.fixture(scope="module")
def megatron():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what else could be installed
        return pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")


@pytest.mark.parametrize("vocab_size", [100, 65_499, 65_500, 200_000])
def test_megatron_reads_what_is_written_here(megatron, tmp_path, vocab_size):
    dtype = token_dtype(vocab_size)
    assert dtype == megatron.DType.optimal_dtype(vocab_size)
    documents = [*DOCUMENTS, [vocab_size - 1]]
    with IndexedDatasetWriter(tmp_path / "x", dtype) as writer:
        for document in documents:
            writer.add_document(document)
    theirs = megatron.IndexedDataset(str(tmp_path / "x"))
    assert theirs.index.dtype == dtype and theirs[0].dtype == dtype
    assert [theirs[i].tolist() for i in range(len(theirs))] == documents
    assert theirs.sequence_lengths.tolist() == [len(document) for document in documents]
    assert theirs.document_indices.tolist() == list(range(len(documents) + 1))
    assert theirs.get(4, offset=2, length=3).tolist() == documents[4][2:5]


def write_with_megatron(megatron, prefix, documents, dtype):
    """``documents`` of sequences."""
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        for sequence in sequences:
            builder.add_item(torch.tensor(sequence, dtype=torch.int64))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_what_megatron_writes_is_read_here(megatron, tmp_path, dtype):
    documents = [[[1, 2, 3], [4]], [[5]], [[6, 7], [8], [9, 10]]]
    write_with_megatron(megatron, tmp_path / "x", documents, dtype)
    data = IndexedDataset(tmp_path / "x")
    assert data.dtype == dtype and data.n_documents == 3 and len(data) == 6
    assert [sequence.tolist() for sequence in data] == [sequence for document in documents for sequence in document]
    assert data.document_offsets.tolist() == [0, 4, 5, 10]
    manifest = make_manifest(data)
    assert (manifest.documents, manifest.sequences, manifest.tokens, manifest.max_token) == (3, 6, 10, 10)


def test_merged_here_equals_merged_there(megatron, tmp_path):
    """Documents of several sequences included; to the byte."""
    parts = {"a": [[[1, 2], [3]], [[4]]], "b": [[[5]]], "c": [[[6], [7, 8, 9]], [[10], [11]]]}
    for name, documents in parts.items():
        write_with_megatron(megatron, tmp_path / name, documents, np.uint16)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for name in parts:
        builder.add_index(str(tmp_path / name))
    builder.finalize(str(tmp_path / "theirs.idx"))
    merged = merge([tmp_path / name for name in parts], tmp_path / "ours")
    for ending in ("bin", "idx"):
        assert (tmp_path / f"ours.{ending}").read_bytes() == (tmp_path / f"theirs.{ending}").read_bytes()
    assert merged == Manifest.read(tmp_path / "ours") and (merged.documents, merged.sequences) == (5, 8)
