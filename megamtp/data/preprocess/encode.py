"""Text and a tokenizer -> a ``.bin/.idx`` pair and its manifest, by several processes, in order.

The input is cut into units of a few megabytes (``inputs.py``); forked workers parse and encode them
(``workers.py``) and this process writes what comes back, in the order of the input: the same files whatever the
number of workers. Memory is bounded by a few units per worker, or by the longest document.
"""

import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from megamtp.data.dataset_writer import IndexedDatasetWriter
from megamtp.data.indexed_dataset import token_dtype
from megamtp.data.manifest import Manifest
from megamtp.data.preprocess.documents import iterate_documents, read_documents
from megamtp.data.preprocess.encoder import Encoder, EncoderTrial, Mistrusted, fast_encoder, plain_encoder
from megamtp.data.preprocess.inputs import Unit, find_files, plan_units, shard_bytes
from megamtp.data.preprocess.workers import OrderedWorkers
from megamtp.data.tokenizer import Tokenizer, load_tokenizer
from megamtp.errors import UserError
from megamtp.files import write_failure
from megamtp.host_memory import keep_freed_memory

BATCH_CHARACTERS = 1 << 20
DOCUMENT_CHARACTERS = 64  # that a document counts for beside its own: there may be millions of empty ones
PROBE_CHARACTERS = 1 << 16  # of the input's first documents, on which the encoder is tried
SKIPS_SHOWN = 20


@dataclass
class Encoded:
    """Documents on their way from a worker: ``tokens`` (sum of lengths,), each document with its end."""

    tokens: np.ndarray
    lengths: np.ndarray  # int32
    bytes_read: int
    skipped: int  # malformed documents among them
    told: list[str]  # where and why, of the first of those


def preprocess(
    inputs: Iterable[Path | str],
    tokenizer_path: Path | str,
    output_prefix: Path | str,
    text_key: str = "text",
    eod_token: str | None = None,
    *,
    workers: int | None = None,
    on_error: Literal["fail", "skip"] = "fail",
    shard: tuple[int, int] = (0, 1),
    progress: bool = False,
) -> Manifest:
    """Encode every document, each followed by ``eod_token``, to ``output_prefix`` + ``.bin``, ``.idx``, ``.json``.

    The files replace older ones only when all is encoded; the manifest, which is returned, comes last. ``workers``
    defaults to the cores that this process may use. ``shard`` (i, N) takes the i-th of N equal parts of the input;
    those, merged in order, are the whole. Raises ``UserError`` for unreadable input, an unfit tokenizer and, unless
    ``on_error`` is "skip", a malformed document; ``RunFailure`` for a full disk and for a worker that died.
    """
    files = find_files(inputs)
    tokenizer = load_tokenizer(tokenizer_path)
    tokenizer.eod(eod_token)
    run = partial(_encode_all, files, tokenizer, output_prefix, text_key, eod_token, workers, on_error, shard, progress)
    try:
        with EncoderTrial(tokenizer, _first_texts(files, text_key), Path(output_prefix).parent) as trial:
            encoder, reason = fast_encoder(tokenizer)
            try:
                return run(encoder, reason, trial)
            except Mistrusted as mistrusted:
                return run(plain_encoder(tokenizer), str(mistrusted), trial)
    except OSError as error:
        raise write_failure(output_prefix, error) from error


def _encode_all(
    files: list[Path],
    tokenizer: Tokenizer,
    prefix: Path | str,
    text_key: str,
    eod_token: str | None,
    n_workers: int | None,
    on_error: str,
    shard: tuple[int, int],
    progress: bool,
    encoder: Encoder,
    reason: str | None,
    trial: EncoderTrial,
) -> Manifest:
    """``preprocess`` with a given encoder. ``Mistrusted`` where that turns out to be wrong; nothing is left then."""
    if progress:
        print(f"encoding with {encoder.name}{f': {reason}' if reason else ''}", file=sys.stderr)
    eod_token, eod_id = tokenizer.eod(eod_token)
    dtype, folder = token_dtype(tokenizer.vocab_size), Path(prefix).parent
    work = _Work(encoder, eod_id, dtype, text_key, on_error)
    total = shard_bytes(files, *shard) if progress else 0
    skipped = 0
    with IndexedDatasetWriter(prefix, dtype) as writer:
        with OrderedWorkers(plan_units(files, *shard), work, n_workers or _usable_cores(), folder) as results:
            with _Progress(total, progress) as bar:
                for encoded in results:
                    writer.add_documents(encoded.tokens, encoded.lengths)
                    skipped += encoded.skipped
                    bar.advance(encoded)
                    trial.require_trust(encoder, wait=False)
                trial.require_trust(encoder, wait=True)
        if shard[1] == 1:
            require_documents(writer.n_documents, skipped, files)
    manifest = Manifest.of(
        writer.written,
        vocab_size=tokenizer.vocab_size,
        eod_token=eod_token,
        eod_id=eod_id,
        tokenizer_sha256=tokenizer.fingerprint,
        skipped=skipped,
    )
    manifest.write(prefix)
    return manifest


