"""Micro-batches of this rank, and a state small enough to put in every checkpoint.

1. Global step t uses samples [consumed, consumed + global_batch_size) of the blend; each data-parallel rank takes a
   contiguous share. The samples of a step therefore depend neither on the layout nor on the micro-batch.
2. A cursor of the blend tells which samples these are; worker processes, if there are any, read them, ahead of time
   and in this order. What they have read ahead is not consumed: the state does not depend on them.

Shapes: b = micro-batch, s = seq_len, n = n_future_tokens.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from megamtp.data.blend import Blend
from megamtp.data.packing import PackedSamples
from megamtp.data.samples import PADDING, Samples
from megamtp.errors import RunFailure, UserError

Rows = tuple[np.ndarray, np.ndarray]  # (source (b,), index in that source (b,)) of one micro-batch


@dataclass(frozen=True)
class Batch:
    """One micro-batch. ``tokens`` int64 and ``document_ids`` int32 are (b, s + n); token -1 is padding."""

    tokens: torch.Tensor
    document_ids: torch.Tensor
    seq_len: int

    @property
    def inputs(self) -> torch.Tensor:
        """(b, s) int64; padding becomes token 0, and no target."""
        return self.tokens[:, : self.seq_len].clamp(min=0)

    def targets(self, mask_cross_document: bool, ignore_index: int = -100) -> torch.Tensor:
        """(n, b, s) int64: ``targets[k - 1]`` is the k-th next token of each position.

        ``ignore_index`` stands for padding and, when masking, for targets in another document than their position.
        """
        s, n = self.seq_len, self.tokens.shape[1] - self.seq_len
        tokens = torch.stack([self.tokens[:, k : k + s] for k in range(1, n + 1)])  # (n, b, s)
        ignored = tokens == PADDING
        if mask_cross_document:
            documents = torch.stack([self.document_ids[:, k : k + s] for k in range(1, n + 1)])  # (n, b, s)
            ignored |= documents != self.document_ids[:, :s]
        return tokens.masked_fill(ignored, ignore_index)

    def positions(self) -> torch.Tensor:
        """(b, s) int64: the position of each token in its document, as far as the sample shows it."""
        ids = self.document_ids[:, : self.seq_len]
        index = torch.arange(self.seq_len, device=ids.device).expand_as(ids)
        begins = torch.zeros_like(index)
        begins[:, 1:] = index[:, 1:] * (ids[:, 1:] != ids[:, :-1])
        return index - begins.cummax(dim=1).values


class Loader:
    """An endless iterator over steps; each step is the list of this rank's micro-batches.

    ``transform`` turns a ``Batch`` into what the model takes; with ``workers`` > 0 it runs in those processes, and
    ``pin_memory`` moves the tensors that it returns into page-locked memory. Raises ``UserError`` when the global
    batch does not divide into micro-batches and ranks, ``RunFailure`` when a worker has died.
    """

    def __init__(
        self,
        blend: Blend | Samples | PackedSamples,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        *,
        transform: Callable[[Batch], Any] = lambda batch: batch,
        workers: int = 0,
        prefetch: int = 4,
        pin_memory: bool = False,
    ) -> None:
        unit = micro_batch_size * dp_size
        if global_batch_size < 1 or global_batch_size % unit:
            below = global_batch_size // unit * unit
            nearest = f"{below} or {below + unit}" if below > 0 else f"{unit}"
            raise UserError(
                f"global_batch_size {global_batch_size} does not divide into micro-batches of {micro_batch_size} on "
                f"{dp_size} data-parallel ranks; use {nearest}"
            )
        self.blend = blend if isinstance(blend, Blend) else Blend([blend], [(0, [1.0])])
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self._transform = transform
        self._read_ahead = {"num_workers": workers, "pin_memory": pin_memory}
        if workers:
            # Forked, a worker shares the memory maps and starts at once; it touches neither GPU nor process groups.
            self._read_ahead |= {"prefetch_factor": prefetch, "multiprocessing_context": "fork"}
            self._read_ahead["worker_init_fn"] = _leave_stopping_to_the_rank
        self._cursor = self.blend.cursor()
        self._batches: Iterator[Any] | None = None

    def next_step(self) -> list[Any]:
        """The micro-batches of the next global batch that belong to this rank, in order."""
        if self._batches is None:
            ahead = self.blend.cursor(self._cursor.state_dict())
            reader = _Reader(self.blend, self._transform)
            self._batches = iter(DataLoader(reader, None, sampler=_Plan(self, ahead), **self._read_ahead))
        count = self.global_batch_size // (self.micro_batch_size * self.dp_size)
        with dead_workers_told():
            batches = [next(self._batches) for _ in range(count)]
        self._cursor.take(self.global_batch_size)
        return batches

    def __iter__(self) -> Iterator[list[Any]]:
        return self

    def __next__(self) -> list[Any]:
        return self.next_step()

    def close(self) -> None:
        """End the worker processes; the next step would start others.

        To be called before the program ends: they do not hear a SIGTERM, by which Python would end them.
        """
        if self._read_ahead["num_workers"] and self._batches is not None:
            self._batches._shutdown_workers()  # what its __del__ does, but a traceback may keep it alive
        self._batches = None

    @property
    def consumed_samples(self) -> int:
        return self._cursor.consumed

    @property
    def epochs(self) -> dict[str, float]:
        """Passes over each source so far, by the path of its data."""
        epochs = self.blend.epochs(self._cursor.consumed_per_source)
        return {source.stream.name: n for source, n in zip(self.blend.sources, epochs, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """Plain values: how far the data is read, and what fixes its order. The same on every rank."""
        return {**self._cursor.state_dict(), "sources": self.blend.identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly after the last step of ``state``; batch sizes, ranks and workers may be others.

        Raises ``UserError`` naming what differs when the state belongs to another order of the data.
        """
        if "sources" not in state:
            raise UserError("data: the checkpoint is of an earlier version, which kept another state; start a new run")
        # Sources may have been added at the end; the blend refuses fewer.
        for source, before in zip(self.blend.sources, state["sources"], strict=False):
            for key, value in source.identity().items():
                if before.get(key) != value:
                    raise UserError(
                        f"{source.dataset.prefix}: the checkpoint was made with other data: {key} was "
                        f"{before.get(key)}, now it is {value}; give the same data and settings, or start a new run"
                    )
        self._cursor = self.blend.cursor(state)
        self.close()


