"""Whatever ends a run: it ends soon, with a word, leaves no process and nothing that looks whole; the next one works.

Processes are killed at moments drawn uniformly over a run that is slow enough to be hit anywhere.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytest.importorskip("tokenizers")

from megamtp.data import dataset_writer
from megamtp.data.indexed_dataset import IndexedDataset
from megamtp.data.merge import merge
from megamtp.data.preprocess import encode
from megamtp.data.preprocess.encode import preprocess
from megamtp.data.preprocess.train_bpe import train_bpe
from megamtp.data.tokenizer import HuggingFaceTokenizer
from megamtp.errors import RunFailure, UserError
from tests.data.preprocessing import (
    ROOT,
    SUFFIXES,
    TEXTS,
    check_whole,
    contents,
    environment,
    jsonl,
    processes_with,
    python_sources,
    run_command,
)
from tests.data.test_documents import write
from tests.data.test_preprocess import MPIRUN, needs_mpi

# The command, made slow and with many units.
SLOW = f"""
import runpy, sys
sys.modules["gigatoken"] = None
from megamtp.data.preprocess import encode, inputs
inputs.UNIT_BYTES, encode.BATCH_CHARACTERS = 1 << 16, 1 << 14
sys.argv[0] = {str(ROOT / "tools" / "preprocess_data.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Job:
    """An input, and the slow command that makes a data set of it."""

    def __init__(self, folder: Path):
        self.corpus, self.tokenizer = folder / "corpus.jsonl", folder / "tokenizer.json"
        self.corpus.write_bytes(jsonl(python_sources()[::2]))
        train_bpe(TEXTS, 320, self.tokenizer)
        preprocess([self.corpus], self.tokenizer, folder / "whole")
        self.expected = contents(folder / "whole")
        with self.run(folder / "slow" / "x") as process:
            started = time.monotonic()
            assert process.wait(60) == 0
            self.seconds = time.monotonic() - started
            print(f"a whole run: {self.seconds:.2f} s")

    @contextlib.contextmanager
    def run(self, prefix: Path, *launcher: str, workers: int = 2) -> Iterator[subprocess.Popen]:
        """The command's process, once it begins to encode. Nothing may be left of it at the end."""
        arguments = ["--input", self.corpus, "--tokenizer", self.tokenizer, "--output", prefix, "--workers", workers]
        command = [*launcher, sys.executable, "-c", SLOW, *map(str, arguments)]
        with subprocess.Popen(
            command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        ) as process:
            try:
                while b"encoding with tokenizers" not in (line := process.stderr.readline()):
                    assert line, "it ended before it began"
                yield process
            finally:
                left = wait_for_none(str(prefix))
                for other in left:
                    other.kill()
        assert not left

    def check_what_is_left(self, prefix: Path) -> bool:
        """Nothing looks whole and is not. Returns whether the data set is there; then another run makes it."""
        if complete := Path(f"{prefix}.json").exists():
            check_whole(prefix)
            assert contents(prefix) == self.expected
        elif Path(f"{prefix}.idx").exists():  # between the pair and its manifest
            assert IndexedDataset(prefix).n_tokens > 0
            assert all(Path(f"{prefix}{suffix}").read_bytes() == self.expected[suffix] for suffix in (".bin", ".idx"))
        preprocess([self.corpus], self.tokenizer, prefix)
        assert contents(prefix) == self.expected
        assert sorted(file.name for file in prefix.parent.iterdir()) == [f"{prefix.name}{s}" for s in SUFFIXES]
        return complete


def wait_for_none(argument: str, seconds: float = 10) -> list[psutil.Process]:
    deadline = time.monotonic() + seconds
    while (left := processes_with(argument)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return Job(tmp_path_factory.mktemp("job"))


def at_moments(n_fast: int, n_slow: int):
    """Parametrize by seeds of moments, the later ones slow."""
    seeds = [*range(n_fast), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(n_fast, n_slow))]
    return pytest.mark.parametrize("seed", seeds)


def sleep_until_moment(job: Job, seed: int) -> random.Random:
    rng = random.Random(seed)
    moment = rng.uniform(0, job.seconds)
    print(f"seed {seed}: after {moment:.3f} of {job.seconds:.3f} s")
    time.sleep(moment)
    return rng


@at_moments(10, 60)
def test_a_killed_worker(seed, job, tmp_path):
    with job.run(tmp_path / "x") as process:
        rng = sleep_until_moment(job, seed)
        with contextlib.suppress(psutil.Error, IndexError):  # the run may be over
            rng.choice(psutil.Process(process.pid).children()).kill()
        code, error = process.wait(20), process.stderr.read().decode()
    assert "Traceback" not in error
    if code == 1:
        last = error.strip().splitlines()[-1]
        assert last.startswith("error: worker ") and "was killed by SIGKILL at " in last
        assert not list(tmp_path.iterdir())
    else:
        assert code == 0  # it had done its work
        assert (tmp_path / "x.json").exists()
    job.check_what_is_left(tmp_path / "x")


@at_moments(5, 60)
def test_a_killed_parent(seed, job, tmp_path):
    with job.run(tmp_path / "x") as process:
        sleep_until_moment(job, seed)
        process.kill()
        process.wait(20)
    complete = job.check_what_is_left(tmp_path / "x")
    assert complete or process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("everyone", [False, True], ids=["parent", "group"])  # the latter as Ctrl-C and SLURM do it
@at_moments(1, 30)
def test_a_stop(seed, everyone, number, job, tmp_path):
    with job.run(tmp_path / "x") as process:
        sleep_until_moment(job, seed + 1000 * number + 500 * everyone)
        (os.killpg if everyone else os.kill)(process.pid, number)
        code, error = process.wait(20), process.stderr.read().decode()
    if code == 130:
        assert error.strip().splitlines()[-1] == "interrupted" and "Traceback" not in error
        assert (tmp_path / "x.json").exists() or not list(tmp_path.glob("*.tmp"))
    else:
        assert code in (0, -number) and (tmp_path / "x.json").exists()  # in the last moments of the interpreter
    job.check_what_is_left(tmp_path / "x")


@needs_mpi
@at_moments(2, 20)
def test_a_killed_rank(seed, job, tmp_path):
    pytest.importorskip("mpi4py")
    launcher = [MPIRUN, "--allow-run-as-root", "--oversubscribe", "-n", "2"]
    with job.run(tmp_path / "x", *launcher, workers=1) as process:
        rng = sleep_until_moment(job, seed)
        ranks = [rank for rank in processes_with(str(tmp_path)) if rank.ppid() == process.pid]
        if ranks:
            rng.choice(ranks).kill()
        code = process.wait(20)
    if code == 0 or (tmp_path / "x.json").exists():  # it may have been the last thing it did
        assert contents(tmp_path / "x") == job.expected
    with job.run(tmp_path / "x", *launcher, workers=1) as process:
        assert process.wait(60) == 0
    job.check_what_is_left(tmp_path / "x")


# --- a full disk


@pytest.mark.parametrize("texts", ["long", "tiny"])  # tokens fill the disk, or lengths and boundaries
def test_a_full_disk(texts, small_disk, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 1 << 17)
    lines = jsonl(["x" * 100_000] * 60 if texts == "long" else ["x"] * 30_000)
    (tmp_path / "x.jsonl").write_bytes(lines)
    preprocess([tmp_path / "x.jsonl"], "bytes", tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    spools = 12 * check_whole(tmp_path / "whole").documents
    needed = sum(map(len, expected.values())) + spools
    sizes = [4096, *(needed * i // 7 for i in range(1, 7)), needed - spools // 2 - 4096, needed + (16 << 20)]
    failures = []
    for size in sizes:
        folder = small_disk(size)
        try:
            preprocess([tmp_path / "x.jsonl"], "bytes", folder / "x", workers=2)
        except RunFailure as error:
            assert "cannot write: No space left on device; free some space and run it again" in str(error)
            assert not list(folder.iterdir())
            failures.append(size)
    assert set(sizes[:5]) <= set(failures) and sizes[-1] not in failures
    assert contents(folder / "x") == expected


def test_a_full_disk_ends_the_command_with_a_line(small_disk, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(jsonl(["x" * 100_000] * 60))
    folder = small_disk(1 << 20)
    result = run_command("--input", tmp_path / "x.jsonl", "--tokenizer", "bytes", "--output", folder / "x")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith(f"error: {folder / 'x'}: cannot write: No space left on device")
    assert not processes_with(str(folder)) and not list(folder.iterdir())


def test_a_full_disk_while_merging(small_disk, tmp_path):
    for i in range(2):
        with dataset_writer.IndexedDatasetWriter(tmp_path / f"{i}", "uint16") as writer:
            writer.add_document(range(60_000))
    folder = small_disk(150_000)
    with pytest.raises(RunFailure, match="No space left on device"):
        merge([tmp_path / "0", tmp_path / "1"], folder / "x", remove=True)
    assert not list(folder.iterdir()) and IndexedDataset(tmp_path / "1").n_tokens == 60_000


def test_an_older_data_set_stays_until_the_new_one_is_whole(job, small_disk, tmp_path):
    """A full disk takes nothing away."""
    (tmp_path / "old.jsonl").write_bytes(jsonl(["old"]))
    folder = small_disk(1 << 20)
    preprocess([tmp_path / "old.jsonl"], "bytes", folder / "x")
    before = contents(folder / "x")
    with pytest.raises(RunFailure):
        preprocess([job.corpus], "bytes", folder / "x")
    assert contents(folder / "x") == before and len(list(folder.iterdir())) == 3


@pytest.mark.parametrize("function, left", [("sync", [".bin", ".idx", ".json"]), ("publish", [".bin"])])
def test_replacing_fails(function, left, job, tmp_path, monkeypatch):
    """Before the older data set goes: all of it stays. After: nothing looks whole."""
    (tmp_path / "old.jsonl").write_bytes(jsonl(["old"]))
    preprocess([tmp_path / "old.jsonl"], "bytes", tmp_path / "out" / "x")

    def failing(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(dataset_writer, function, failing)
        with pytest.raises(RunFailure, match="x: cannot write: Input/output error; mend that and run it again"):
            preprocess([job.corpus], job.tokenizer, tmp_path / "out" / "x")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [f"x{suffix}" for suffix in left]
    if len(left) == 3:
        check_whole(tmp_path / "out" / "x")
        assert IndexedDataset(tmp_path / "out" / "x")[0].tolist() == [*b"old", 256]


# --- bad input: exit code 2, one line, nothing left


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.parquet"])
def test_damaged_input_ends_the_command(name, tmp_path):
    rng = random.Random(0)
    path = write(tmp_path / name, ["".join(rng.choices("abcdefgh ", k=2000)) for _ in range(300)])
    data = path.read_bytes()
    path.write_bytes(
        data[:-30] if name == "x.jsonl" else data[: len(data) // 2] + b"\0" * 500 + data[len(data) // 2 + 500 :]
    )
    (tmp_path / "out").mkdir()
    result = run_command("--input", path, "--tokenizer", "bytes", "--output", tmp_path / "out" / "x")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"error: {path}" in result.stderr.splitlines()[-1]
    assert not list((tmp_path / "out").iterdir()) and not processes_with(str(tmp_path))


@pytest.mark.parametrize("on_error", ["fail", "skip"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.parquet"])
def test_a_file_that_vanishes(name, on_error, job, tmp_path, monkeypatch):
    """It is no malformed document: what is missing is never skipped."""
    path = write(tmp_path / name, TEXTS)
    choose = encode.fast_encoder

    def choose_and_remove(*arguments):
        path.unlink()
        return choose(*arguments)

    monkeypatch.setattr(encode, "fast_encoder", choose_and_remove)
    with pytest.raises(UserError, match=f"{name}: cannot read: .*No such file"):
        preprocess([job.corpus, path], job.tokenizer, tmp_path / "out" / "x", on_error=on_error)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_output_where_nothing_can_be_written(job, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/x.bin: cannot write here: .*; choose another output"):
        preprocess([job.corpus], job.tokenizer, tmp_path / "file" / "x")


@pytest.mark.parametrize("name", ["corpus.jsonl", "tokenizer.json"])
def test_the_output_never_replaces_what_it_is_made_from(name, job, tmp_path):
    for path in (job.corpus, job.tokenizer):
        shutil.copy(path, tmp_path / path.name)
    (tmp_path / "corpus.jsonl").rename(tmp_path / "corpus.json")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="is in the way, it is no data set's manifest"):
        preprocess([tmp_path / "corpus.json"], tmp_path / "tokenizer.json", tmp_path / Path(name).stem)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_trial_is_killed(job, tmp_path, monkeypatch):
    """The process that loads the reference, while the others work: the message does not hold the texts."""
    pytest.importorskip("gigatoken")
    parent = os.getpid()

    def die(self, text):
        assert os.getpid() != parent
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(HuggingFaceTokenizer, "encode", die)
    with pytest.raises(RunFailure, match="was killed by SIGKILL at the trial of the encoder; ") as error:
        preprocess([job.corpus], job.tokenizer, tmp_path / "out" / "x")
    assert len(str(error.value)) < 200 and not list((tmp_path / "out").iterdir())
