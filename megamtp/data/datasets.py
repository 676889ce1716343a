"""The ``data:`` section of a config, and from it checked data sets: a blend to train on, sets to validate on.

1. ``train`` names one data set or a blend of several; ``validation`` likewise names sets that are evaluated apart,
   or ``validation_fraction`` takes the last documents of each training set.
2. Each is opened and checked against its manifest, the model's vocabulary and the tokenizer, before anything else.
3. ``packing`` says how documents become samples (``samples.py``, ``packing.py``); ``Blend`` mixes the sets.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from megamtp.config import REQUIRED, config_dataclass, option
from megamtp.data.blend import Blend
from megamtp.data.indexed_dataset import IndexedDataset
from megamtp.data.manifest import Manifest
from megamtp.data.packing import PackedSamples
from megamtp.data.samples import Samples
from megamtp.data.stream import Stream
from megamtp.data.tokenizer import fingerprint
from megamtp.errors import UserError

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@config_dataclass
class SourceConfig:
    """One data set of a blend."""

    path: str = option(REQUIRED, "of the .bin/.idx pair without the ending")
    weight: Weight = option(1.0, "share of the samples, relative to the other sets' weights")


@config_dataclass
class ValidationConfig:
    """One of several validation sets."""

    path: str = option(REQUIRED, "of the .bin/.idx pair without the ending")
    name: str | None = option(None, "in the metrics; null = the last part of the path")


@config_dataclass
class StageConfig:
    """Other weights from a point of the training on."""

    from_tokens: Annotated[int, Field(ge=1)] = option(REQUIRED, "training tokens after which it begins")
    weights: list[Weight] = option(REQUIRED, "one for each set of data.train")


@config_dataclass
class DataConfig:
    train: str | list[SourceConfig] = option(REQUIRED, "path of a .bin/.idx pair without the ending, or a blend")
    stages: list[StageConfig] = option([], "changes of the blend's weights in the course of training")
    validation: str | list[ValidationConfig] | None = option(None, "validation data, or several named sets")
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] | None = option(
        None, "validate on this share of each training set, its last documents"
    )
    seq_len: Annotated[int, Field(ge=1)] = option(1024, "positions per sample")
    packing: Literal["stream", "document", "best_fit"] = option(
        "stream", "stream: cut across documents; document: one a sample; best_fit: several, short ones never cut"
    )
    mask_cross_document_targets: bool = option(True, "no loss for a target in another document than its position")
    document_attention: bool = option(False, "positions attend only inside their document; rotary restarts in each")
    tokenizer: str | None = option(None, "what the data was made with: checked at start, and used to generate")
    verify: Literal["sizes", "checksum"] = option("sizes", "what is checked at start; checksum reads all of the data")
    cache_dir: str | None = option(None, "where packing keeps its index; null = a folder beside the data")
    workers: Annotated[int, Field(ge=0)] | None = option(
        None, "processes that read ahead; 0 = read when needed; null = 2 with a GPU, 0 without"
    )
    prefetch: Annotated[int, Field(ge=1)] = option(4, "micro-batches that each worker reads ahead")

    def __post_init__(self):
        if self.validation and self.validation_fraction:
            raise ValueError("data.validation and data.validation_fraction exclude each other; give one")
        if not self.sources:
            raise ValueError("data.train is an empty list; name a data set")
        if not any(source.weight for source in self.sources):
            raise ValueError("data.train: all weights are 0; give one set some weight")
        paths = [source.path for source in self.sources]
        if len(set(paths)) < len(paths):
            raise ValueError(f"data.train: {paths} names a set twice; give it once, with its whole weight")
        before = 0
        for stage in self.stages:
            if len(stage.weights) != len(self.sources):
                raise ValueError(
                    f"data.stages: {len(stage.weights)} weights for the {len(self.sources)} sets of data.train"
                )
            if not any(stage.weights):
                raise ValueError(f"data.stages: all weights from {stage.from_tokens} tokens on are 0")
            if stage.from_tokens // self.seq_len <= before:
                raise ValueError("data.stages: from_tokens must rise from stage to stage by a sample at least")
            before = stage.from_tokens // self.seq_len
        names = [name for name, _ in self.validation_sets]
        if len(set(names)) < len(names):
            raise ValueError(f"data.validation: names {names} are not distinct; give each set a name")

    @property
    def sources(self) -> list[SourceConfig]:
        return [SourceConfig(path=self.train)] if isinstance(self.train, str) else self.train

    @property
    def validation_sets(self) -> list[tuple[str, str]]:
        """(name, path) of each."""
        given = self.validation or []
        given = [ValidationConfig(path=given)] if isinstance(given, str) else given
        return [(entry.name or Path(entry.path).name, entry.path) for entry in given]

    @property
    def blend_stages(self) -> list[tuple[int, list[float]]]:
        """(first sample, weights): what ``Blend`` takes."""
        first = (0, [source.weight for source in self.sources])
        return [first, *((stage.from_tokens // self.seq_len, stage.weights) for stage in self.stages)]


class Data(NamedTuple):
    """``validation`` by name; empty where there is none."""

    train: Blend
    validation: dict[str, Samples | PackedSamples]


class Share(NamedTuple):
    """Which part of the data this process reads to check it, where several share that."""

    rank: int
    size: int


ALL = Share(0, 1)


def open_data(
    config: DataConfig, *, vocab_size: int, n_future_tokens: int, seed: int, share: Share | None = ALL
) -> Data:
    """Open and check all data sets. Raises ``UserError`` for whatever does not fit, naming the file.

    Sizes, structure, vocabulary and tokenizer are checked in any case, checksums where ``config.verify`` asks. What
    takes reading the tokens is done for ``share`` of them, and left to other processes where that is None.
    """
    tokenizer = fingerprint(config.tokenizer) if config.tokenizer else None
    made_with: dict[str, str] = {}  # tokenizer's fingerprint -> the data set that brought it in

    def open_stream(path: str) -> Stream:
        dataset = IndexedDataset(path)
        manifest = Manifest.read(path)
        if manifest is None:
            if config.verify == "checksum":
                raise UserError(f"{path}: no manifest to verify it by; make one with tools/verify_data.py")
            if share:
                _require_tokens(dataset, dataset.max_token(*share), vocab_size)
            return Stream(dataset)
        manifest.require_sizes(dataset)
        _require_tokens(dataset, manifest.max_token, vocab_size)
        if tokenizer:
            manifest.require_tokenizer(path, tokenizer, config.tokenizer)
        if manifest.tokenizer_sha256:
            made_with.setdefault(manifest.tokenizer_sha256, path)
            if len(made_with) > 1:
                first, second = made_with.values()
                raise UserError(f"{second}: was made with another tokenizer than {first}; preprocess both with one")
        if config.verify == "checksum" and share:
            for index in range(share.rank, manifest.n_checks(), share.size):
                manifest.check(path, index)
        return Stream(dataset)

    def samples(stream: Stream, seed: int, shuffle: bool) -> Samples | PackedSamples:
        if config.packing == "stream":
            return Samples(stream, config.seq_len, n_future_tokens, seed, shuffle)
        return PackedSamples(
            stream, config.seq_len, n_future_tokens, seed, shuffle, mode=config.packing, cache_dir=config.cache_dir
        )

    train = [open_stream(source.path) for source in config.sources]
    validation = {name: open_stream(path) for name, path in config.validation_sets}
    if config.validation_fraction:
        parts = [stream.split(config.validation_fraction) for stream in train]
        train = [part for part, _ in parts]
        names = _distinct_names([source.path for source in config.sources])
        validation = {name: part for name, (_, part) in zip(names, parts, strict=True)}
    # A seed for each, or sources of one size would be read in the same order.
    sources = [samples(stream, seed + (i << 32), shuffle=True) for i, stream in enumerate(train)]
    held_out = {name: samples(stream, seed, shuffle=False) for name, stream in validation.items()}
    return Data(Blend(sources, config.blend_stages), held_out)


def describe_data(data: Data, n_samples: int) -> str:
    """A table of the sets and of how often ``n_samples`` training samples will go through each."""
    blend = data.train
    ends = [min(stage.first, n_samples) for stage in blend.stages[1:]] + [n_samples]
    planned = [0.0] * len(blend.sources)
    for stage, end in zip(blend.stages, ends, strict=True):
        for i, weight in enumerate(stage.weights):
            planned[i] += max(0, end - stage.first) * weight / sum(stage.weights)
    rows = [("data", "tokens", "share", "epochs")]
    for source, count in zip(blend.sources, planned, strict=True):
        share, epochs = f"{count / n_samples:.1%}", f"{count / source.samples_per_epoch:.2f}"
        rows.append((source.stream.name, f"{source.stream.n_tokens:,}", share, epochs))
    for name, samples in data.validation.items():
        rows.append((f"validation: {name}", f"{samples.stream.n_tokens:,}", "", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}".rstrip() for a, b, c, d in rows
    )


def _require_tokens(dataset: IndexedDataset, largest: int, vocab_size: int) -> None:
    if largest >= vocab_size:
        raise UserError(
            f"{dataset.prefix}: holds token {largest}, but model.vocab_size is {vocab_size}; "
            "use the tokenizer's vocabulary size"
        )


def _distinct_names(paths: Sequence[str]) -> list[str]:
    names = [Path(path).name for path in paths]
    return names if len(set(names)) == len(names) else list(paths)
