"""The fastest way to encode with a tokenizer that gives its ids: gigatoken where it does, its own package otherwise.

gigatoken takes the same files and is some 50 times faster than tokenizers. It is a young library, so before it is
used it must give the same ids on texts that are hard to split, on mixtures of them, on characters of all Unicode
blocks, on the names of all special tokens, and on the first documents of the input.
"""

import os
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from megamtp.data.preprocess.workers import OrderedWorkers
from megamtp.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer, dump_json, parse_json
from megamtp.host_memory import give_back_freed_memory

# gigatoken remembers every word that it has met; on text that never repeats itself this grows without end, by
# doubling.
CACHE_BYTES = 128 << 20
EVERY_BLOCK = range(0x21, 0x2FA20, 151)  # code points that touch every block up to the last assigned letters
MIXTURES = 200
HARD_TEXTS = (
    "",
    " ",
    "\n\n  \n\t\tx = 1\r\n\r\n   y\x0b\x0c\x85z  ",
    "def f(self, *args, **kwargs):\n        return {'a': [1, 22, 333, 4444, 55555], \"b\": 0x1F, 'c': 1e-5}\n",
    "It's they'll I'M we'D can’t don´t O'Neill's 'tis 's's",
    "snake_case camelCase SCREAMING_CASE http://a.b/c?d=e&f=%20 --==>>!!...;;;",
    "Größe naïve Ångström İstanbul ıI ﬁ ß ẞ ſ",
    "Cafe\u0301 vs Café, a\u0300\u0301\u0302 Z\u0351\u036bA\u0343\u036aL\u0302\u0344G\u0354O",
    "Привет, мир! Γειά σου κόσμε. שלום עולם مرحبا بالعالم",
    "हिन्दी में परीक्षण ภาษาไทยไม่มีช่องว่าง",
    "中文分词测试，日本語のテキスト。カタカナ 한국어 텍스트",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 𝕳𝖊𝖑𝖑𝖔 𝄞 \U0010ffff",
    "zero\u200bwidth \u200d\u200e\u202e\u2066 nbsp\u00a0thin\u2009ideographic\u3000line\u2028para\u2029bom\ufeff",
    "\x00\x01\x1b[0m \x7f \ufffd\ufffe\uffff \ue000",
    "١٢٣٤ ४५६ ⅷ ½ ² ①②③ 1234567890 3.14159",
    "mojibake Ã©Ã¨ \\ud83d \\x80\\xff \\u0000",
    "<|endoftext|><s></s>[INST]<unk><pad> <|im_start|>",
    "a" * 1000 + " " * 1000 + "ab" * 300 + "\n" * 100 + "!" * 100,
)


class Encoder(ABC):
    """``encode`` gives uint32 ids (length,)."""

    name: str

    def __init__(self):
        self._start = _resident_bytes()

    @abstractmethod
    def encode(self, text: str) -> np.ndarray: ...

    def forget(self) -> None:
        """Drop what is remembered of earlier texts."""
        return

    def trim(self) -> None:
        """Give back memory where it has grown; called now and then."""
        if self._has_grown():
            give_back_freed_memory()  # of a long document, say
            if self._has_grown():
                self.forget()
                give_back_freed_memory()

    def _has_grown(self) -> bool:
        return _resident_bytes() - self._start > CACHE_BYTES


def fast_encoder(tokenizer: Tokenizer) -> tuple[Encoder, str | None]:
    """The fastest encoder for ``tokenizer``, and why it is no faster one; an ``EncoderTrial`` must still look at it."""
    if isinstance(tokenizer, ByteTokenizer):
        return _Bytes(), None
    try:
        import gigatoken
    except ImportError:
        return plain_encoder(tokenizer), "gigatoken is not installed (pip install gigatoken, some 30 times faster)"
    try:
        return _Gigatoken(tokenizer, gigatoken), None
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # for a tokenizer that it does not support; a panic in Rust is no Exception
        return plain_encoder(tokenizer), _unsupported(error)


def plain_encoder(tokenizer: Tokenizer) -> Encoder:
    """The encoder of the tokenizer's own package. ``UserError`` where that cannot load it."""
    return _Plain(tokenizer)


class Mistrusted(Exception):
    """Why an encoder is not to be used."""


