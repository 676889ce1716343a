"""``PREFIX.json`` beside a ``.bin/.idx`` pair: what the pair holds, what made it, and how to tell that it is whole.

The manifest is written last, so where it stands the pair is complete. It is found to fit, or not, in two degrees:
sizes and the structure of the ``.idx`` in an instant; checksums by reading everything.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamtp.data.dataset_writer import CHUNK_BYTES, WrittenPair
from megamtp.data.indexed_dataset import (
    MANIFEST_FORMAT,
    IndexedDataset,
    bin_path,
    idx_path,
    manifest_path,
    refuse_foreign_manifest,
)
from megamtp.errors import UserError
from megamtp.files import write_atomic

VERSION = 1
READ_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is known of a pair. Fields that only text can tell are None where the pair was made from tokens."""

    documents: int
    sequences: int
    tokens: int
    dtype: str
    max_token: int  # the largest id that occurs; -1 where there is none
    bin_bytes: int
    idx_bytes: int
    chunk_bytes: int  # of the .bin under each checksum
    bin_sha256: list[str]
    idx_sha256: str
    vocab_size: int | None = None  # largest id of the tokenizer + 1
    eod_token: str | None = None
    eod_id: int | None = None
    tokenizer_sha256: str | None = None  # fingerprint: of tokenizer.json or of the SentencePiece model
    skipped: int = 0  # documents left out because they were malformed

    @classmethod
    def of(cls, written: WrittenPair, **source: Any) -> "Manifest":
        """Of a pair that was just written; ``source`` gives the fields that have defaults."""
        return cls(**written._asdict(), **source)

    @classmethod
    def read(cls, prefix: Path | str) -> "Manifest | None":
        """The manifest of a pair, None where it has none. ``UserError`` for a file that is no manifest."""
        path = manifest_path(prefix)
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read: {error}; write it again with tools/verify_data.py") from None
        again = "write it again with tools/verify_data.py --write-manifest"
        if not isinstance(values, dict) or values.pop("format", None) != MANIFEST_FORMAT:
            raise UserError(f"{path}: not the manifest of a data set; move it away or name the data otherwise")
        if (version := values.pop("version", None)) != VERSION:
            raise UserError(f"{path}: version {version}, this program reads version {VERSION}; {again}")
        fields = {field.name for field in dataclasses.fields(cls)}
        needed = {field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
        if wrong := sorted((needed - values.keys()) | (values.keys() - fields)):
            raise UserError(f"{path}: {', '.join(wrong)} missing or unknown; {again}")
        return cls(**values)

    def write(self, prefix: Path | str) -> None:
        """Write ``PREFIX.json``, whole or not at all. ``UserError`` where another kind of file has that name."""
        path = manifest_path(prefix)
        refuse_foreign_manifest(path)
        values = {"format": MANIFEST_FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        write_atomic(path, (json.dumps(values, indent=2) + "\n").encode())

    def require_sizes(self, dataset: IndexedDataset) -> None:
        """``UserError`` where the opened pair is not the one described, as far as counts and sizes tell."""
        found = {
            "sequences": len(dataset),
            "documents": dataset.n_documents,
            "tokens": dataset.n_tokens,
            "dtype": str(dataset.dtype),
            "bin_bytes": bin_path(dataset.prefix).stat().st_size,
            "idx_bytes": idx_path(dataset.prefix).stat().st_size,
        }
        for key, value in found.items():
            if value != (expected := getattr(self, key)):
                raise UserError(
                    f"{dataset.prefix}: has {value} {key}, its manifest says {expected}; "
                    "the files are of different data sets, copy all three again"
                )

    def n_checks(self) -> int:
        return 1 + len(self.bin_sha256)

    def check(self, prefix: Path | str, index: int) -> int:
        """Compare checksum ``index`` (0: the .idx; then the chunks of the .bin). Returns the bytes read.

        The checks of one pair can be shared out. Raises ``UserError`` where a file has changed.
        """
        if index == 0:
            path, start, size, expected = idx_path(prefix), 0, self.idx_bytes, self.idx_sha256
        else:
            path, start, expected = bin_path(prefix), self.chunk_bytes * (index - 1), self.bin_sha256[index - 1]
            size = min(self.chunk_bytes, self.bin_bytes - start)
        try:
            found = _sha256(path, start, size)
        except OSError as error:
            raise UserError(f"{path}: cannot read the data: {error.strerror}; copy it again") from None
        if found != expected:
            where = f" between byte {start} and byte {start + size}" if index else ""
            raise UserError(f"{path}: damaged{where}: its checksum is wrong; copy or write it again")
        return size

    def require_tokenizer(self, prefix: Path | str, fingerprint: str, name: str) -> None:
        """``UserError`` where the data were made with another tokenizer than ``name``."""
        if self.tokenizer_sha256 not in (None, fingerprint):
            raise UserError(
                f"{prefix}: was made with another tokenizer ({self.tokenizer_sha256[:12]}...) than {name} "
                f"({fingerprint[:12]}...); preprocess the text again, or give the tokenizer that made it"
            )


def make_manifest(dataset: IndexedDataset, **source: Any) -> Manifest:
    """The manifest of a pair that has none: reads the whole of it. ``source`` gives the fields with defaults."""
    bin_bytes = dataset.n_tokens * dataset.dtype.itemsize
    idx_bytes = idx_path(dataset.prefix).stat().st_size
    return Manifest(
        documents=dataset.n_documents,
        sequences=len(dataset),
        tokens=dataset.n_tokens,
        dtype=str(dataset.dtype),
        max_token=dataset.max_token(),
        bin_bytes=bin_bytes,
        idx_bytes=idx_bytes,
        chunk_bytes=CHUNK_BYTES,
        bin_sha256=[
            _sha256(bin_path(dataset.prefix), start, min(CHUNK_BYTES, bin_bytes - start))
            for start in range(0, max(1, bin_bytes), CHUNK_BYTES)
        ],
        idx_sha256=_sha256(idx_path(dataset.prefix), 0, idx_bytes),
        **source,
    )


def _sha256(path: Path, start: int, size: int) -> str:
    sha256 = hashlib.sha256()
    for data in _read(path, start, size):
        sha256.update(data)
    return sha256.hexdigest()


def _read(path: Path, start: int, size: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        file.seek(start)
        while size and (data := file.read(min(READ_BYTES, size))):
            size -= len(data)
            yield data
