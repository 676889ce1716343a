"""Several data sets into one."""

import json
from pathlib import Path

import numpy as np
import pytest

from megamtp.data.dataset_writer import IndexedDatasetWriter
from megamtp.data.indexed_dataset import HEADER, IndexedDataset
from megamtp.data.manifest import Manifest
from megamtp.data.merge import merge
from megamtp.data.preprocess.encode import preprocess
from megamtp.errors import UserError
from tests.data.preprocessing import SUFFIXES, check_whole, contents, jsonl
from tools import merge_data


def write(prefix: Path, documents, dtype="uint16", **source) -> Path:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    Manifest.of(writer.written, **source).write(prefix)
    return prefix


def test_documents_one_after_another(tmp_path):
    parts = [[[1, 2], [], [3]], [], [[], [4] * 1000], [[5]]]
    prefixes = [write(tmp_path / f"{i}", documents, skipped=i) for i, documents in enumerate(parts)]
    manifest = merge(prefixes, tmp_path / "out" / "x")
    data = IndexedDataset(tmp_path / "out" / "x")
    assert [list(document) for document in data] == sum(parts, [])
    assert manifest == check_whole(tmp_path / "out" / "x")
    assert (manifest.documents, manifest.tokens, manifest.max_token, manifest.skipped) == (6, 1004, 5, 6)
    assert contents(write(tmp_path / "whole", sum(parts, []), skipped=6)) == contents(tmp_path / "out" / "x")
    assert all(Path(f"{prefix}.bin").exists() for prefix in prefixes)


def test_documents_of_several_sequences_stay_together(tmp_path):
    """Megatron may cut a document into sequences."""
    write(tmp_path / "a", [[1]])
    write(tmp_path / "b", [[2, 3], [4], [5]])
    (tmp_path / "b.json").unlink()
    content = bytearray((tmp_path / "b.idx").read_bytes())
    content[HEADER.size - 8 : HEADER.size] = (3).to_bytes(8, "little")  # document indices
    content[HEADER.size + 3 * 12 :] = np.array([0, 2, 3], "<i8").tobytes()
    (tmp_path / "b.idx").write_bytes(content)
    merge([tmp_path / "a", tmp_path / "b", write(tmp_path / "c", [[6]])], tmp_path / "x")
    data = IndexedDataset(tmp_path / "x")
    assert data.document_indices.tolist() == [0, 1, 3, 4, 5] and data.lengths.tolist() == [1, 2, 1, 1, 1]


def test_what_is_known_of_the_text_is_kept(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(jsonl(["a", "b", "c"]))
    for i in range(2):
        preprocess([tmp_path / "x.jsonl"], "bytes", tmp_path / f"{i}", shard=(i, 2))
    preprocess([tmp_path / "x.jsonl"], "bytes", tmp_path / "whole")
    merge([tmp_path / "0", tmp_path / "1"], tmp_path / "x")
    assert contents(tmp_path / "x") == contents(tmp_path / "whole")
    # Where one does not tell, nothing is claimed.
    (tmp_path / "1.json").unlink()
    assert merge([tmp_path / "0", tmp_path / "1"], tmp_path / "x").tokenizer_sha256 is None


def test_inputs_are_removed_when_asked(tmp_path):
    prefixes = [write(tmp_path / f"{i}", [[i]]) for i in range(3)]
    (tmp_path / "1.json").unlink()
    merge(prefixes, tmp_path / "x", remove=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"x{suffix}" for suffix in SUFFIXES]


@pytest.mark.parametrize(
    "other, expected",
    [
        ({"dtype": "int32"}, "b: stores int32, .*a uint16"),
        ({"tokenizer_sha256": "f" * 64}, "b: tokenizer_sha256 is f+, .*a has None"),
        ({"eod_id": 5}, "b: eod_id is 5, .*a has None"),
        ({"vocab_size": 9}, "b: vocab_size is 9"),
    ],
)
def test_what_does_not_belong_together_is_refused(other, expected, tmp_path):
    write(tmp_path / "a", [[1]])
    write(tmp_path / "b", [[2]], **other)
    with pytest.raises(UserError, match=expected):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "x")
    assert not list(tmp_path.glob("x*"))


def test_damage_is_refused(tmp_path):
    write(tmp_path / "a", [[1]])
    for name, change in (("truncated", lambda data: data[:-2]), ("longer", lambda data: data + data)):
        prefix = write(tmp_path / name, [[2, 3]])
        path = Path(f"{prefix}.bin")
        path.write_bytes(change(path.read_bytes()))
        with pytest.raises(UserError, match=f"{name}.bin: "):
            merge([tmp_path / "a", prefix], tmp_path / "x", remove=True)
    with pytest.raises(UserError, match="nowhere.idx: cannot read the data"):
        merge([tmp_path / "a", tmp_path / "nowhere"], tmp_path / "x", remove=True)
    assert not list(tmp_path.glob("x*")) and IndexedDataset(tmp_path / "a").n_tokens == 1


def test_inputs_given_twice_and_outputs_among_them(tmp_path):
    write(tmp_path / "a", [[1]])
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="given twice"):
        merge([tmp_path / "a", tmp_path / "folder" / ".." / "a"], tmp_path / "x")
    with pytest.raises(UserError, match="is among the inputs"):
        merge([tmp_path / "a"], tmp_path / "folder" / ".." / "a")
    assert IndexedDataset(tmp_path / "a").n_tokens == 1


def test_command_takes_what_a_glob_of_the_shell_gives(tmp_path, capsys):
    for i in range(3):
        write(tmp_path / f"x-0000{i}-of-00003", [[i, i]])
    merge_data.main(
        ["--input", *map(str, sorted(tmp_path.glob("x-*-of-00003.idx"))), "--output", str(tmp_path / "x"), "--remove"]
    )
    assert json.loads(capsys.readouterr().out)["documents"] == 3
    assert [document.tolist() for document in IndexedDataset(tmp_path / "x")] == [[0, 0], [1, 1], [2, 2]]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.bin", "x.idx", "x.json"]


@pytest.mark.parametrize(
    "given, expected", [("02", "x-00001-of-00003: is not among .*1 of 3 are"), ("102", "sort them")]
)
def test_shards_that_are_missing_or_out_of_order(tmp_path, given, expected):
    for i in range(3):
        write(tmp_path / f"x-0000{i}-of-00003", [[i, i]])
    with pytest.raises(UserError, match=expected) as error:
        merge([tmp_path / f"x-0000{i}-of-00003" for i in given], tmp_path / "x", remove=True)
    assert "\n" not in str(error.value) and len(list(tmp_path.iterdir())) == 9
