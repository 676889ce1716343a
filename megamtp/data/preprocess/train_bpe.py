"""A byte-level BPE tokenizer (Sennrich et al. 2016; bytes as in GPT-2), trained from text."""

from collections.abc import Iterable
from pathlib import Path

from megamtp.data.tokenizer import END_OF_DOCUMENT
from megamtp.errors import UserError
from megamtp.files import write_atomic

# The split of Llama 3: indentation stays in one piece, numbers go in groups of three digits.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path | str) -> int:
    """Train on ``texts``, save ``path`` (a ``tokenizer.json``), return the size of the vocabulary reached.

    Id 0 is ``END_OF_DOCUMENT``, ids 1..256 are the bytes, so every text can be encoded. The same texts give the
    same file. The size stays below ``vocab_size`` when the texts have no pair left to merge.
    Raises ``UserError`` when ``vocab_size`` is below 257.
    """
    try:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise UserError("training a tokenizer needs the package tokenizers; pip install tokenizers") from None
    if vocab_size < 257:
        raise UserError(f"vocab_size {vocab_size} is too small: 256 bytes and {END_OF_DOCUMENT} need 257")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    write_atomic(Path(path), tokenizer.to_str(pretty=True).encode())
    return tokenizer.get_vocab_size()
