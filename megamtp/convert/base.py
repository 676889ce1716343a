"""What every source of weights looks like to those who convert, generate or evaluate."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megamtp.convert.formats import Format, logical_names, logical_shape
from megamtp.errors import UserError
from megamtp.model.transformer import ModelConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}  # as options name them


class Check(NamedTuple):
    """``sha256`` is of the file without its bytes [without[0], without[1])."""

    path: Path
    file_bytes: int
    without: tuple[int, int]
    sha256: str

    @property
    def n_bytes(self) -> int:
        """To read."""
        return self.file_bytes - self.without[1] + self.without[0]


class Source(ABC):
    """A model in some folder: what is known of it, and its tensors, read when they are asked for.

    Names are the logical ones of ``model.model``, rotary pairs are halves, the vocabulary is without padding.
    """

    path: Path
    config: ModelConfig
    dtype: torch.dtype  # what an export is written in unless another is asked for
    context: int | None = None  # positions that it was trained on
    eos_id: int | None = None  # the token that ends a document
    tokenizer: Path | str | None = None  # a file, a folder, or the word "bytes"
    facts: dict[str, Any]  # of its training, JSON

    @abstractmethod
    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a logical tensor, in the stored dtype; of a 1-D tensor, elements: one is a row.

        Maybe a view of a mapped file, which must not be written to. ``UserError`` where the file is damaged.
        """

    def tensor(self, name: str) -> Tensor:
        """The whole logical tensor, as ``rows`` gives it."""
        return self.rows(name, 0, self.shape(name)[0])

    def checksums(self) -> dict[Path, str]:
        """SHA-256 of the files that have one on record: those of our checkpoints alone."""
        return {}

    def checks(self) -> "list[Check]":
        """What to compare to know that all that ``rows`` reads is sound; less than ``checksums`` where possible."""
        return [Check(path, path.stat().st_size, (0, 0), sha256) for path, sha256 in self.checksums().items()]

    def names(self) -> list[str]:
        """Every tensor, in the order of the model."""
        return logical_names(self.config)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a logical tensor, the vocabulary without padding."""
        return logical_shape(name, self.config)

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor) of every tensor."""
        for name in self.names():
            yield name, self.tensor(name)


class MappedSource(Source):
    """A source whose files hold whole tensors, under the names of ``format``.

    Raises ``UserError`` where one is missing or unknown, or has another shape than ``config`` says.
    """

    def __init__(self, path: Path, config: ModelConfig, format: Format, tensors: Mapping[str, Tensor]):
        self.path, self.config, self.format, self.facts = path, config, format, {}
        self._names, self._tensors = format.names(config), dict(tensors)
        known = set(self._names.values())
        for what, found in (("lacks", known - set(tensors)), ("has the unknown tensor", set(tensors) - known)):
            if found:
                more = f" and {len(found) - 1} more" if len(found) > 1 else ""
                raise UserError(
                    f"{path}: {what} {min(found)}{more}, for a model of {config.n_layers} layers and "
                    f"{config.n_future_tokens} heads; give the folder of a whole Llama without biases or adapters"
                )
        for name, theirs in self._names.items():
            if (found := tuple(tensors[theirs].shape)) != (shape := self.shape(name)):
                raise UserError(f"{path}: {theirs} has shape {list(found)}, its config says {list(shape)}; mend either")
        dtypes = {tensor.dtype for tensor in tensors.values()}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if not 0 <= start <= stop <= self.shape(name)[0]:
            raise IndexError(f"{name} has {self.shape(name)[0]} rows; [{start}, {stop}) wanted")
        return self.format.rows(self._tensors[self._names[name]], name, start, stop, self.config.head_dim)


def row_blocks(shape: tuple[int, ...], block_bytes: int, itemsize: int) -> Iterator[tuple[int, int]]:
    """Cut rows into [start, stop) blocks of at most ``block_bytes``, and at least one row."""
    count = max(1, block_bytes // (math.prod(shape[1:]) * itemsize))
    for start in range(0, shape[0], count):
        yield start, min(shape[0], start + count)
