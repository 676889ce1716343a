"""Text to token ids and back: a ``tokenizer.json``, a Hugging Face folder, a SentencePiece model, or raw bytes.

All of them encode a whole document as plain text: no token is added at its ends, and a document that spells out
"<|endoftext|>" does not end there. Ids are those of ``transformers`` with ``add_special_tokens=False`` and
``split_special_tokens=True``. A ``.model`` gives the ids of the package sentencepiece, which the models were trained
with; ``transformers`` 5 converts it, and then drops the first space of a text that begins with one.
"""

import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from megamtp.errors import UserError

BYTES = "bytes"  # the name of the byte-level "tokenizer": ids 0 ... 255, and 256 ends documents
END_OF_DOCUMENT = "<|endoftext|>"


class Tokenizer(ABC):
    """``vocab_size`` is the largest id + 1, ``fingerprint`` a SHA-256 of what defines the ids."""

    name: str
    vocab_size: int
    fingerprint: str
    default_eod: str | None = None  # the token that ends documents unless another is asked for
    added_tokens: Sequence[str] = ()  # that text may spell out: special tokens and those added to the vocabulary

    @abstractmethod
    def encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str: ...

    @abstractmethod
    def token_to_id(self, token: str) -> int | None: ...

    def eod(self, token: str | None = None) -> tuple[str, int]:
        """(token, id) that ends documents: ``token``, or the tokenizer's own. ``UserError`` where there is none."""
        token = token or self.default_eod
        if token is None:
            raise UserError(f"{self.name}: does not say which token ends a document; name one with --eod")
        if (token_id := self.token_to_id(token)) is None:
            raise UserError(f"{self.name}: has no token {token!r} to end documents with; name one with --eod")
        return token, token_id


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Load what ``path`` names: a file, a folder, or ``bytes``. ``UserError`` when it cannot be read."""
    if str(path) == BYTES:
        return ByteTokenizer()
    file = tokenizer_file(path)
    if file is None:
        return HuggingFaceTokenizer(Path(path), _convert_folder(Path(path)))
    if file.suffix == ".model":
        return SentencePieceTokenizer(file)
    return HuggingFaceTokenizer(file, file.read_bytes(), Path(path) if Path(path).is_dir() else None)


def tokenizer_file(path: Path | str) -> Path | None:
    """The file that defines the ids, None for a folder that only ``transformers`` understands."""
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()]
        if not found and not (path / "tokenizer_config.json").is_file():
            raise UserError(f"{path}: no tokenizer.json, tokenizer.model or tokenizer_config.json in this folder")
        return found[0] if found else None
    if not path.is_file():
        raise UserError(f"{path}: no such tokenizer; give a tokenizer.json, a folder, a .model, or the word {BYTES}")
    return path


def fingerprint(path: Path | str) -> str:
    """``load_tokenizer(path).fingerprint``, without loading it where its file says it all."""
    file = None if str(path) == BYTES else tokenizer_file(path)
    return load_tokenizer(path).fingerprint if file is None else hashlib.sha256(file.read_bytes()).hexdigest()


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json``, through the package tokenizers."""

    def __init__(self, path: Path, content: bytes, folder: Path | None = None):
        self.name, self.json = str(path), content.decode("utf-8", "replace")
        self.fingerprint = hashlib.sha256(content).hexdigest()
        try:
            parsed = parse_json(self.json)
            self.added_tokens = [token["content"] for token in parsed.get("added_tokens") or ()]
            self._ids = _ids(parsed)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            why = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
            raise UserError(f"{path}: not a tokenizer.json: {why}; give another") from None
        self.vocab_size = max(self._ids.values(), default=-1) + 1  # ids may have gaps
        self.default_eod = self._default_eod(folder)

    @functools.cached_property
    def tokenizer(self):
        """A ``tokenizers.Tokenizer``, loaded when it is first needed: that takes as long as encoding 20 MB of text."""
        try:
            import tokenizers
        except ImportError:
            raise UserError(f"{self.name}: needs the package tokenizers; pip install tokenizers") from None
        try:
            tokenizer = tokenizers.Tokenizer.from_str(self.json)
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{self.name}: not a tokenizer.json: {' '.join(str(error).split())}") from None
        # Files saved after fine-tuning often cut or pad every text to one length.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        return tokenizer

    def _default_eod(self, folder: Path | None) -> str | None:
        config = folder / "tokenizer_config.json" if folder else None
        if config and config.is_file():
            try:
                token = json.loads(config.read_text()).get("eos_token")
            except (AttributeError, OSError, ValueError) as error:
                raise UserError(f"{config}: cannot be read: {error}; copy the file again") from None
            token = token.get("content") if isinstance(token, dict) else token
            if token:
                return token
        return END_OF_DOCUMENT if self.token_to_id(END_OF_DOCUMENT) is not None else None

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)


