"""What a run's files tell of a training: what a model card says."""

import json
from pathlib import Path
from typing import Any

from megamtp import __version__
from megamtp.convert.imported import Imported
from megamtp.data.datasets import DataConfig
from megamtp.data.manifest import Manifest
from megamtp.data.tokenizer import BYTES, load_tokenizer
from megamtp.errors import UserError
from megamtp.training.run_config import RunConfig


def end_of_document(data: DataConfig) -> int | None:
    """The token that ended the documents of the training: by the data's manifest, else the tokenizer's own, if any."""
    for source in data.sources:
        manifest = Manifest.read(source.path)
        if manifest and manifest.eod_id is not None:
            return manifest.eod_id
    if data.tokenizer is None or data.tokenizer != BYTES and not Path(data.tokenizer).exists():
        return None  # who needs the tokenizer itself will be told
    try:
        return load_tokenizer(data.tokenizer).eod()[1]
    except UserError:
        return None  # it has no such token: the documents were ended by one that --eod named, or by none


def training_facts(
    run_dir: Path | None, config: RunConfig | None, manifest: dict[str, Any], imported: Imported | None
) -> dict[str, Any]:
    """Plain JSON values: of the checkpoint, and of the run where its files are there."""
    facts: dict[str, Any] = {
        "program": f"megamtp {__version__}",
        "step": manifest["step"],
        "tokens": manifest["state"]["counters"]["tokens"],
    }
    if imported:
        facts["started_from"] = imported.origin
    if config is None or run_dir is None:
        return facts
    training, optimizer, data, layout = config.training, config.optimizer, config.data, config.parallel
    facts |= {
        "run": run_dir.resolve().name,
        "steps_planned": training.steps,
        "sequence_length": data.seq_len,
        "batch_sequences": training.global_batch_size,
        "batch_tokens": training.global_batch_size * data.seq_len,
        "learning_rate": optimizer.lr,
        "warmup_steps": config.schedule.warmup_steps,
        "final_learning_rate": optimizer.lr * config.schedule.final_ratio,
        "optimizer": f"AdamW, betas {optimizer.beta1} and {optimizer.beta2}, weight decay {optimizer.weight_decay}, "
        f"gradient norm clipped to {optimizer.clip}",
        "loss_weights": config.heads.loss_weights or [1.0] * config.model.n_future_tokens,
        "precision": training.precision,
        "seed": training.seed,
        "layout": f"TP {layout.tensor} x PP {layout.pipeline}, ZeRO-{layout.zero_stage}",
        "data": [{"name": Path(source.path).name, "weight": source.weight} for source in data.sources],
    }
    if line := last_validation(run_dir / "metrics.jsonl", manifest["step"]):
        facts["validation_step"] = line["step"]
        facts["validation_loss_per_head"] = line["validation_loss_per_head"]
        facts["validation_accuracy_per_head"] = line.get("validation_accuracy_per_head")
    return facts


def last_validation(path: Path, step: int) -> dict[str, Any] | None:
    """The last evaluation up to ``step``. ``UserError`` for what is not JSON; a torn last line is left out."""
    if not path.is_file():
        return None
    found = None
    with open(path, encoding="utf-8") as file:
        for number, text in enumerate(file, start=1):
            if '"validation_loss_per_head"' not in text or not text.endswith("\n"):
                continue
            try:
                line = json.loads(text)
            except ValueError:
                raise UserError(f"{path}: line {number} is not JSON; remove it") from None
            if line["step"] <= step:
                found = line
    return found
