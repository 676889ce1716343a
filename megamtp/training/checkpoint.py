"""Checkpoints: logical tensors in fragments, readable by any layout (fp32 weights and both moments).

    checkpoints/step-00000100/rank-00000.safetensors   the fragments that a rank owns
    checkpoints/step-00000100/manifest.json            what is where, sizes, checksums, and the rest of the state
    checkpoints/latest                                 name of the newest complete checkpoint

A fragment ``weight/layers.0.attention.wo.weight/64-128/1024`` is a flat fp32 range of the columns 64 to 127 of the
logical tensor; it starts at element 1024 of that band (see ``pieces``). Files are written into a temporary folder,
which gets its name when all are synced: a checkpoint is complete or it is not there.
"""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megamtp.engine.engine import Engine
from megamtp.engine.fragments import MOMENTS, Fragment, fragments, fragments_changed, optimizer_steps
from megamtp.errors import UserError
from megamtp.files import sync_folder, write_atomic
from megamtp.training.faults import fail_together
from megamtp.training.pieces import find_pieces, merge_pieces, read_pieces, sha256, write_pieces

FORMAT = "megamtp-checkpoint"
VERSION = 2
MANIFEST_KEYS = {"step", "optimizer_steps", "model", "state", "files", "tensors"}


def save_checkpoint(
    folder: Path, engine: Engine, *, step: int, model_config: dict[str, Any], state: dict[str, Any], keep: int
) -> Path:
    """Write ``folder/step-<eight digits>`` from all ranks; every rank calls it. Returns the checkpoint's path.

    ``state`` is JSON: whatever the loop needs to go on. The newest ``keep`` checkpoints stay. Raises ``OSError``
    on every rank where one of them could not write; earlier checkpoints are left as they were.
    """
    grid = engine.grid
    final = folder / f"step-{step:08d}"
    temporary = folder / f"{final.name}.tmp"
    with fail_together(grid, OSError, UserError):
        if grid.is_main:
            shutil.rmtree(temporary, ignore_errors=True)  # left behind by a crash
            temporary.mkdir(parents=True)
    with fail_together(grid, OSError, UserError):
        entry = write_pieces(temporary / f"rank-{grid.rank:05d}.safetensors", fragments(engine))
    entries: list[Any] = [None] * grid.world_size
    dist.all_gather_object(entries, entry)
    with fail_together(grid, OSError, UserError):
        if grid.is_main:
            manifest = make_manifest(
                entries, step=step, optimizer_steps=optimizer_steps(engine), model=model_config, state=state
            )
            _publish(folder, temporary, final, manifest)
            _remove_old(folder, keep)
    return final


