"""Micro-batches of this rank, and a state small enough to put in every checkpoint.

Global step t uses samples [consumed, consumed + global_batch_size) in the order of ``Samples``; each data-parallel
rank takes a contiguous share. The samples of a step therefore depend neither on the layout nor on the micro-batch.

Shapes: b = micro-batch, s = seq_len, n = n_future_tokens.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from megamtp.config import REQUIRED, config_dataclass, option
from megamtp.data.samples import Samples
from megamtp.errors import UserError

PADDING = -1


@config_dataclass
class DataConfig:
    train: str = option(REQUIRED, "training data: path of the .bin/.idx pair without the ending")
    validation: str | None = option(None, "validation data, named likewise")
    seq_len: Annotated[int, Field(ge=1)] = option(1024, "positions per sample")
    mask_cross_document_targets: bool = option(True, "no loss for a target in another document than its position")
    document_attention: bool = option(False, "positions attend only inside their document; rotary restarts in each")
    tokenizer: str | None = option(None, "tokenizer.json that the data was made with; only generation needs it")


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

    Raises ``UserError`` when the global batch does not divide into micro-batches and ranks.
    """

    def __init__(
        self,
        samples: Samples,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        consumed_samples: int = 0,
    ) -> None:
        unit = micro_batch_size * dp_size
        if global_batch_size < 1 or global_batch_size % unit:
            below = global_batch_size // unit * unit
            nearest = f"{below} or {below + unit}" if below > 0 else f"{unit}"
            raise UserError(
                f"global_batch_size {global_batch_size} does not divide into micro-batches of {micro_batch_size} on "
                f"{dp_size} data-parallel ranks; use {nearest}"
            )
        self.samples = samples
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.consumed_samples = consumed_samples

    def next_step(self) -> list[Batch]:
        """The micro-batches of the next global batch that belong to this rank, in order."""
        share = self.global_batch_size // self.dp_size
        first = self.consumed_samples + self.dp_rank * share
        batches = [
            _batch(self.samples, range(start, start + self.micro_batch_size), self.micro_batch_size)
            for start in range(first, first + share, self.micro_batch_size)
        ]
        self.consumed_samples += self.global_batch_size
        return batches

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        return self.next_step()

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.consumed_samples / self.samples.samples_per_epoch

    def state_dict(self) -> dict[str, Any]:
        """Plain values: how far the data is read, and what fixes its order. The same on every rank."""
        return {"consumed_samples": self.consumed_samples, **_identity(self.samples)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly after the last step of ``state``; batch sizes and ranks may be others.

        Raises ``UserError`` naming what differs when the state belongs to another order of the data.
        """
        for key, ours in _identity(self.samples).items():
            if state.get(key) != ours:
                raise UserError(
                    f"{self.samples.dataset.prefix}: the checkpoint was made with other data: {key} was "
                    f"{state.get(key)}, now it is {ours}; give the same data and settings, or start a new run"
                )
        self.consumed_samples = state["consumed_samples"]


def validation_batches(
    samples: Samples, micro_batch_size: int, dp_rank: int, dp_size: int, max_samples: int | None = None
) -> Iterator[Batch]:
    """This rank's part of the first ``max_samples`` (default: all) samples of one epoch, each once over all ranks.

    Every rank yields equally many batches of the full shape (collectives and pipeline stages must match); rows
    that are left over at the end are padding.
    """
    total = min(samples.samples_per_epoch, max_samples if max_samples is not None else samples.samples_per_epoch)
    for round_start in range(0, total, micro_batch_size * dp_size):
        start = round_start + dp_rank * micro_batch_size
        yield _batch(samples, range(start, min(total, start + micro_batch_size)), micro_batch_size)


def _batch(samples: Samples, global_indices: range, rows: int) -> Batch:
    width = samples.seq_len + samples.n_future_tokens
    tokens = np.full((rows, width), PADDING, dtype=np.int64)
    document_ids = np.zeros((rows, width), dtype=np.int32)
    for row, global_index in enumerate(global_indices):
        tokens[row], document_ids[row] = samples.get(global_index)
    return Batch(torch.from_numpy(tokens), torch.from_numpy(document_ids), samples.seq_len)


def _identity(samples: Samples) -> dict[str, Any]:
    # Two corpora may well have equally many tokens (synthetic ones do): 64 short cuts tell them apart.
    tokens = samples.dataset.tokens
    cuts = [tokens[start : start + 64] for start in range(0, len(tokens), -(-len(tokens) // 64))]
    return {
        "seed": samples.seed,
        "shuffle": samples.shuffle,
        "seq_len": samples.seq_len,
        "n_future_tokens": samples.n_future_tokens,
        "n_tokens": samples.dataset.n_tokens,
        "samples_per_epoch": samples.samples_per_epoch,
        "sampled_tokens_crc32": zlib.crc32(np.concatenate(cuts).astype("<i8").tobytes()),
    }
