"""JSONL and a tokenizer -> a ``.bin/.idx`` pair and its manifest.

One process: ``tokenizers`` encodes a batch on all cores by itself (``RAYON_NUM_THREADS`` limits them), so there is no
worker pool to hang or to die. Memory is bounded by one batch (or the longest document) + 4 bytes per document.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamtp.data.indexed_dataset import IndexedDatasetWriter, token_dtype
from megamtp.data.preprocess.jsonl import find_files, iterate_documents
from megamtp.data.preprocess.tokenizer import END_OF_DOCUMENT
from megamtp.errors import UserError
from megamtp.files import remove, write_atomic

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BATCH_DOCUMENTS = 1024
BATCH_CHARACTERS = 1 << 22


def preprocess(
    inputs: Iterable[Path | str],
    tokenizer_path: Path | str,
    output_prefix: Path | str,
    text_key: str = "text",
    eod_token: str = END_OF_DOCUMENT,
    progress: bool = False,
) -> dict[str, Any]:
    """Encode every document, each followed by ``eod_token``, to ``output_prefix`` + ``.bin``, ``.idx``, ``.json``.

    The files replace older ones only when all is encoded; the manifest ``.json`` comes last and is what is
    returned: documents, tokens, vocab_size (largest id + 1), eod_token, eod_id, tokenizer_sha256, dtype.
    Raises ``UserError`` for unreadable input, a malformed line, an unfit tokenizer.
    """
    from tqdm import tqdm

    files = find_files(inputs)
    tokenizer = load_tokenizer(tokenizer_path)
    eod_id = tokenizer.token_to_id(eod_token)
    if eod_id is None:
        raise UserError(f"{tokenizer_path}: has no token {eod_token!r} to end documents with; name one with --eod")
    encode = getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)  # without offsets, since 0.20
    vocab_size = max(tokenizer.get_vocab().values()) + 1  # ids may have gaps: get_vocab_size() can be smaller
    manifest = Path(f"{output_prefix}.json")
    writer = IndexedDatasetWriter(output_prefix, token_dtype(vocab_size))
    n_bytes = sum(file.stat().st_size for file in files)
    with writer, tqdm(total=n_bytes, unit="B", unit_scale=True, disable=not progress) as bar:
        for texts, bytes_read in _batches(iterate_documents(files, text_key)):
            for encoding in encode(texts, add_special_tokens=False):
                writer.add_document([*encoding.ids, eod_id])
            bar.set_postfix(tokens=f"{writer.n_tokens:,}", refresh=False)
            bar.update(bytes_read)
        if not writer.n_documents:
            raise UserError(f"{', '.join(map(str, files))}: no documents; give files with text")
        remove(manifest)  # an older one must not describe the new pair
    stats = {
        "documents": writer.n_documents,
        "tokens": writer.n_tokens,
        "vocab_size": vocab_size,
        "eod_token": eod_token,
        "eod_id": eod_id,
        "tokenizer_sha256": hashlib.sha256(Path(tokenizer_path).read_bytes()).hexdigest(),
        "dtype": str(writer.dtype),
    }
    write_atomic(manifest, (json.dumps(stats, indent=2) + "\n").encode())
    return stats


def load_tokenizer(path: Path | str) -> "Tokenizer":
    """A ``tokenizer.json`` set up to encode whole documents as plain text. ``UserError`` when it cannot be read."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UserError("preprocessing needs the package tokenizers; pip install tokenizers") from None
    if not Path(path).is_file():
        raise UserError(f"{path}: no such tokenizer; give the path of a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{path}: not a tokenizer.json: {' '.join(str(error).split())}") from None
    # Files saved after fine-tuning often cut or pad every text to one length.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # A document that spells out "<|endoftext|>" must not end there.
    tokenizer.encode_special_tokens = True
    return tokenizer


def _batches(documents: Iterator[tuple[str, int]]) -> Iterator[tuple[Sequence[str], int]]:
    """Texts in batches of bounded size, with the bytes that they took on disk."""
    texts: list[str] = []
    characters = bytes_read = 0
    for text, n_bytes in documents:
        texts.append(text)
        characters += len(text)
        bytes_read += n_bytes
        if len(texts) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield texts, bytes_read
            texts, characters, bytes_read = [], 0, 0
    if texts:
        yield texts, bytes_read
