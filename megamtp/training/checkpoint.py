"""Checkpoints: logical tensors in fragments, readable by any layout (fp32 weights and both moments).

    checkpoints/step-00000100/rank-00000.safetensors   the fragments that a rank owns
    checkpoints/step-00000100/manifest.json            what is where, sizes, checksums, and the rest of the state
    checkpoints/latest                                 name of the newest complete checkpoint

A fragment ``weight/layers.0.attention.wo.weight/64-128/1024`` is a flat fp32 range of the columns 64 to 127 of the
logical tensor; it starts at element 1024 of that band (see ``pieces``). Files are written into a temporary folder,
which gets its name when all are synced: a checkpoint is complete or it is not there.
"""

import hashlib
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
from megamtp.parallel.groups import ProcessGrid
from megamtp.training.faults import fail_together
from megamtp.training.pieces import find_pieces, merge_pieces, read_pieces, sha256, write_pieces

FORMAT = "megamtp-checkpoint"
TEMPORARY, REPLACED = ".tmp", ".replaced"  # suffixes of folders: not complete; complete, and about to go
VERSION, READABLE = 3, (2, 3)
CHECKSUM = "sha256_of_the_above"
# Of the architecture: what manifests mean that were written before the model had the option.
BEFORE_OPTIONS = {"replicated_unembedding": False}
MANIFEST_KEYS = {"step", "optimizer_steps", "model", "state", "files", "tensors"}


class DamagedCheckpoint(UserError):
    """Something of a checkpoint is missing, cut or altered: an earlier one may be whole."""


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint will hold. Its fragments' memory must not change until it is written."""

    step: int
    optimizer_steps: int
    model_config: dict[str, Any]
    state: dict[str, Any]  # JSON: whatever the loop needs to go on
    fragments: list[Fragment]


def save_checkpoint(
    folder: Path, engine: Engine, *, step: int, model_config: dict[str, Any], state: dict[str, Any], keep: int
) -> Path:
    """``write_checkpoint`` of the engine as it is."""
    snapshot = Snapshot(step, optimizer_steps(engine), model_config, state, list(fragments(engine)))
    return write_checkpoint(folder, snapshot, engine.grid, keep=keep)


