"""How long a save keeps training waiting, and how fast checkpoints are written and read, against the disk itself.

    python benchmarks/checkpoint.py            # a model of 300M parameters, about 3 minutes and 8 GiB of memory

One process, fp32, ZeRO-1. In turn: a save in the foreground, one in the background, the same number of bytes written
and synced plainly; then a verified load against a plain read of the same files, both from the page cache.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

from megamtp.engine.build import build_engine
from megamtp.engine.launch import start_processes
from megamtp.engine.optimizer import OptimizerConfig
from megamtp.host_memory import keep_freed_memory
from megamtp.model.cost import parameters
from megamtp.model.heads import HeadsConfig
from megamtp.model.transformer import ModelConfig
from megamtp.ops.choice import OpsConfig
from megamtp.parallel.groups import ParallelConfig
from megamtp.training.checkpoint import Checkpoint
from megamtp.training.saver import Saver

BLOCK = 1 << 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dim", type=int, default=1024, help="1024: 300M parameters")
    parser.add_argument("--folder", help="on the disk to measure (default: the system's temporary folder)")
    options = parser.parse_args()
    keep_freed_memory()
    config = ModelConfig(vocab_size=32_000, dim=options.dim, n_layers=19, n_heads=16, n_future_tokens=4)
    engine = build_engine(
        config,
        HeadsConfig(),
        OpsConfig(),
        grid=start_processes(),
        parallel=ParallelConfig(zero_stage=1),
        optimizer=OptimizerConfig(),
        precision="fp32",
        micro_batch_size=1,
        micro_batches=1,
        seq_len=128,
        seed=0,
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = {"parameters": parameters(config).total} | measure(engine, Path(folder), options.rounds)
    for key, value in result.items():
        print(f"{key:<24} {value}")
    print(json.dumps(result))


def measure(engine, folder: Path, rounds: int) -> dict[str, float]:
    savers = {
        mode: Saver(folder / mode, engine, keep=1, background=mode == "background")
        for mode in ("foreground", "background")
    }
    save(savers["background"], 0)  # its copies are allocated at the first save
    stalls, totals, plain = {mode: [] for mode in savers}, {mode: [] for mode in savers}, []
    for step in range(1, rounds + 1):
        for mode, saver in savers.items():
            saved = save(saver, step)
            stalls[mode].append(saved.stall_seconds)
            totals[mode].append(saved.seconds)
        plain.append(seconds_of(partial(write_plainly, folder / "plain", saved.bytes)))
    path = saved.path
    loads, reads = [], []
    for _ in range(rounds):
        loads.append(seconds_of(lambda: Checkpoint.open(path).load_into(engine)))
        reads.append(seconds_of(lambda: read_plainly(path)))
    stall = {mode: statistics.median(seconds) for mode, seconds in stalls.items()}
    written = {mode: saved.bytes / statistics.median(seconds) / 1e9 for mode, seconds in totals.items()}
    return {
        "gb": saved.bytes / 1e9,
        "stall_foreground_s": stall["foreground"],
        "stall_background_s": stall["background"],
        "stall_ratio": stall["background"] / stall["foreground"],
        "save_foreground_gb_per_s": written["foreground"],
        "save_background_gb_per_s": written["background"],
        "disk_write_gb_per_s": saved.bytes / statistics.median(plain) / 1e9,
        "save_vs_disk": statistics.median(plain) / statistics.median(totals["foreground"]),
        "load_gb_per_s": saved.bytes / statistics.median(loads) / 1e9,
        "disk_read_gb_per_s": saved.bytes / statistics.median(reads) / 1e9,
        "load_vs_disk": statistics.median(reads) / statistics.median(loads),
    }


def save(saver: Saver, step: int):
    saver.save(step=step, model_config={}, state={})
    return saver.wait()


def seconds_of(action) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def write_plainly(path: Path, size: int) -> None:
    block = os.urandom(BLOCK)
    with open(path, "wb", buffering=0) as file:
        for _ in range(size // BLOCK):
            file.write(block)
        os.fsync(file.fileno())


def read_plainly(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        with open(path, "rb", buffering=0) as file:
            buffer = bytearray(BLOCK)
            while file.readinto(buffer):
                pass


if __name__ == "__main__":
    main()