@contextlib.contextmanager
def dead_workers_told() -> Iterator[None]:
    """``RunFailure`` where a loader's worker dies: torch tells it by an exception wherever the program just is."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RunFailure(f"data: {' '.join(str(error).split())}; out of memory? Use fewer data.workers") from error


def _leave_stopping_to_the_rank(worker: int) -> None:
    """A signal that asks the run to save and stop often goes to all of its processes; the last step needs its data."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class _Reader(Dataset):
    """From the plan of a micro-batch to its content."""

    def __init__(self, blend: Blend, transform: Callable[[Batch], Any]):
        self.blend, self.transform = blend, transform

    def __getitem__(self, rows: Rows) -> Any:
        tokens, document_ids = self.blend.fetch(*rows)
        seq_len = self.blend.sources[0].seq_len
        return self.transform(Batch(torch.from_numpy(tokens), torch.from_numpy(document_ids), seq_len))


class _Plan:
    """The rows of this rank's micro-batches, for ever."""

    def __init__(self, loader: Loader, cursor):
        self.loader, self.cursor = loader, cursor

    def __iter__(self) -> Iterator[Rows]:
        loader = self.loader
        share = loader.global_batch_size // loader.dp_size
        while True:
            source, index = self.cursor.take(loader.global_batch_size)
            first = loader.dp_rank * share
            for start in range(first, first + share, loader.micro_batch_size):
                rows = slice(start, start + loader.micro_batch_size)
                yield source[rows], index[rows]


def validation_rounds(n_samples: int, micro_batch_size: int, dp_size: int) -> int:
    """Batches that every rank gets from ``validation_batches``."""
    return -(-n_samples // (micro_batch_size * dp_size))


def validation_batches(
    samples: Samples | PackedSamples,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    max_samples: int | None = None,
) -> Iterator[Batch]:
    """This rank's part of the first ``max_samples`` (default: all) samples of one epoch, each once over all ranks.

    Every rank yields equally many batches of the full shape (collectives and pipeline stages must match); rows
    that are left over at the end are padding.
    """
    total = min(samples.samples_per_epoch, max_samples if max_samples is not None else samples.samples_per_epoch)
    width = samples.seq_len + samples.n_future_tokens
    for round_start in range(0, total, micro_batch_size * dp_size):
        start = min(total, round_start + dp_rank * micro_batch_size)
        stop = min(total, start + micro_batch_size)
        tokens = np.full((micro_batch_size, width), PADDING, dtype=np.int64)
        document_ids = np.zeros((micro_batch_size, width), dtype=np.int32)
        if start < stop:
            tokens[: stop - start], document_ids[: stop - start] = samples.batch(np.arange(start, stop))
        yield Batch(torch.from_numpy(tokens), torch.from_numpy(document_ids), samples.seq_len)
