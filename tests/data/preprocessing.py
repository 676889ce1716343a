"""What the tests of the text pipeline share: texts, tokenizers of every kind, the command as a process."""

import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

from megamtp.data.manifest import Manifest
from megamtp.data.preprocess.encoder import HARD_TEXTS, Encoder, EncoderTrial, Mistrusted, fast_encoder, plain_encoder
from megamtp.data.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, str(ROOT / "tools" / "preprocess_data.py")]
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "OMPI_", "PMI", "MPI_", "SLURM_")  # names start so
SUFFIXES = (".bin", ".idx", ".json")

TEXTS = [
    "def f(x):\n    return x + 1\n",
    "",
    "Grüße, 世界 🙂\u2028next\r\n\ttabs  and   spaces ",
    "spelled out <|endoftext|> in the middle</s><s>",
    "x" * 300,
    " begins with a space",
    "\x00 \ufffd \ufffe mojibake Ã©",
    *(f"line {i}: value = {i * i}\n" for i in range(40)),
]


def python_sources() -> list[str]:
    """Some 3 MB of text: the top level of the standard library."""
    folder = Path(os.__file__).parent
    return [path.read_text(errors="replace") for path in sorted(folder.glob("*.py"))]


def choose_encoder(tokenizer: Tokenizer, texts: list[str]) -> tuple[Encoder, str | None]:
    """What ``preprocess`` ends up with on an input that begins with ``texts``, and why it is not the fastest."""
    with EncoderTrial(tokenizer, texts, Path(tempfile.gettempdir())) as trial:
        encoder, reason = fast_encoder(tokenizer)
        try:
            trial.require_trust(encoder, wait=True)
        except Mistrusted as mistrusted:
            return plain_encoder(tokenizer), str(mistrusted)
    return encoder, reason


def jsonl(texts, key: str = "text", ensure_ascii: bool = False) -> bytes:
    return "".join(json.dumps({"id": 1, key: text}, ensure_ascii=ensure_ascii) + "\n" for text in texts).encode()


def contents(prefix: Path | str) -> dict[str, bytes]:
    """What the three files of a data set hold."""
    return {suffix: Path(f"{prefix}{suffix}").read_bytes() for suffix in SUFFIXES}


def check_whole(prefix: Path | str) -> Manifest:
    """The manifest of a data set, all of whose checksums were compared."""
    manifest = Manifest.read(prefix)
    for index in range(manifest.n_checks()):
        manifest.check(prefix, index)
    return manifest


def environment() -> dict[str, str]:
    """This process's, without what a launcher has set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHED)}
    return kept | {"PYTHONPATH": str(ROOT)}


def run_command(*arguments: Path | str, timeout: float = 60) -> subprocess.CompletedProcess:
    """tools/preprocess_data.py as a process of its own."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], env=environment(), capture_output=True, text=True, timeout=timeout
    )


def processes_with(argument: str) -> list[psutil.Process]:
    """Those that have ``argument`` on their command line; forked workers have their parent's."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(argument in word for word in process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            pass  # it has ended
    return found


# --- tokenizers, of 1000 to 2000 tokens: the sources of some modules and the texts that are hard to split


def training_texts() -> list[str]:
    return python_sources()[:40] + [*HARD_TEXTS, *TEXTS] * 3


def save_gpt2(folder: Path) -> None:
    """GPT-2's kind: ``gpt2.json`` and the folder ``gpt2`` with vocab.json and merges.txt, as it was published."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(), trainer)
    tokenizer.save(str(folder / "gpt2.json"))
    (folder / "gpt2").mkdir()
    tokenizer.model.save(str(folder / "gpt2"))
    config = {"tokenizer_class": "GPT2Tokenizer", **dict.fromkeys(("eos_token", "unk_token"), "<|endoftext|>")}
    (folder / "gpt2" / "tokenizer_config.json").write_text(json.dumps(config))


def save_llama(folder: Path) -> None:
    """Llama 2's kind: the folder ``llama`` with tokenizer.model, and ``llama.json``, converted the legacy way."""
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in training_texts() for line in text.splitlines() if line.strip("\0 \t")),
        model_writer=model,
        model_type="bpe",
        vocab_size=2000,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
    )
    (folder / "llama").mkdir()
    (folder / "llama" / "tokenizer.model").write_bytes(model.getvalue())
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "llama" / "tokenizer_config.json").write_text(json.dumps(config))

    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocab = {processor.id_to_piece(i): i for i in range(processor.vocab_size())}
    # A merge for each way to cut a piece in two; first those of the pieces that were learnt first.
    pieces = [piece for piece, i in vocab.items() if i >= 3 and not processor.is_byte(i)]
    pieces.sort(key=lambda piece: -processor.get_score(vocab[piece]))
    cuts = [(piece[:i], piece[i:]) for piece in pieces for i in range(1, len(piece))]
    merges = [(left, right) for left, right in cuts if left in vocab and right in vocab]
    bpe = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True, ignore_merges=False)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    tokenizer.save(str(folder / "llama.json"))