def require_documents(n_documents: int, skipped: int, files: Iterable[Path | str]) -> None:
    """``UserError`` for none."""
    if not n_documents:
        malformed = f" but {skipped} malformed ones" if skipped else ""
        raise UserError(f"{', '.join(map(str, files))}: no documents{malformed}; give files with text")


class _Work:
    """What a worker does with a unit."""

    def __init__(self, encoder: Encoder, eod_id: int, dtype: np.dtype, text_key: str, on_error: str):
        self.encoder, self.eod_id, self.dtype, self.text_key = encoder, eod_id, dtype, text_key
        self.skip = self._skip if on_error == "skip" else None
        self.skipped = self.all_skipped = 0
        self.told: list[str] = []
        self.is_set_up = False

    def __call__(self, unit: Unit) -> Iterator[Encoded]:
        if not self.is_set_up:  # here, in the worker
            keep_freed_memory()
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would get in the other workers' way
            self.is_set_up = True
        ids: list[np.ndarray] = []
        characters = bytes_read = bytes_told = 0
        for text, n_bytes in read_documents(unit, self.text_key, self.skip):
            ids.append(self.encoder.encode(text))
            characters += len(text) + DOCUMENT_CHARACTERS
            bytes_read += n_bytes
            if characters >= BATCH_CHARACTERS:
                yield self._encoded(ids, bytes_read - bytes_told)
                ids, characters, bytes_told = [], 0, bytes_read
                self.encoder.trim()
        yield self._encoded(ids, unit.n_bytes - bytes_told)  # with what follows the last document

    def _encoded(self, ids: list[np.ndarray], bytes_read: int) -> Encoded:
        lengths = np.array([len(document) + 1 for document in ids], np.int64)
        if lengths.size and lengths.max() > np.iinfo(np.int32).max:
            raise UserError(
                f"a document of {lengths.max() - 1} tokens: the format holds {np.iinfo(np.int32).max}; split it"
            )
        tokens = np.empty(lengths.sum(), self.dtype)
        end = 0
        for document in ids:
            start, end = end, end + len(document) + 1
            tokens[start : end - 1] = document
            tokens[end - 1] = self.eod_id
        encoded = Encoded(tokens, lengths.astype(np.int32), bytes_read, self.skipped, self.told)
        self.skipped, self.told = 0, []
        return encoded

    def _skip(self, describe) -> None:
        if self.all_skipped < SKIPS_SHOWN:  # to count the lines before it takes a pass over the file
            self.told.append(describe())
        self.skipped += 1
        self.all_skipped += 1


class _Progress:
    """A bar with MB/s, tokens/s and the time left; skipped documents are told as they come."""

    def __init__(self, total: int, shown: bool):
        from tqdm import tqdm  # here: its thread must not be there yet when the workers are forked

        seconds = 0.1 if sys.stderr.isatty() else 10  # a job's log need not grow by each of them
        self._bar = tqdm(
            total=total, unit="B", unit_scale=True, disable=not shown, dynamic_ncols=True, mininterval=seconds
        )
        self._tokens = self._told = 0

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def advance(self, encoded: Encoded) -> None:
        self._tokens += len(encoded.tokens)
        for where in encoded.told[: SKIPS_SHOWN - self._told]:
            self._bar.write(f"skipped {where}", file=sys.stderr)
            self._told += 1
        if not self._bar.disable:
            seconds = self._bar.format_dict["elapsed"]
            self._bar.set_postfix_str(f"{self._tokens / max(seconds, 1e-3) / 1e6:.1f}M tokens/s", refresh=False)
        self._bar.update(encoded.bytes_read)


def _first_texts(files: list[Path], text_key: str) -> list[str]:
    """The beginning of the first documents that can be read; what is malformed is found later."""
    texts = []
    try:
        for text, _ in itertools.islice(iterate_documents(files[:1], text_key), 16):
            texts.append(text[: PROBE_CHARACTERS // 16])
    except UserError:
        return texts
    return texts


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS has none