def make_manifest(entries: list[dict[str, Any]], **rest: Any) -> dict[str, Any]:
    """The manifest of the files whose ``entries`` ``write_pieces`` has returned; ``rest`` goes in as it is."""
    keys = ("bytes", "sha256", "weights")
    files = {entry["file"]: {key: entry[key] for key in keys if key in entry} for entry in entries}
    return {"format": FORMAT, "version": VERSION, **rest, "files": files, "tensors": merge_pieces(entries)}


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the last file of a checkpoint, durably."""
    write_atomic(folder / "manifest.json", json.dumps(manifest).encode())
    sync_folder(folder)


def _publish(folder: Path, temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Manifest, then the folder's name, then ``latest``: each only when what it speaks of is on disk."""
    write_manifest(temporary, manifest)
    if final.exists():  # the same step, saved again after a resume
        shutil.rmtree(final)
    temporary.rename(final)
    sync_folder(folder)
    write_atomic(folder / "latest", final.name.encode())


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, or none. ``UserError`` where ``latest`` names a missing one."""
    pointer = folder / "latest"
    if not pointer.exists():
        return None
    path = folder / pointer.read_text().strip()
    if not path.is_dir():
        raise UserError(f"{pointer}: names {path.name}, which is not there; write the name of an existing checkpoint")
    return path


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk; its manifest is read, its tensors are not."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Read the manifest and check the files' sizes. ``UserError`` for anything missing, cut or foreign."""
        file = path / "manifest.json"
        try:
            manifest = json.loads(file.read_text())
        except FileNotFoundError:
            raise UserError(f"{path}: no manifest.json; this is not a complete checkpoint") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: cannot be read: {error}; use an earlier checkpoint") from None
        if not isinstance(manifest, dict):
            raise UserError(f"{file}: is no checkpoint's manifest; use an earlier checkpoint")
        if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
            raise UserError(
                f"{file}: format {manifest.get('format')!r} version {manifest.get('version')!r}; "
                f"this program reads {FORMAT!r} version {VERSION}; read it with the program that wrote it"
            )
        if not MANIFEST_KEYS <= manifest.keys():
            missing = ", ".join(sorted(MANIFEST_KEYS - manifest.keys()))
            raise UserError(f"{file}: is no checkpoint's manifest, it lacks {missing}; use an earlier checkpoint")
        for name, expected in manifest["files"].items():
            size = (path / name).stat().st_size if (path / name).exists() else None
            if size != expected["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise UserError(f"{path / name}: {found}, {expected['bytes']} expected; use an earlier checkpoint")
        return cls(path, manifest)

    def require_model(self, model_config: dict[str, Any]) -> None:
        """``UserError`` naming what differs where the checkpoint is of another model."""
        for key, ours in model_config.items():
            if self.manifest["model"].get(key) != ours:
                raise UserError(
                    f"{self.path}: is of another model: {key} is {self.manifest['model'].get(key)} there and {ours} "
                    "here; use that model's config or another run_dir"
                )

    @property
    def has_moments(self) -> bool:
        """Whether it holds the optimizer's state; weights that were imported have none."""
        return self.manifest.get("moments", True)

    def verify(self, names: list[str] | None = None) -> None:
        """Compare checksums of ``names`` (default: all files). ``UserError`` for a file that has changed."""
        for name in names if names is not None else self.manifest["files"]:
            if sha256(self.path / name) != self.manifest["files"][name]["sha256"]:
                raise UserError(f"{self.path / name}: damaged, its checksum is wrong; use an earlier checkpoint")

    def read(self, name: str, kind: str, start: int, stop: int, columns: tuple[int, int] | None = None) -> torch.Tensor:
        """Elements [start, stop) of ``columns`` (default: all) of the logical tensor ``name``: fp32 (stop - start,).

        ``kind`` is "weight", "exp_avg" or "exp_avg_sq"; the elements are counted row by row inside the band of
        columns. Raises ``UserError`` where the pieces do not hold each of them once.
        """
        out = torch.empty(stop - start)
        shape = tuple(self.manifest["tensors"][name]["shape"])
        self.read_into([Fragment(name, shape, start, {kind: out}, is_owner=False, columns=columns)])
        return out

    def read_into(self, wanted: Iterable[Fragment]) -> None:
        """Fill the fragments' tensors. ``UserError`` where the pieces do not hold each element once."""
        read_pieces(self.path, self.manifest["tensors"], wanted)

    def tensor(self, name: str, kind: str = "weight") -> torch.Tensor:
        """One whole logical tensor, fp32, in its shape."""
        shape = self.manifest["tensors"][name]["shape"]
        return self.read(name, kind, 0, torch.Size(shape).numel()).view(shape)

    def files_of(self, wanted: Iterable[Fragment]) -> list[str]:
        """The files that hold any part of ``wanted``. ``UserError`` where some part is in none, or in two."""
        return sorted(find_pieces(self.path, self.manifest["tensors"], wanted))

    def load_into(self, engine: Engine) -> None:
        """Give the engine the checkpoint's weights and optimizer states (zeros where it has no moments).

        Each rank reads its own part.

        Every rank calls it. Raises ``UserError`` on all of them where one finds its part damaged or of other shapes.
        """
        held = list(fragments(engine))
        with fail_together(engine.grid, UserError, OSError):
            for fragment in held:
                saved = self.manifest["tensors"].get(fragment.name, {}).get("shape")
                if saved != (shape := list(fragment.shape)):
                    raise UserError(f"{self.path}: {fragment.name} has shape {saved} there and {shape} in this model")
            # The ranks share the files out: each is read once for this, however many ranks need a part of it.
            self.verify(sorted(self.manifest["files"])[engine.grid.rank :: engine.grid.world_size])
            if self.has_moments:
                self.read_into(held)
            else:
                self.read_into(replace(fragment, tensors={"weight": fragment.tensors["weight"]}) for fragment in held)
                for fragment in held:
                    for moment in MOMENTS:
                        fragment.tensors[moment].zero_()
        fragments_changed(engine, self.manifest["optimizer_steps"])


def _remove_old(folder: Path, keep: int) -> None:
    # By age, not by step: who has gone back to an earlier step by hand has later steps lying there.
    complete = [path for path in folder.glob("step-*") if path.suffix != ".tmp"]
    for old in sorted(complete, key=lambda path: path.stat().st_mtime_ns)[:-keep]:
        shutil.rmtree(old)
