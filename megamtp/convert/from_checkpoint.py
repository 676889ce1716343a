"""Weights from our own checkpoints: of a run, finished or not, or imported from elsewhere."""

import functools
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from megamtp.config import from_dict
from megamtp.convert.base import Check, Source
from megamtp.convert.facts import end_of_document, training_facts
from megamtp.convert.formats import padded_shape
from megamtp.convert.imported import Imported
from megamtp.convert.safetensors_file import map_tensors
from megamtp.errors import UserError
from megamtp.model.transformer import ModelConfig
from megamtp.training.checkpoint import Checkpoint, latest_checkpoint
from megamtp.training.pieces import Run, piece_key
from megamtp.training.run_config import RunConfig


class CheckpointSource(Source):
    """The fp32 master weights of a checkpoint, written by any layout."""

    dtype = torch.bfloat16

    def __init__(self, checkpoint: Checkpoint, run: "RunFolder"):
        self.path, self.checkpoint = checkpoint.path, checkpoint
        manifest = checkpoint.manifest
        self.config = from_dict(ModelConfig, manifest["model"], f"{checkpoint.path}/manifest.json: model")
        self._tensors: dict[str, Any] = manifest["tensors"]
        self._check()
        # A process may not hold the files of thousands of ranks open.
        self._map = functools.lru_cache(64)(lambda file: map_tensors(checkpoint.path / file))
        self.context, self.eos_id, self.tokenizer = run.context, run.eos_id, run.tokenizer
        if run.imported and not checkpoint.has_moments:  # not trained on yet
            self.facts, self.dtype = run.imported.facts, run.imported.dtype
        else:
            self.facts = training_facts(run.path, run.config, manifest, run.imported)

    def _check(self) -> None:
        for name in self.names():
            shape, saved = list(padded_shape(name, self.config)), self._tensors.get(name, {}).get("shape")
            if saved != shape:
                found = "is missing" if saved is None else f"has shape {saved}"
                raise UserError(f"{self.path}: {name} {found}, {shape} expected; use another checkpoint")
        if more := set(self._tensors) - set(self.names()):
            raise UserError(f"{self.path}: has the unknown tensor {min(more)}; read it with the program that wrote it")

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        entry = self._tensors[name]
        columns = entry["shape"][-1]
        row_size = columns if len(entry["shape"]) == 2 else 1
        if not 0 <= start <= stop <= self.shape(name)[0]:
            raise IndexError(f"{name} has {self.shape(name)[0]} rows; [{start}, {stop}) wanted")
        if start == stop:
            return torch.empty((0, *entry["shape"][1:]))
        wanted = Run(0, columns, start * row_size, stop * row_size)
        out, found = None, []
        for piece in entry["pieces"]:
            stored = Run.of_piece(piece)
            pairs = wanted.shared(stored)
            if not pairs:
                continue
            flat = self._stored(piece["file"], name, stored)
            whole_rows = (stored.left, stored.right) == (0, columns)
            if whole_rows and stored.start <= wanted.start and wanted.stop <= stored.stop:
                out = flat[wanted.start - stored.start : wanted.stop - stored.start]  # no copy
            else:
                out = torch.empty(wanted.size) if out is None else out
                for ours, theirs in pairs:
                    ours.view(out).copy_(theirs.view(flat))
            found += [ours for ours, _ in pairs]
        if flaw := wanted.flaw(found):
            raise UserError(f"{self.path}: {name}, rows {start} to {stop}: {flaw}; use an earlier checkpoint")
        return out.view(-1, row_size) if len(entry["shape"]) == 2 else out

    def _stored(self, file: str, name: str, run: Run) -> Tensor:
        flat = self._map(file).get(piece_key("weight", name, run))
        if flat is None or flat.dtype != torch.float32 or flat.numel() != run.size:
            raise UserError(f"{self.path / file}: {name} is not as the manifest says; use an earlier checkpoint")
        return flat

    def checks(self) -> list[Check]:
        checks = []
        for name, entry in self.checkpoint.manifest["files"].items():
            # Files without moments have no sum of their weights, nor have those that earlier programs wrote.
            part = entry.get("weights", {"without": [0, 0], "sha256": entry["sha256"]})
            checks.append(Check(self.path / name, entry["bytes"], tuple(part["without"]), part["sha256"]))
        return checks

    def checksums(self) -> dict[Path, str]:
        return {self.path / name: entry["sha256"] for name, entry in self.checkpoint.manifest["files"].items()}


class RunFolder:
    """What a run's folder tells beside its checkpoints. ``UserError`` for a broken config."""

    def __init__(self, path: Path | None):
        self.path, self.config, self.imported = path, None, None
        self.context, self.eos_id, self.tokenizer = None, None, None
        if path is None:
            return
        self.imported = Imported.read(path)
        if self.imported:
            self.context, self.eos_id = self.imported.context, self.imported.eos_id
            self.tokenizer = self.imported.tokenizer(path)
        file = path / "config.yaml"
        if file.is_file():
            try:
                values = yaml.safe_load(file.read_text())
            except (OSError, ValueError, yaml.YAMLError) as error:
                raise UserError(f"{file}: cannot be read: {' '.join(str(error).split())}; copy it again") from None
            self.config = from_dict(RunConfig, values, str(file))
            data = self.config.data
            self.context, self.tokenizer = data.seq_len, data.tokenizer or self.tokenizer
            eos_id = end_of_document(data)
            self.eos_id = self.eos_id if eos_id is None else eos_id

    @property
    def is_run(self) -> bool:
        return bool(self.config or self.imported)


def open_run(path: Path) -> CheckpointSource:
    """The newest checkpoint of a run folder. ``UserError`` where there is none, or no config beside it."""
    latest = latest_checkpoint(path / "checkpoints")
    if latest is None:
        raise UserError(f"{path}: no checkpoint yet; train on, or lower training.checkpoint_every")
    run = RunFolder(path)
    if not run.is_run:
        raise UserError(f"{path}: no config.yaml beside checkpoints/; give the folder of a run, or of a checkpoint")
    return CheckpointSource(Checkpoint.open(latest), run)


def open_checkpoint(path: Path) -> CheckpointSource:
    """One checkpoint. Where it lies in its run's folder, that tells context, tokenizer and facts."""
    inside = path.resolve().parent
    run = RunFolder(inside.parent if inside.name == "checkpoints" else None)
    return CheckpointSource(Checkpoint.open(path), run)
