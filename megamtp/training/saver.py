"""Saving while training goes on: the state is copied to host memory, and a thread of each rank writes the copy.

The threads of all ranks meet in a process group of their own (gloo), so that their messages never mix with those of
training. That needs nothing but what the ranks have, and a rank that dies is noticed by the others at once; files as
the meeting point would depend on how soon a shared file system shows them. At most one save is under way; until its
last rename the checkpoint before it is the newest.
"""

import copy
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megamtp.engine.engine import Engine
from megamtp.engine.fragments import fragments, optimizer_steps
from megamtp.training.checkpoint import Snapshot, write_checkpoint

SAVER_THREAD = "saver"


class Saved(NamedTuple):
    """How a save has ended; ``error`` is what kept it from being written, on all ranks alike."""

    step: int
    path: Path | None
    error: OSError | None
    stall_seconds: float  # for which training stood still
    seconds: float  # until the checkpoint was complete
    bytes: int  # written by this rank


class Saver:
    """Writes an engine's checkpoints into ``folder``. Every rank makes one and calls the same methods."""

    def __init__(
        self, folder: Path, engine: Engine, *, keep: int, keep_every: int | None = None, background: bool = True
    ):
        self.folder, self.engine, self.background = folder, engine, background
        self._kept = {"keep": keep, "keep_every": keep_every}
        self._group = dist.new_group(backend="gloo") if background and engine.grid.world_size > 1 else None
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._thread: threading.Thread | None = None
        self._saved: Saved | None = None
        self._broken: BaseException | None = None

    def save(self, *, step: int, model_config: dict[str, Any], state: dict[str, Any]) -> Saved | None:
        """Begin to save; returns how the save before has ended, if nobody has asked for that.

        A save under way is waited for. In the foreground this one has ended on return: ask ``wait``.
        """
        started = time.perf_counter()
        before = self.wait()
        snapshot = Snapshot(step, optimizer_steps(self.engine), model_config, copy.deepcopy(state), self._copied())
        if not self.background:
            self._write(snapshot, started, None)
            return before
        stall = time.perf_counter() - started
        self._thread = threading.Thread(
            target=self._write, args=(snapshot, started, stall), daemon=True, name=SAVER_THREAD
        )
        self._thread.start()
        return before

    def finished(self) -> Saved | None:
        """How the save has ended, once; None while there is none, or it is under way. Not at one time on all ranks."""
        return None if self._thread is not None and self._thread.is_alive() else self.wait()

    def wait(self) -> Saved | None:
        """Wait for the save under way; how it, or one that has ended unasked, has ended."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._broken is not None:
            raise self._broken
        saved, self._saved = self._saved, None
        return saved

    def _copied(self) -> list:
        """The fragments that this rank saves; in the background, copies in memory that each save uses again."""
        held = [fragment for fragment in fragments(self.engine) if fragment.is_owner]
        if not self.background:
            return held
        copies = []
        for fragment in held:
            tensors = {}
            for kind, tensor in fragment.tensors.items():
                key = (f"{fragment.name}/{fragment.start}/{fragment.columns}", kind)
                buffer = self._buffers.get(key)
                if buffer is None:
                    buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                    self._buffers[key] = buffer
                tensors[kind] = buffer.copy_(tensor, non_blocking=True)
            copies.append(replace(fragment, tensors=tensors))
        if self.engine.grid.device.type == "cuda":
            torch.cuda.synchronize(self.engine.grid.device)
        return copies

    def _write(self, snapshot: Snapshot, started: float, stall: float | None) -> None:
        path, error, size = None, None, 0
        try:
            path = write_checkpoint(self.folder, snapshot, self.engine.grid, group=self._group, **self._kept)
            size = sum(tensor.nbytes for fragment in snapshot.fragments for tensor in fragment.tensors.values())
        except OSError as failure:
            error = failure
        except BaseException as failure:  # raised where training asks for the save
            self._broken = failure
            if stall is None:
                raise
            return
        seconds = time.perf_counter() - started
        self._saved = Saved(snapshot.step, path, error, seconds if stall is None else stall, seconds, size)
