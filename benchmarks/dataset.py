"""Drawing training samples here against NVIDIA's ``GPTDataset`` (megatron-core 0.16.1), on the same files.

    pip install --no-deps megatron-core==0.16.1
    python benchmarks/dataset.py            # some 4 minutes, 1 GB of disk; --quick for a look

Three comparisons, both sides in turn, each time in a fresh process:

index    everything that must exist before a sample can be drawn, for 20 million documents of 10 billion tokens (a real
         .idx, its .bin one hole). Ours opens and checks the pair; theirs builds three index arrays and writes them.
samples  random samples of 2,048 positions per second, from data in the page cache: ours tokens (2,048 + 4) and document
         ids by ``batch`` of 32, theirs tokens and labels by ``dataset[i]`` without masks, at the same random indices.
         On about 50 million real tokens (or ``--data``), and on the large pair.
memory   private memory that opening the large pair and drawing from it adds to the process (Private_Dirty).
"""

import argparse
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from megamtp.data.dataset_writer import IndexedDatasetWriter
from megamtp.data.indexed_dataset import HEADER, MAGIC, VERSION, IndexedDataset, bin_path, idx_path
from megamtp.data.samples import Samples
from megamtp.data.stream import Stream
from megamtp.errors import UserError, exits_cleanly

SEQ_LEN, FUTURE, BATCH, SEED = 2048, 4, 32, 1
MEAN_LENGTH, SIGMA = 500, 1.0  # of the documents, lognormal
UINT16 = 8  # its code in the .idx
PASSES = 3  # over the same indices, in each process
SIDES = ("ours", "theirs")


class Ours:
    def __init__(self, prefix: Path, cache: Path):
        self.samples = Samples(Stream(IndexedDataset(prefix)), SEQ_LEN, FUTURE, SEED)
        self.count = self.samples.samples_per_epoch

    def draw(self, indices: np.ndarray) -> None:
        for first in range(0, len(indices), BATCH):
            for array in self.samples.batch(indices[first : first + BATCH]):
                torch.from_numpy(array)


