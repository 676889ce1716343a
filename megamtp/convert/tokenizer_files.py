"""The tokenizer's files of a model folder, fit for transformers."""

import json
import shutil
from pathlib import Path
from typing import Any

from megamtp.data.tokenizer import BYTES, END_OF_DOCUMENT, SentencePieceTokenizer, Tokenizer, load_tokenizer
from megamtp.errors import UserError

# What transformers saves of a tokenizer; nothing else in such a folder belongs to it.
FOLDER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)


def write_tokenizer(
    tokenizer: Path | str | None, folder: Path, *, vocab_size: int, eos_id: int | None, context: int | None
) -> list[str]:
    """Write the files into ``folder``; returns their names, none for ``tokenizer`` None.

    The files of a folder are copied as they are; what a lone file or ``bytes`` lacks is added. ``UserError`` for a
    tokenizer that is not there or has more tokens than ``vocab_size``.
    """
    if tokenizer is None:
        return []
    path = Path(tokenizer)
    if str(tokenizer) != BYTES and path.is_dir():
        names = [name for name in FOLDER_FILES if (path / name).is_file()]
        if not names:
            raise UserError(f"{path}: holds no tokenizer; give another with --tokenizer")
        for name in names:
            shutil.copyfile(path / name, folder / name)
        if "tokenizer_config.json" in names:
            return names
        loaded, name = load_tokenizer(path), names[0]
    else:
        loaded = load_tokenizer(tokenizer)
        name = "tokenizer.model" if path.suffix == ".model" else "tokenizer.json"
        if str(tokenizer) == BYTES:
            (folder / name).write_text(json.dumps(byte_level_tokenizer(), indent=2, ensure_ascii=False) + "\n")
        else:
            shutil.copyfile(path, folder / name)
        names = [name]
    if isinstance(loaded, SentencePieceTokenizer) and not _is_bpe(loaded):
        raise UserError(
            f"{tokenizer}: is a Unigram model, which transformers takes for BPE in a Llama's folder; "
            "convert it to a tokenizer.json and give that with --tokenizer"
        )
    if loaded.vocab_size > vocab_size:
        raise UserError(
            f"{tokenizer}: has {loaded.vocab_size} tokens, the model {vocab_size}; give its own with --tokenizer"
        )
    config = tokenizer_config(loaded, name, eos_id, context)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return [*names, "tokenizer_config.json"]


def tokenizer_config(tokenizer: Tokenizer, name: str, eos_id: int | None, context: int | None) -> dict[str, Any]:
    """Encode as in training: nothing is added at the ends of a text."""
    config: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    if name == "tokenizer.model":
        config |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "add_eos_token": False, "legacy": False}
    else:
        config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    if (eos := token_of_id(tokenizer, eos_id)) is not None:
        config["eos_token"] = eos
    if context is not None:
        config["model_max_length"] = context
    return config


def _is_bpe(tokenizer: SentencePieceTokenizer) -> bool:
    """Scores are minus the rank of a merge in BPE, and logarithms of probabilities in Unigram models."""
    scores = (tokenizer.processor.get_score(i) for i in range(tokenizer.vocab_size))
    return all(score == int(score) for score in scores)


def token_of_id(tokenizer: Tokenizer, token_id: int | None) -> str | None:
    """The token whose id is ``token_id``, of those that a tokenizer has beside plain text."""
    candidates = [tokenizer.default_eod, END_OF_DOCUMENT, *tokenizer.added_tokens]
    return next((t for t in candidates if t and token_id is not None and tokenizer.token_to_id(t) == token_id), None)


def byte_level_tokenizer() -> dict[str, Any]:
    """A ``tokenizer.json`` whose ids are the bytes, and 256 the end of a document: byte-level BPE without merges."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 256, "content": END_OF_DOCUMENT, **special}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {character: byte for byte, character in enumerate(_byte_characters())},
            "merges": [],
        },
    }


def _byte_characters() -> list[str]:
    """The visible character that stands for each byte in byte-level BPE (Radford et al. 2019).

    Bytes that are visible characters of Latin-1 stand for themselves, the others follow from U+0100 on.
    """
    visible = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in visible else chr(next(others)) for byte in range(256)]
