"""Memory of all processes together (PSS) is bounded, whatever the input."""

import gzip
import multiprocessing
import random
from concurrent.futures import ProcessPoolExecutor

import pytest

pytest.importorskip("tokenizers")

from benchmarks.preprocess import peak_mib, write_noise
from megamtp.data.manifest import Manifest
from megamtp.data.preprocess import encoder as encoder_module
from megamtp.data.preprocess.encoder import _resident_bytes
from megamtp.data.preprocess.train_bpe import train_bpe
from megamtp.data.tokenizer import load_tokenizer
from tests.data.preprocessing import COMMAND, TEXTS, choose_encoder, jsonl


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe(TEXTS, 320, path)
    return path


def peak_of(path, tokenizer_path) -> float:
    arguments = ["--input", path, "--tokenizer", tokenizer_path, "--output", path.parent / "x", "--workers", 2]
    return peak_mib([*COMMAND, *map(str, arguments)])


def grow(tokenizer_path) -> tuple[int, int, bool]:
    """In a process whose heap is its own: (times that the cache was dropped, peak of growth in bytes, same ids)."""
    encoder_module.CACHE_BYTES = 8 << 20
    tokenizer = load_tokenizer(tokenizer_path)
    encoder, _ = choose_encoder(tokenizer, [])
    assert encoder.name == "gigatoken"
    rng = random.Random(0)
    before, most, loads, load = _resident_bytes(), 0, [], encoder._load
    encoder._load = lambda: loads.append(1) or load()
    for _ in range(60):
        text = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=100_000))
        ids = encoder.encode(text)
        most = max(most, _resident_bytes() - before)
        encoder.trim()
    return len(loads), most, encoder.encode(text).tolist() == ids.tolist() == tokenizer.encode(text)


def test_a_cache_that_grows_is_dropped(tokenizer_path):
    pytest.importorskip("gigatoken")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        dropped, most, same = process.submit(grow, tokenizer_path).result()
    assert dropped and most < 40 << 20 and same


def test_text_that_never_repeats_itself(tokenizer_path, tmp_path):
    write_noise(tmp_path / "x.jsonl", 20_000_000)
    assert peak_of(tmp_path / "x.jsonl", tokenizer_path) < 1024


@pytest.mark.slow
def test_much_text_that_never_repeats_itself(tokenizer_path, tmp_path):
    write_noise(tmp_path / "x.jsonl", 300_000_000)
    assert peak_of(tmp_path / "x.jsonl", tokenizer_path) < 1024


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_many_tiny_documents(name, tmp_path):
    """Ten times as many take no more memory, in units of megabytes and in one that cannot be cut."""
    peaks = []
    for count in (40_000, 400_000):
        lines = jsonl(["", "a"]) * (count // 2)
        (tmp_path / name).write_bytes(gzip.compress(lines, 1) if name.endswith("gz") else lines)
        peaks.append(peak_of(tmp_path / name, "bytes"))
        assert Manifest.read(tmp_path / "x").documents == count
    assert peaks[1] < peaks[0] + 25


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_text_that_compresses_well(suffix, tmp_path):
    """150 MB of text in a few hundred kilobytes: as much of it waits as of other text."""
    lines = jsonl(["  all the same " * 1000]) * 10_000
    if suffix == ".zst":
        zstd = pytest.importorskip("backports.zstd")
        (tmp_path / "x.jsonl.zst").write_bytes(zstd.compress(lines))
    else:
        (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(lines, 1))
    assert (tmp_path / f"x.jsonl{suffix}").stat().st_size < 2e6
    assert peak_of(tmp_path / f"x.jsonl{suffix}", "bytes") < 256
    assert Manifest.read(tmp_path / "x").tokens == 10_000 * 15_001
