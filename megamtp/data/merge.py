"""Several data sets into one, their documents one after another."""

import re
from collections.abc import Sequence
from pathlib import Path

from megamtp.data.dataset_writer import IndexedDatasetWriter
from megamtp.data.indexed_dataset import IndexedDataset, bin_path, idx_path, manifest_path
from megamtp.data.manifest import Manifest
from megamtp.errors import UserError
from megamtp.files import write_failure

SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})", re.DOTALL)
SAME = ("vocab_size", "eod_token", "eod_id", "tokenizer_sha256")  # in the manifests of what is merged


def merge(prefixes: Sequence[Path | str], output: Path | str, progress: bool = False, remove: bool = False) -> Manifest:
    """Write ``output`` + ``.bin``, ``.idx``, ``.json`` from all of ``prefixes`` in order; ``remove`` them after.

    Raises ``UserError`` where dtypes or tokenizers differ, one is damaged or given twice, or the output is among them,
    ``RunFailure`` for a full disk.
    """
    from tqdm import tqdm

    resolved = [Path(prefix).resolve() for prefix in prefixes]
    if len(set(resolved)) < len(resolved):
        raise UserError(f"{', '.join(map(str, prefixes))}: one is given twice; give each once")
    _require_all_shards(prefixes)
    if Path(output).resolve() in resolved:
        raise UserError(f"{output}: is among the inputs; choose another output")
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    manifests = [Manifest.read(prefix) for prefix in prefixes]
    for dataset, manifest in zip(datasets, manifests, strict=True):
        if dataset.dtype != datasets[0].dtype:
            raise UserError(
                f"{dataset.prefix}: stores {dataset.dtype}, {datasets[0].prefix} {datasets[0].dtype}; they are of "
                "different vocabularies, preprocess them with one tokenizer"
            )
        if manifest:
            manifest.require_sizes(dataset)
    known = [(prefix, manifest) for prefix, manifest in zip(prefixes, manifests, strict=True) if manifest]
    for prefix, manifest in known:
        for key in SAME:
            if getattr(manifest, key) != (first := getattr(known[0][1], key)):
                raise UserError(
                    f"{prefix}: {key} is {getattr(manifest, key)}, {known[0][0]} has {first}; "
                    "preprocess them with one tokenizer"
                )
    source = {key: getattr(known[0][1], key) for key in SAME} if len(known) == len(datasets) else {}
    n_bytes = sum(dataset.n_tokens * dataset.dtype.itemsize for dataset in datasets)
    try:
        with tqdm(total=n_bytes, unit="B", unit_scale=True, disable=not progress, desc="merging") as bar:
            with IndexedDatasetWriter(output, datasets[0].dtype) as writer:
                for dataset in datasets:
                    writer.add_dataset(dataset, bar.update)
            merged = Manifest.of(writer.written, **source, skipped=sum(manifest.skipped for _, manifest in known))
        merged.write(output)
    except OSError as error:
        raise write_failure(output, error) from error
    if remove:
        for prefix in prefixes:
            for path in (manifest_path(prefix), idx_path(prefix), bin_path(prefix)):
                path.unlink(missing_ok=True)
    return merged


def _require_all_shards(prefixes: Sequence[Path | str]) -> None:
    """``UserError`` where shards by the names that preprocessing gives are missing or out of order."""
    found: dict[tuple[str, int], list[int]] = {}
    for prefix in prefixes:
        if match := SHARD.fullmatch(str(prefix)):
            found.setdefault((match[1], int(match[3])), []).append(int(match[2]))
    for (name, count), indices in found.items():
        if missing := sorted(set(range(count)) - set(indices)):
            raise UserError(
                f"{name}-{missing[0]:05d}-of-{count:05d}: is not among the inputs ({len(missing)} of {count} are "
                "missing); make it and merge all"
            )
        if indices != sorted(indices):
            raise UserError(f"{name}: its shards are given as {indices}, the documents would change places; sort them")
