"""Models on disk for the conversion's tests: a run of ours cut into odd pieces, and Llamas of transformers."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from megamtp.config import dump
from megamtp.engine.fragments import Fragment
from megamtp.model.model import logical_parameters
from megamtp.model.transformer import ModelConfig
from megamtp.training.checkpoint import make_manifest, write_manifest
from megamtp.training.pieces import write_pieces
from tests.model.llama import random_model, small_config
from tests.training.tiny import run_config, write_corpus

KINDS = ("weight", "exp_avg", "exp_avg_sq")
FOUR_HEADS = {"n_layers": 6, "n_future_tokens": 4, "n_kv_heads": 2}


def parameters_of(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """fp32 values by logical name; the vocabulary tables with their padding rows."""
    return {name: p.detach() for name, p in logical_parameters(random_model(config, seed=seed))}


def write_run(run_dir: Path, config: ModelConfig, parameters: dict[str, Tensor], step: int = 2) -> Path:
    """A run folder as training leaves it, its checkpoint in two files: bands of columns, runs that end inside rows."""
    corpus = run_dir.parent / "corpus"
    if not corpus.exists():
        for seed, name in enumerate(("train", "validation")):
            write_corpus(corpus / name, 20, seed, config.vocab_size)
    changes = {f"model.{key}": value for key, value in vars(config).items()} | {"data.tokenizer": "bytes"}
    run = run_config(run_dir, corpus, changes)
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    held: list[list[Fragment]] = [[], []]
    for i, (name, value) in enumerate(parameters.items()):
        for j, (start, columns, piece) in enumerate(_cut(value, i % 4)):
            tensors = {kind: piece * factor for kind, factor in zip(KINDS, (1, 2, 3), strict=True)}
            held[(i + j) % 2].append(Fragment(name, tuple(value.shape), start, tensors, True, columns))
    entries = [write_pieces(folder / f"rank-{r:05d}.safetensors", fragments) for r, fragments in enumerate(held)]
    state = {"loader": None, "counters": {"tokens": 256, "skipped_steps": 0}}
    manifest = make_manifest(entries, step=step, optimizer_steps=step, model=vars(config), state=state)
    write_manifest(folder, manifest)
    (run_dir / "checkpoints" / "latest").write_text(folder.name)
    (run_dir / "config.yaml").write_text(dump(run))
    line = {"step": step, "validation_loss_per_head": [2.5] * config.n_future_tokens}
    line |= {"validation_accuracy_per_head": [0.25] * config.n_future_tokens, "validation_targets": 9}
    (run_dir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return run_dir


def _cut(value: Tensor, how: int) -> list[tuple[int, tuple[int, int] | None, Tensor]]:
    """(start, columns, flat piece) of each."""
    flat = value.reshape(-1)
    if how == 0:
        return [(0, None, flat)]
    if how == 1 or value.ndim == 1:
        middle = len(flat) // 2 + 3
        return [(0, None, flat[:middle]), (middle, None, flat[middle:])]
    middle = value.shape[1] // 2 - 1
    bands = [(0, middle), (middle, value.shape[1])]
    whole = [(columns, value[:, slice(*columns)].reshape(-1)) for columns in bands]
    if how == 2:
        return [(0, columns, band) for columns, band in whole]
    return [
        (start, columns, band[start:stop])
        for columns, band in whole
        for start, stop in ((0, 7), (7, len(band) - 5), (len(band) - 5, len(band)))
    ]


def stripped(name: str, value: Tensor, config: ModelConfig) -> Tensor:
    return value[: config.vocab_size] if name.startswith(("tok_embeddings.", "output.")) else value


def foreign_llama(folder: Path, dtype: torch.dtype = torch.float32, shard_size: str = "50GB", **changes: Any):
    """A Llama with random weights, saved by transformers itself; the model is returned."""
    values = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.25, "rope_theta": 5000.0}
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**values | changes)).to(dtype).eval()
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model


def config_of_run(**changes: Any) -> ModelConfig:
    return small_config(**FOUR_HEADS | changes)