def write_checkpoint(
    folder: Path,
    snapshot: Snapshot,
    grid: ProcessGrid,
    *,
    keep: int,
    keep_every: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write ``folder/step-<eight digits>`` from all ranks; every rank calls it. Returns the checkpoint's path.

    The newest ``keep`` checkpoints stay, and those of every ``keep_every``-th step. The ranks meet in ``group``
    (default: that of all). Raises ``OSError`` on every rank where one of them could not write; earlier checkpoints
    are left as they were.
    """
    final = folder / f"step-{snapshot.step:08d}"
    temporary = folder / f"{final.name}{TEMPORARY}"
    try:
        with fail_together(grid, OSError, UserError, group=group):
            if grid.is_main:
                shutil.rmtree(temporary, ignore_errors=True)  # left behind by a crash
                temporary.mkdir(parents=True)
        with fail_together(grid, OSError, UserError, group=group):
            entry = write_pieces(temporary / f"rank-{grid.rank:05d}.safetensors", snapshot.fragments)
        entries: list[Any] = [None] * grid.world_size
        dist.all_gather_object(entries, entry, group=group)
        with fail_together(grid, OSError, UserError, group=group):
            if grid.is_main:
                manifest = make_manifest(
                    entries,
                    step=snapshot.step,
                    optimizer_steps=snapshot.optimizer_steps,
                    model=snapshot.model_config,
                    state=snapshot.state,
                )
                _publish(folder, temporary, final, manifest)
    except OSError:
        if grid.is_main:
            shutil.rmtree(temporary, ignore_errors=True)  # what a full disk has room for is better used otherwise
        raise
    if grid.is_main:
        _remove_old(folder, keep, keep_every)
    return final


def make_manifest(entries: list[dict[str, Any]], **rest: Any) -> dict[str, Any]:
    """The manifest of the files whose ``entries`` ``write_pieces`` has returned; ``rest`` goes in as it is."""
    keys = ("bytes", "sha256", "weights")
    files = {entry["file"]: {key: entry[key] for key in keys if key in entry} for entry in entries}
    return {"format": FORMAT, "version": VERSION, **rest, "files": files, "tensors": merge_pieces(entries)}


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the last file of a checkpoint, durably. Its last entry is the checksum of all before."""
    text = json.dumps(manifest)
    checksum = hashlib.sha256(text.encode()).hexdigest()
    write_atomic(folder / "manifest.json", f'{text[:-1]}, "{CHECKSUM}": "{checksum}"}}'.encode())
    sync_folder(folder)


def _read_manifest(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text()
        manifest = json.loads(text)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{file.parent}: no manifest.json; this is not a complete checkpoint") from None
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{file}: cannot be read: {error}; use an earlier checkpoint") from None
    if not isinstance(manifest, dict):
        raise DamagedCheckpoint(f"{file}: is no checkpoint's manifest; use an earlier checkpoint")
    before, found, _ = text.rpartition(f', "{CHECKSUM}": ')
    checksum = manifest.pop(CHECKSUM, None)
    # Earlier versions had none.
    is_whole = (
        checksum == hashlib.sha256(f"{before}}}".encode()).hexdigest() if found else manifest.get("version") != VERSION
    )
    if not is_whole:
        raise DamagedCheckpoint(f"{file}: damaged, its checksum is wrong; use an earlier checkpoint")
    if manifest.get("format") != FORMAT or manifest.get("version") not in READABLE:
        raise UserError(
            f"{file}: format {manifest.get('format')!r} version {manifest.get('version')!r}; this program reads "
            f"{FORMAT!r} version {' and '.join(map(str, READABLE))}; read it with the program that wrote it"
        )
    if not MANIFEST_KEYS <= manifest.keys():
        missing = ", ".join(sorted(MANIFEST_KEYS - manifest.keys()))
        raise DamagedCheckpoint(f"{file}: lacks {missing}; use an earlier checkpoint")
    return manifest


def _publish(folder: Path, temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Manifest, then the folder's name, then ``latest``: each only when what it speaks of is on disk."""
    write_manifest(temporary, manifest)
    replaced = folder / f"{final.name}{REPLACED}"
    if final.exists():  # the same step, saved again: until the new one has the name, the old one can still be found
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    temporary.rename(final)
    sync_folder(folder)
    write_atomic(folder / "latest", final.name.encode())
    shutil.rmtree(replaced, ignore_errors=True)


def checkpoints_by_age(folder: Path) -> list[Path]:
    """All that may be complete checkpoints, the best first: what ``latest`` names, then by step, the highest first."""
    pointer = folder / "latest"
    named = pointer.read_text().strip() if pointer.exists() else ""
    found = [path for path in folder.glob("step-*") if path.suffix != TEMPORARY]
    return sorted(found, key=lambda path: (path.name == named, path.name), reverse=True)


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
        manifest = _read_manifest(path / "manifest.json")
        for name, expected in manifest["files"].items():
            size = (path / name).stat().st_size if (path / name).exists() else None
            if size != expected["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise DamagedCheckpoint(
                    f"{path / name}: {found}, {expected['bytes']} expected; use an earlier checkpoint"
                )
        return cls(path, manifest)

    def require_model(self, model_config: dict[str, Any]) -> None:
        """``UserError`` naming what differs where the checkpoint is of another model."""
        saved = BEFORE_OPTIONS | self.manifest["model"]
        for key, ours in model_config.items():
            if saved.get(key) != ours:
                raise UserError(
                    f"{self.path}: is of another model: {key} is {saved.get(key)} there and {ours} here; use that "
                    "model's config or another run_dir"
                )

    @property
    def has_moments(self) -> bool:
        """Whether it holds the optimizer's state; weights that were imported have none."""
        return self.manifest.get("moments", True)

    def verify(self, names: list[str] | None = None) -> None:
        """Compare checksums of ``names`` (default: all files). ``UserError`` for a file that has changed."""
        for name in names if names is not None else self.manifest["files"]:
            if sha256(self.path / name) != self.manifest["files"][name]["sha256"]:
                raise DamagedCheckpoint(
                    f"{self.path / name}: damaged, its checksum is wrong; use an earlier checkpoint"
                )

    def verify_share(self, grid: ProcessGrid) -> None:
        """``verify`` of this rank's share of the files: each is read once, however many ranks need a part of it."""
        self.verify(sorted(self.manifest["files"])[grid.rank :: grid.world_size])

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

    def load_into(self, engine: Engine, *, verified: bool = False) -> None:
        """Give the engine the checkpoint's weights and optimizer states (zeros where it has no moments).

        Each rank reads its own part; every rank calls it. ``verified``: checksums have been compared already. Raises
        ``UserError`` on all ranks where one finds its part damaged or of other shapes.
        """
        held = list(fragments(engine))
        with fail_together(engine.grid, UserError, OSError):
            for fragment in held:
                saved = self.manifest["tensors"].get(fragment.name, {}).get("shape")
                if saved != (shape := list(fragment.shape)):
                    raise UserError(f"{self.path}: {fragment.name} has shape {saved} there and {shape} in this model")
            if not verified:
                self.verify_share(engine.grid)
            if self.has_moments:
                self.read_into(held)
            else:
                self.read_into(replace(fragment, tensors={"weight": fragment.tensors["weight"]}) for fragment in held)
                for fragment in held:
                    for moment in MOMENTS:
                        fragment.tensors[moment].zero_()
        fragments_changed(engine, self.manifest["optimizer_steps"])


def _remove_old(folder: Path, keep: int, keep_every: int | None) -> None:
    # By age, not by step: who has gone back to an earlier step by hand has later steps lying there.
    complete = [path for path in folder.glob("step-????????") if path.is_dir()]
    old = sorted(complete, key=lambda path: path.stat().st_mtime_ns)[:-keep]
    gone = [path for path in old if not keep_every or int(path.name.removeprefix("step-")) % keep_every]
    for path in [*gone, *folder.glob(f"step-*{TEMPORARY}"), *folder.glob(f"step-*{REPLACED}")]:
        shutil.rmtree(path, ignore_errors=True)  # what is left of it is taken for damaged, and tried again
