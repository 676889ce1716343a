"""A corpus of short documents, a config small enough for milliseconds a step, and what a run has written."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from megamtp.config import from_dict
from megamtp.data.dataset_writer import IndexedDatasetWriter
from megamtp.parallel.groups import ProcessGrid
from megamtp.training.checkpoint import Checkpoint, latest_checkpoint
from megamtp.training.run_config import RunConfig

VOCAB = 101  # no multiple of 128
SEQ_LEN = 16
GLOBAL_BATCH = 8


def write_corpus(prefix: Path, n_documents: int, seed: int, vocab: int = VOCAB) -> Path:
    """Documents of 2 to 30 tokens, so that most samples hold several; random walks, so that something can be learnt."""
    random = np.random.default_rng(seed)
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for length in random.integers(2, 31, n_documents):
            writer.add_document((random.integers(vocab) + np.cumsum(random.integers(1, 4, length))) % vocab)
    return prefix


def config_dict(run_dir: Path, corpus: Path, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Nested plain values of a config; ``corpus`` holds ``train`` and ``validation``; ``changes`` by dotted key."""
    values: dict[str, Any] = {
        "run_dir": str(run_dir),
        "model": {
            "vocab_size": VOCAB,
            "dim": 32,
            "n_layers": 6,
            "n_heads": 4,
            "n_kv_heads": 2,
            "n_future_tokens": 4,
            "ffn_dim": 64,
        },
        "data": {"train": str(corpus / "train"), "validation": str(corpus / "validation"), "seq_len": SEQ_LEN},
        "optimizer": {"lr": 3e-3, "clip": 0.5},
        "schedule": {"warmup_steps": 2},
        "parallel": {"zero_stage": 0},
        "training": {"steps": 20, "global_batch_size": GLOBAL_BATCH, "micro_batch_size": 2, "seed": 5},
    }
    for key, value in (changes or {}).items():
        *sections, last = key.split(".")
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return values


def run_config(run_dir: Path, corpus: Path, changes: dict[str, Any] | None = None) -> RunConfig:
    return from_dict(RunConfig, config_dict(run_dir, corpus, changes), "test")


def run_training(_: ProcessGrid, config: RunConfig) -> int:
    """For ``run_ranks``: the whole run on this rank, in the config's layout."""
    from megamtp.engine.launch import start_processes
    from megamtp.training.loop import train

    return train(config, start_processes(config.parallel, config.model.kv_heads))


def lines(run_dir: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def step_lines(run_dir: Path | str) -> list[dict[str, Any]]:
    return [line for line in lines(run_dir) if "loss" in line and "event" not in line]


def events(run_dir: Path | str, name: str) -> list[dict[str, Any]]:
    return [line for line in lines(run_dir) if line.get("event") == name]


def validation_lines(run_dir: Path | str) -> list[dict[str, Any]]:
    return [line for line in lines(run_dir) if "validation_loss_per_head" in line]


def exact(line: dict[str, Any]) -> dict[str, Any]:
    """What two runs of the same layout must share bit for bit."""
    keys = ("step", "tokens", "loss", "loss_per_head", "accuracy_per_head", "lr", "grad_norm", "skipped_steps", "epoch")
    return {key: line[key] for key in keys}


def newest(run_dir: Path | str) -> Checkpoint:
    return Checkpoint.open(latest_checkpoint(Path(run_dir) / "checkpoints"))


def tensors(checkpoint: Checkpoint, kind: str = "weight") -> dict[str, Any]:
    return {name: checkpoint.tensor(name, kind) for name in checkpoint.manifest["tensors"]}


def relative_error(a, b) -> float:
    """||a - b|| / ||b||."""
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()