def parse_json(content: str) -> dict:
    """By orjson where it is installed, ten times as fast: these are files of megabytes."""
    try:
        import orjson
    except ImportError:
        return json.loads(content)
    return orjson.loads(content)


def dump_json(content: dict) -> str:
    """As ``parse_json``."""
    try:
        import orjson
    except ImportError:
        return json.dumps(content, ensure_ascii=False)
    return orjson.dumps(content).decode()


def _ids(content: dict) -> dict[str, int]:
    """Token -> id, of the model's vocabulary (a list of pairs in Unigram models) and of the added tokens."""
    vocab = content["model"]["vocab"]
    ids = dict(vocab) if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
    return ids | {token["content"]: token["id"] for token in content.get("added_tokens") or ()}


class SentencePieceTokenizer(Tokenizer):
    """A ``.model`` of SentencePiece, through the package sentencepiece."""

    def __init__(self, path: Path):
        try:
            import sentencepiece
        except ImportError:
            raise UserError(f"{path}: needs the package sentencepiece; pip install sentencepiece") from None
        self.name, self.model = str(path), path.read_bytes()
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        except RuntimeError as error:
            raise UserError(f"{path}: not a SentencePiece model: {' '.join(str(error).split())}") from None
        self.vocab_size = self.processor.vocab_size()
        self.fingerprint = hashlib.sha256(self.model).hexdigest()
        self.default_eod = self.processor.id_to_piece(eos) if (eos := self.processor.eos_id()) >= 0 else None
        special = filter(self._is_special, range(self.vocab_size))
        self.added_tokens = [self.processor.id_to_piece(i) for i in special]

    def _is_special(self, token_id: int) -> bool:
        return self.processor.is_control(token_id) or self.processor.is_unknown(token_id)

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text, out_type=int)

    def decode(self, ids: Sequence[int]) -> str:
        return self.processor.decode([int(i) for i in ids])

    def token_to_id(self, token: str) -> int | None:
        token_id = self.processor.piece_to_id(token)
        return token_id if self.processor.id_to_piece(token_id) == token else None


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes, as the paper's byte-level models read them (arXiv:2404.19737, section 3.3)."""

    name = BYTES
    vocab_size = 257
    fingerprint = hashlib.sha256(b"megamtp: 256 bytes, then the end of a document").hexdigest()
    default_eod = END_OF_DOCUMENT

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        pieces, run = [], bytearray()
        for i in [*map(int, ids), 256]:
            if i < 256:
                run.append(i)
            else:
                pieces += [run.decode(errors="replace"), END_OF_DOCUMENT]
                run = bytearray()
        return "".join(pieces[:-1])

    def token_to_id(self, token: str) -> int | None:
        return 256 if token == END_OF_DOCUMENT else None


def _convert_folder(folder: Path) -> bytes:
    """A ``tokenizer.json`` for a folder without one (vocab.json and merges.txt, say), made by transformers."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise UserError(f"{folder}: has no tokenizer.json; pip install transformers to convert what is there") from None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer.to_str().encode()
    except (AttributeError, OSError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: cannot be turned into a tokenizer.json: {why}; save one there") from None
