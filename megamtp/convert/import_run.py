"""In: any source becomes a run folder at step 0, from which ``pretrain.py`` trains on.

OUTPUT/checkpoints/step-00000000/   the weights alone, in fp32: moments begin at zero
OUTPUT/model.yaml                   the ``model:`` section for the config of the training
OUTPUT/tokenizer/                   the tokenizer's files
OUTPUT/imported.json                what an export needs to give the source back
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from megamtp.config import from_dict
from megamtp.convert.base import Check, Source
from megamtp.convert.formats import logical_names, padded_shape
from megamtp.convert.imported import NAME as IMPORTED
from megamtp.convert.imported import TOKENIZER, Imported
from megamtp.convert.output import new_folder
from megamtp.convert.safetensors_file import Spec
from megamtp.convert.source import open_source
from megamtp.convert.stream import Item, Progress, shards, write_items
from megamtp.convert.tokenizer_files import write_tokenizer
from megamtp.convert.verification import verifying
from megamtp.files import write_atomic
from megamtp.model.initialize import initialize_
from megamtp.model.transformer import ModelConfig
from megamtp.parallel.tensor import Shard
from megamtp.training.checkpoint import make_manifest, write_manifest
from megamtp.training.pieces import Run, piece_key

STEP = "step-00000000"
FILE_BYTES = 4 * 10**9  # ranks that load share the verification of files out


def import_run(
    source_path: Path | str,
    output: Path | str,
    *,
    n_future_tokens: int | None = None,
    new_heads: Literal["copy", "random"] = "copy",
    seed: int = 0,
    force: bool = False,
) -> None:
    """Write the run folder ``output``; ``n_future_tokens`` None keeps the source's heads.

    Heads that the source lacks are copies of its head 1 or drawn from ``seed``; heads beyond ``n_future_tokens`` stay
    behind. Raises as ``export`` does.
    """
    original = open_source(source_path)
    source = original
    if n_future_tokens not in (None, original.config.n_future_tokens):
        source = WithHeads(original, n_future_tokens, new_heads, seed)
    config = source.config
    items = []
    for name in source.names():
        shape = padded_shape(name, config)
        size = torch.Size(shape).numel()
        key = piece_key("weight", name, Run(0, shape[-1], 0, size))
        items.append(Item(Spec(key, torch.float32, (size,)), name))
    files = shards(items, FILE_BYTES)
    n_bytes = sum(item.spec.n_bytes for item in items)
    n_check = sum(check.n_bytes for check in source.checks())
    with new_folder(Path(output), force, is_untrained_import, source.path, n_bytes) as folder:
        checkpoint = folder / "checkpoints" / STEP
        checkpoint.mkdir(parents=True)
        (folder / TOKENIZER).mkdir()
        if not write_tokenizer(
            source.tokenizer,
            folder / TOKENIZER,
            vocab_size=config.vocab_size,
            eos_id=source.eos_id,
            context=source.context,
        ):
            (folder / TOKENIZER).rmdir()
        (folder / "model.yaml").write_text(yaml.safe_dump({"model": dataclasses.asdict(config)}, sort_keys=False))
        origin = Path(source_path).resolve().name
        Imported(origin, original.dtype, source.context, source.eos_id, source.facts).write(folder)
        progress = Progress(n_bytes + n_check, "writing and verifying" if n_check else "writing")
        try:
            with verifying(source, progress.add) as verification:
                entries = []
                for i, part in enumerate(files):
                    path = checkpoint / f"weights-{i:05d}.safetensors"
                    writer = write_items(path, part, source, progress, verification, hashed=True)
                    pieces = [_piece(path.name, item, config) for item in part]
                    entries.append(
                        {"file": path.name, "bytes": writer.bytes, "sha256": writer.sha256, "pieces": pieces}
                    )
                verification.wait()
        finally:
            progress.close()
        write_manifest(
            checkpoint,
            make_manifest(
                entries,
                step=0,
                optimizer_steps=0,
                model=dataclasses.asdict(config),
                state={"loader": None, "counters": {"tokens": 0, "skipped_steps": 0}},
                moments=False,
            ),
        )
        write_atomic(checkpoint.parent / "latest", STEP.encode())


def _piece(file: str, item: Item, config: ModelConfig) -> tuple[str, list[int], dict[str, Any]]:
    shape = padded_shape(item.name, config)
    piece = {"file": file, "columns": [0, shape[-1]], "start": 0, "stop": torch.Size(shape).numel()}
    return item.name, list(shape), piece


class WithHeads(Source):
    """A source with another number of heads."""

    def __init__(self, source: Source, n: int, new_heads: Literal["copy", "random"], seed: int):
        self.source, self.new_heads, self.seed = source, new_heads, seed
        self.path, self.dtype, self.context = source.path, source.dtype, source.context
        self.eos_id, self.tokenizer = source.eos_id, source.tokenizer
        values = dataclasses.asdict(source.config)
        values["n_layers"] += n - values["n_future_tokens"]
        self.config = from_dict(ModelConfig, values | {"n_future_tokens": n}, "--n-future-tokens")
        self.facts = {**source.facts, "heads_changed": f"{source.config.n_future_tokens} -> {n}"}
        self._held = set(logical_names(source.config))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if name in self._held:
            return self.source.rows(name, start, stop)
        if self.new_heads == "copy":
            kind, _, rest = name.split(".", 2)  # of heads.{k}.*, or output.{k}.weight
            return self.source.rows(f"{kind}.0.{rest}", start, stop)
        shape = self.shape(name)
        out = torch.empty((stop - start, *shape[1:]))
        initialize_(out, name, self.config, self.seed, Shard(shape, start=start, length=stop - start))
        return out

    def checksums(self) -> dict[Path, str]:
        return self.source.checksums()

    def checks(self) -> list[Check]:
        return self.source.checks()


def is_untrained_import(folder: Path) -> bool:
    """Whether ``folder`` is the output of an import from which no training has begun: another may replace it."""
    return (folder / IMPORTED).is_file() and not (folder / "config.yaml").exists()