class Theirs:
    def __init__(self, prefix: Path, cache: Path):
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
        from megatron.core.datasets.utils import Split

        config = GPTDatasetConfig(
            random_seed=SEED,
            sequence_length=SEQ_LEN,
            split="1,0,0",
            blend=([str(prefix)], None),
            path_to_cache=str(cache),
            tokenizer=NoTokenizer(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        data = GPTDataset.build_low_level_dataset(str(prefix), config)
        documents = np.arange(GPTDataset.numel_low_level_dataset(data), dtype=np.int32)
        self.dataset = GPTDataset(data, str(prefix), documents, None, Split.train, config)
        self.count = len(self.dataset)

    def draw(self, indices: np.ndarray) -> None:
        for index in indices.tolist():
            self.dataset[index]


class NoTokenizer:
    """What ``GPTDataset`` asks of a tokenizer."""

    vocab_size, eod, eos, pad = 50_000, 0, 0, -1
    unique_identifiers = {"class": "NoTokenizer"}


def private_bytes() -> int:
    os.sync()  # mapped pages of a file that was just written count as private and dirty until they are on disk
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return 1024 * int(line.split()[1])
    raise UserError("/proc/self/smaps_rollup: no Private_Dirty; run this on Linux")


def measure(side: str, large: Path, data: Path, counts: tuple[int, int], cache: Path) -> dict[str, float]:
    """One side's figures, in this process: seconds, samples per second, bytes."""
    kind = {"ours": Ours, "theirs": Theirs}[side]
    random = np.random.default_rng(SEED)
    small = kind(data, cache)  # first, so that imports and the like count nowhere
    small.draw(np.arange(64))
    before = private_bytes()
    started = time.perf_counter()
    big = kind(large, cache)
    seconds = time.perf_counter() - started
    rates = []
    for dataset, count in ((big, counts[1]), (small, counts[0])):
        indices = random.integers(0, dataset.count - 2, count)  # the two sides differ by one sample at most
        dataset.draw(indices)  # into the page cache
        passes = []
        for _ in range(PASSES):
            begun = time.perf_counter()
            dataset.draw(indices)
            passes.append(time.perf_counter() - begun)
        rates.append(count / statistics.median(passes))
        if dataset is big:
            memory = private_bytes() - before
    return {"index_seconds": seconds, "samples_per_s_large": rates[0], "samples_per_s": rates[1], "memory": memory}


def random_lengths(count: int, random: np.random.Generator) -> np.ndarray:
    mean_of_log = np.log(MEAN_LENGTH) - SIGMA**2 / 2
    return np.maximum(1, random.lognormal(mean_of_log, SIGMA, count)).astype(np.int32)


def write_large(prefix: Path, n_documents: int) -> int:
    """An .idx with random lengths beside a .bin that is one hole. Returns the tokens."""
    lengths = random_lengths(n_documents, np.random.default_rng(SEED))
    ends = np.cumsum(lengths, dtype=np.int64)
    with open(idx_path(prefix), "wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, UINT16, n_documents, n_documents + 1))
        for field in (lengths, (ends - lengths) * 2, np.arange(n_documents + 1)):
            file.write(field.data)
    with open(bin_path(prefix), "wb") as file:
        file.truncate(int(ends[-1]) * 2)
    if os.stat(bin_path(prefix)).st_blocks * 512 > 1 << 20:
        raise UserError(f"{prefix.parent}: this file system does not store holes; choose another --folder")
    return int(ends[-1])


def write_real(prefix: Path, n_tokens: int) -> None:
    random = np.random.default_rng(SEED)
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for length in random_lengths(n_tokens // MEAN_LENGTH, random).tolist():
            writer.add_document(random.integers(1, 50_000, length, dtype=np.uint16))


def run(arguments: argparse.Namespace, folder: Path) -> None:
    try:
        with warnings.catch_warnings(action="ignore"):  # it misses Apex, which is not needed here
            import megatron.core.datasets.helpers_cpp  # noqa: F401
    except ImportError:
        raise UserError(
            "megatron-core is not installed, or not as a wheel; pip install --no-deps megatron-core==0.16.1"
        ) from None
    large, data = folder / "large", arguments.data or folder / "real"
    n_documents = 1_000_000 if arguments.quick else arguments.documents
    n_tokens = write_large(large, n_documents)
    if arguments.data is None:
        write_real(data, 5_000_000 if arguments.quick else 50_000_000)
    print(f"{n_documents:,} documents, {n_tokens:,} tokens; {arguments.repeats} processes of each side, in turn")
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for repeat in range(arguments.repeats):
        for side in SIDES if repeat % 2 == 0 else SIDES[::-1]:
            cache = folder / f"cache-{side}-{repeat}"
            command = [
                sys.executable,
                "-W",
                "ignore",
                __file__,
                "--side",
                side,
                "--large",
                large,
                "--data",
                data,
                "--cache",
                cache,
            ]
            command += ["--samples", str(arguments.samples), "--samples-large", str(arguments.samples_large)]
            output = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True).stdout
            found[side].append(json.loads(output.splitlines()[-1]))
            shutil.rmtree(cache, ignore_errors=True)
    report(found)


def report(found: dict[str, list[dict[str, float]]]) -> None:
    rows = {
        "index_seconds": ("index, s", 1, "index_ratio", False),
        "samples_per_s": ("samples/s", 1, "samples_ratio", True),
        "samples_per_s_large": ("samples/s, large", 1, "samples_ratio_large", True),
        "memory": ("memory, MB", 1e6, "memory_ratio", True),
    }
    summary: dict[str, float] = {}
    print(f"{'median (min - max)':20}{'ours':>30}{'theirs':>30}{'ratio':>9}")
    for key, (name, unit, ratio, ours_first) in rows.items():
        medians, cells = [], []
        for side in SIDES:
            values = sorted(one[key] / unit for one in found[side])
            medians.append(statistics.median(values))
            digits = 2 if values[-1] < 100 else 0
            cells.append(f"{medians[-1]:,.{digits}f} ({values[0]:,.{digits}f} - {values[-1]:,.{digits}f})")
            summary |= {f"{key}_{side}": medians[-1], f"{key}_{side}_min": values[0], f"{key}_{side}_max": values[-1]}
        # Times: theirs over ours, the larger the better for us. Rates and memory: ours over theirs.
        summary[ratio] = medians[0] / medians[1] if ours_first else medians[1] / medians[0]
        print(f"{name:20}{cells[0]:>30}{cells[1]:>30}{summary[ratio]:9.2f}")
    print(json.dumps({key: round(value, 3) for key, value in summary.items()}))


@exits_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="prefix of a .bin/.idx pair (default: writes 50 million tokens)")
    parser.add_argument("--documents", type=int, default=20_000_000, help="of the large pair")
    parser.add_argument("--samples", type=int, default=20_000, help="drawn from the data")
    parser.add_argument("--samples-large", type=int, default=4_000, help="drawn from the large pair")
    parser.add_argument("--repeats", type=int, default=5, help="processes of each side")
    parser.add_argument("--folder", type=Path, help="where temporary files go")
    parser.add_argument("--quick", action="store_true", help="a million documents, 5 million tokens")
    for hidden in ("--side", "--large", "--cache"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        torch.set_num_threads(1)
        logging.disable(logging.WARNING)
        counts = (arguments.samples, arguments.samples_large)
        print(json.dumps(measure(arguments.side, Path(arguments.large), arguments.data, counts, Path(arguments.cache))))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        run(arguments, Path(folder))


if __name__ == "__main__":
    main()
