"""From the config's data section to samples."""

import shutil

import numpy as np
import pytest

from megamtp.data.dataset_writer import IndexedDatasetWriter
from megamtp.data.datasets import DataConfig, SourceConfig, StageConfig, ValidationConfig, open_data
from megamtp.data.loader import Loader
from megamtp.data.manifest import Manifest
from megamtp.data.packing import PackedSamples
from megamtp.errors import UserError


@pytest.fixture
def sets(tmp_path):
    """Paths of three sets, of which set i holds the tokens 1000 * i ... 1000 * i + 999."""
    paths = []
    for i, n_documents in enumerate((30, 50, 80)):
        generator = np.random.default_rng(i)
        with IndexedDatasetWriter(tmp_path / f"set{i}", "uint16") as writer:
            for length in generator.integers(1, 30, n_documents):
                writer.add_document(1000 * i + generator.integers(0, 1000, length))
        Manifest.of(writer.written).write(tmp_path / f"set{i}")
        paths.append(str(tmp_path / f"set{i}"))
    return paths


def open_(config, seed=0):
    return open_data(config, vocab_size=3000, n_future_tokens=3, seed=seed)


def owners(loader, steps):
    """Which set each sample of the next steps is from."""
    return [int(row[0]) // 1000 for _ in range(steps) for batch in loader.next_step() for row in batch.tokens]


def test_shares_of_a_blend_and_its_stages(sets):
    sources = [SourceConfig(path=path, weight=weight) for path, weight in zip(sets, (2, 1, 1), strict=True)]
    stages = [StageConfig(from_tokens=10 * 32 * 8, weights=[0, 0.1, 0.9])]
    loader = Loader(open_(DataConfig(train=sources, stages=stages, seq_len=8)).train, 32, 8, 0, 1)
    first = owners(loader, 10)
    for n in range(1, len(first) + 1):
        for source, share in enumerate((0.5, 0.25, 0.25)):
            assert abs(first[:n].count(source) - share * n) < 1
    later = owners(loader, 10)
    assert [later.count(source) for source in range(3)] == [0, 32, 288]


def test_sources_of_equal_size_have_orders_of_their_own(sets, tmp_path):
    for ending in ("bin", "idx", "json"):
        shutil.copy(f"{sets[1]}.{ending}", tmp_path / f"copy.{ending}")
    sources = [SourceConfig(path=sets[1]), SourceConfig(path=str(tmp_path / "copy"))]
    train = open_(DataConfig(train=sources, seq_len=8)).train
    count = train.sources[0].samples_per_epoch
    orders = [[source.start(i) for i in range(count)] for source in train.sources]
    assert orders[0] != orders[1]
    assert orders[0] == [open_(DataConfig(train=sets[1], seq_len=8)).train.sources[0].start(i) for i in range(count)]


def test_validation_fraction(sets):
    """Each set keeps its last documents back; together the two parts are the whole, and no document is in both."""
    sources = [SourceConfig(path=path) for path in sets]
    data = open_(DataConfig(train=sources, validation_fraction=0.2, seq_len=4))
    assert list(data.validation) == ["set0", "set1", "set2"]
    for source, held_out in zip(data.train.sources, data.validation.values(), strict=True):
        trained, kept = source.stream, held_out.stream
        assert np.array_equal(np.concatenate([trained.tokens, kept.tokens]), trained.dataset.tokens)
        assert trained.n_tokens in trained.dataset.document_offsets
        assert abs(kept.n_tokens / trained.dataset.n_tokens - 0.2) < 30 / trained.dataset.n_tokens
    assert not held_out.shuffle and source.shuffle


def test_named_validation_sets(sets):
    validation = [ValidationConfig(path=sets[1]), ValidationConfig(path=sets[2], name="third")]
    data = open_(DataConfig(train=sets[0], validation=validation, seq_len=8))
    assert list(data.validation) == ["set1", "third"]
    assert {int(name_samples.get(0)[0][0]) // 1000 for name_samples in data.validation.values()} == {1, 2}
    assert open_(DataConfig(train=sets[0], seq_len=8)).validation == {}


@pytest.mark.parametrize("packing", ["document", "best_fit"])
def test_packing_and_its_cache(sets, tmp_path, packing):
    config = DataConfig(
        train=sets[0], validation=sets[1], packing=packing, seq_len=8, cache_dir=str(tmp_path / "cache")
    )
    data = open_(config)
    assert all(isinstance(samples, PackedSamples) for samples in (data.train.sources[0], data.validation["set1"]))
    built = sorted((tmp_path / "cache").rglob("*.npy"))
    times = [path.stat().st_mtime_ns for path in built]
    again = open_(config, seed=1)
    assert built and [path.stat().st_mtime_ns for path in sorted((tmp_path / "cache").rglob("*.npy"))] == times
    assert not list(tmp_path.glob("*.cache"))
    assert again.train.sources[0].samples_per_epoch == data.train.sources[0].samples_per_epoch


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train": "nowhere/x"}, "nowhere/x.idx: cannot read the data"),
        ({"seq_len": 100_000}, "a sequence longer than the data"),
        ({"validation": "nowhere/v"}, "nowhere/v.idx"),
        ({"validation_fraction": 0.0001}, "a validation fraction of 0.0001"),
        ({"tokenizer": "none.json"}, "none.json: no such tokenizer"),
    ],
)
def test_what_does_not_fit_is_one_line(sets, changes, expected):
    with pytest.raises(UserError) as error:
        open_(DataConfig(**{"train": sets[0], "seq_len": 8} | changes))
    assert expected in str(error.value) and "\n" not in str(error.value)