class EncoderTrial:
    """Compares an encoder with the tokenizer's own package, on texts that are hard to split and on ``texts``.

    That package takes as long to load as 20 MB of text take to encode. A process of its own does it, from ``__enter__``
    on; meanwhile the encoder can be loaded, and used.
    """

    def __init__(self, tokenizer: Tokenizer, texts: Iterable[str], folder: Path):
        self.texts = [*HARD_TEXTS, *_mixtures(), *_spelled_out(tokenizer.added_tokens), *texts]
        self._reference = OrderedWorkers(
            ["the trial of the encoder"], partial(_encode_each, tokenizer, self.texts), 1, folder
        )
        self._expected: list[list[int]] | None = None
        self._trusted: Encoder | None = None

    def __enter__(self) -> "EncoderTrial":
        self._reference.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._reference.__exit__(*error)

    def require_trust(self, encoder: Encoder, wait: bool) -> None:
        """Raise ``Mistrusted`` where ``encoder`` gives other ids; without ``wait`` perhaps only at a later call."""
        if encoder is self._trusted:
            return
        if self._expected is None:
            if not (wait or self._reference.ready()):
                return
            [self._expected] = self._reference
        try:
            for text, ids in zip(self.texts, self._expected, strict=True):
                if encoder.encode(text).tolist() != ids:
                    raise Mistrusted(f"gigatoken {_version()} gives other tokens for {text[:40]!r}")
        except (KeyboardInterrupt, SystemExit, Mistrusted):
            raise
        except BaseException as error:  # as above
            raise Mistrusted(_unsupported(error)) from error
        self._trusted = encoder


def _encode_each(tokenizer: Tokenizer, texts: list[str], _: str) -> Iterator[list[list[int]]]:
    yield [tokenizer.encode(text) for text in texts]


class _Bytes(Encoder):
    name = "bytes"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint32)


class _Plain(Encoder):
    def __init__(self, tokenizer: Tokenizer):
        self._encode = tokenizer.encode
        tokenizer.encode("")  # loads it, before the workers are forked
        super().__init__()
        self.name = "sentencepiece" if isinstance(tokenizer, SentencePieceTokenizer) else "tokenizers"

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._encode(text), np.uint32)


class _Gigatoken(Encoder):
    def __init__(self, tokenizer: Tokenizer, gigatoken):
        self.name = "gigatoken"
        if isinstance(tokenizer, SentencePieceTokenizer):
            content = parse_json(gigatoken.Tokenizer.from_sentencepiece(tokenizer.model)._hf_json)
        else:
            content = parse_json(tokenizer.json) | {"truncation": None, "padding": None, "post_processor": None}
        added = content.get("added_tokens") or []
        # gigatoken always cuts at special tokens; without them it takes their names for text, as it should.
        content["added_tokens"] = [token for token in added if not token.get("special")]
        content = dump_json(content)
        self._load = lambda: gigatoken.Tokenizer.from_json(content).backend
        self._backend = self._load()
        super().__init__()

    def encode(self, text: str) -> np.ndarray:
        return self._backend.encode(text)

    def forget(self) -> None:
        self._backend = None
        self._backend = self._load()


def _mixtures() -> list[str]:
    """Pieces of the hard texts in random order, and characters of every block in front of and behind others."""
    rng = random.Random(0)
    starts = [(rng.choice(HARD_TEXTS), rng.randrange(1000)) for _ in range(4 * MIXTURES)]
    pieces = [text[start % (len(text) or 1) :][: rng.randint(1, 8)] for text, start in starts]
    mixed = ["".join(pieces[i : i + 4]) for i in range(0, len(pieces), 4)]
    characters = [chr(code) for code in EVERY_BLOCK if not 0xD800 <= code < 0xE000]
    return [*mixed, "".join(f"a{c}1 {c}" for c in characters)]


def _spelled_out(names: Sequence[str]) -> list[str]:
    """Texts that hold what a document must not be cut at, or must: each name inside of text and of spaces."""
    return [f"a{name}b {name}  {name}\n{name}{name.upper()}" for name in names[:1000]]


def _resident_bytes() -> int:
    """0 where the system does not tell (macOS): then nothing is trimmed."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def _unsupported(error: BaseException) -> str:
    return f"gigatoken {_version()} does not support this tokenizer ({' '.join(str(error).split())[:120]})"


def _version() -> str:
    from importlib.metadata import version

    return version("gigatoken")
