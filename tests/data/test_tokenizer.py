"""Ids are those of ``transformers``, whatever the kind of the tokenizer and whatever encodes."""

import json
import random
import sys

import numpy as np
import pytest

pytest.importorskip("tokenizers")
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from megamtp.data.preprocess.encoder import EVERY_BLOCK, HARD_TEXTS
from megamtp.data.preprocess.train_bpe import train_bpe
from megamtp.data.tokenizer import fingerprint, load_tokenizer
from megamtp.errors import UserError
from tests.data.preprocessing import TEXTS, choose_encoder, python_sources, save_gpt2, save_llama, training_texts

EOS = {"__type": "AddedToken", "content": "<|im_end|>", "special": True}  # as transformers has long written it
KINDS = ("ours.json", "gpt2.json", "llama.json", "gpt2", "saved", "flags.json")
PIECES = [
    *("a", "B", "1", "234", " ", "  ", "\n", "\r\n", "\t", "'s", "'ſ", "’", "é", "e\u0301", "中", "한", "👍", "\u200d"),
    *("\xa0", "\u3000", "\x00", "\ufffd", "\ufdd0", ".", "!!", "_", "<s>", "</s>", "<unk>", "<|endoftext|>", "<0x0A>"),
    *(
        "▁",
        "İ",
        "\x85",
        "\x0b",
        "٣",
        "½",
        "Ⅷ",
        "ǅ",
        "\u0300",
        "ः",
        "\ufeff",
        "<tool>",
        "<tool> ",
        "<TOOL>",
        "Ã©",
        "\\ud83d",
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every kind of tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizers")
    train_bpe(training_texts(), 1500, folder / "ours.json")
    save_gpt2(folder)
    save_llama(folder)
    # Tokens of a chat fine-tuning, some special and some not.
    tokenizer = Tokenizer.from_file(str(folder / "ours.json"))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), "\n\n\n\n"])
    tokenizer.save(str(folder / "flags.json"))
    # A folder as transformers saves it; it names the end of documents itself.
    (folder / "saved").mkdir()
    tokenizer.save(str(folder / "saved" / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS}
    (folder / "saved" / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def texts():
    rng = random.Random(0)
    mixed = ["".join(rng.choices(PIECES, k=rng.randint(1, 30))) for _ in range(1000)]
    every = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    characters = ["".join(f"a{c}1{c} {c}\n" for c in every[i : i + 64]) for i in range(0, len(every), 64)]
    return [*HARD_TEXTS, *TEXTS, *python_sources()[:12], *mixed, *rng.sample(characters, 300)]


@pytest.fixture(params=["gigatoken", "without gigatoken"])
def encoder_of(request, monkeypatch):
    """``choose_encoder``'s, of which the fastest is asserted, or that of a machine without gigatoken."""
    if request.param == "gigatoken":
        pytest.importorskip("gigatoken")
    else:
        monkeypatch.setitem(sys.modules, "gigatoken", None)

    def choose(tokenizer):
        encoder, reason = choose_encoder(tokenizer, [])
        if request.param == "gigatoken":
            assert encoder.name == "gigatoken" and reason is None, reason
        else:
            assert encoder.name != "gigatoken" and "gigatoken is not installed" in reason
        return encoder

    return choose


def differences(encoder, texts, expected) -> list[str]:
    found = [encoder.encode(text) for text in texts]
    assert all(ids.dtype == np.uint32 and ids.ndim == 1 for ids in found)
    return [text for text, ids, other in zip(texts, found, expected, strict=True) if ids.tolist() != other]


@pytest.fixture(scope="module")
def transformers_ids(folder, texts):
    """kind -> (ids of the texts, the end of documents), computed once."""
    transformers = pytest.importorskip("transformers")
    computed = {}

    def ids(kind):
        if kind not in computed:
            path = folder / kind
            load = transformers.AutoTokenizer.from_pretrained
            reference = load(path) if path.is_dir() else transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
            options = {"add_special_tokens": False, "split_special_tokens": True}
            computed[kind] = [reference.encode(text, **options) for text in texts], reference.eos_token
        return computed[kind]

    return ids


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_transformers(kind, folder, texts, encoder_of, transformers_ids):
    expected, eos = transformers_ids(kind)
    tokenizer = load_tokenizer(folder / kind)
    assert not differences(encoder_of(tokenizer), texts, expected)
    assert [tokenizer.encode(text) for text in texts[:20]] == expected[:20]
    assert tokenizer.vocab_size > max(map(max, filter(None, expected)))
    if eos:
        assert tokenizer.eod() == (eos, tokenizer.token_to_id(eos))


def test_ids_of_a_sentencepiece_model(folder, texts, encoder_of, transformers_ids):
    """They are sentencepiece's; transformers differs for a text that begins with a space, and only there."""
    sentencepiece = pytest.importorskip("sentencepiece")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "llama" / "tokenizer.model"))
    for path in (folder / "llama", folder / "llama" / "tokenizer.model"):
        tokenizer = load_tokenizer(path)
        assert not differences(encoder_of(tokenizer), texts, [processor.encode(text) for text in texts])
        assert tokenizer.eod() == ("</s>", 2) and tokenizer.vocab_size == processor.vocab_size() == 2000
    assert tokenizer.decode(tokenizer.encode("Grüße 世界\n  x")) == "Grüße 世界\n  x"
    expected, _ = transformers_ids("llama")
    differing = differences(encoder_of(tokenizer), texts, expected)
    assert {text[0] for text in differing} <= {" ", "▁"}
    spaced = [(text[1:], ids) for text, ids in zip(texts, expected, strict=True) if text[:1] == " " and text.strip()]
    assert len(spaced) > 20 and not differences(encoder_of(tokenizer), *zip(*spaced, strict=True))


def test_bytes():
    tokenizer = load_tokenizer("bytes")
    encoder, reason = choose_encoder(tokenizer, [])
    assert (encoder.name, reason) == ("bytes", None)
    texts = [*HARD_TEXTS, *TEXTS]
    assert not differences(encoder, texts, [list(text.encode()) for text in texts])
    assert tokenizer.eod() == ("<|endoftext|>", 256) and tokenizer.vocab_size == 257
    assert tokenizer.decode([*"é".encode(), 256, 104]) == "é<|endoftext|>h"


@pytest.mark.parametrize("kind", [*KINDS, "llama"])
def test_decoding_gives_the_text_back(kind, folder):
    tokenizer = load_tokenizer(folder / kind)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("megabytes", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_a_long_document(megabytes, folder):
    pytest.importorskip("gigatoken")
    tokenizer = load_tokenizer(folder / "ours.json")
    encoder, _ = choose_encoder(tokenizer, [])
    sources = "".join(python_sources())
    text = (sources * (megabytes * 10**6 // len(sources) + 1))[: megabytes * 10**6]
    assert encoder.name == "gigatoken" and encoder.encode(text).tolist() == tokenizer.encode(text)


# --- which encoder is chosen


class OtherIds:
    """A gigatoken that gives other ids for texts that hold ``text``."""

    def __init__(self, monkeypatch, text: str):
        import gigatoken

        load = gigatoken.Tokenizer.from_json

        class Backend:
            def __init__(self, content):
                self.true = load(content).backend

            def encode(self, given):
                ids = self.true.encode(given)
                return ids[::-1] if text in given and len(ids) > 1 else ids

        class Loaded:
            def __init__(self, content):
                self.backend = Backend(content)

        monkeypatch.setattr(gigatoken.Tokenizer, "from_json", Loaded)


@pytest.mark.parametrize("text", ["ﬁ", "<|im_start|>", chr(EVERY_BLOCK[-999]), "only in the input", "\r\n"])
def test_other_ids_are_noticed(text, folder, monkeypatch):
    pytest.importorskip("gigatoken")
    OtherIds(monkeypatch, text)
    tokenizer = load_tokenizer(folder / "flags.json")
    encoder, reason = choose_encoder(tokenizer, ["", "it is only in the input"])
    assert encoder.name == "tokenizers" and "gives other tokens for" in reason and "\n" not in reason
    assert encoder.encode(text).tolist() == tokenizer.encode(text)


TOOL = {"id": 1500, "content": "<tool>", "special": False} | dict.fromkeys(("single_word", "normalized"), False)
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(
    "change, name",
    [
        (lambda file: file["model"].update(ignore_merges=True), "gigatoken"),  # as Llama 3
        (lambda file: file["added_tokens"].append(TOOL | {"lstrip": True, "rstrip": True}), "gigatoken"),
        (
            lambda file: file["added_tokens"].append(TOOL | {"lstrip": False, "rstrip": False, "single_word": True}),
            None,
        ),
        (lambda file: file.update(normalizer={"type": "NFC"}), "gigatoken"),  # as Qwen
        (lambda file: file.update(normalizer={"type": "NFKC"}), None),
        (lambda file: file.update(pre_tokenizer=BYTE_LEVEL), "gigatoken"),
        (lambda file: file.update(pre_tokenizer=BYTE_LEVEL | {"use_regex": False}), None),
        (lambda file: file.update(pre_tokenizer={"type": "Whitespace"}), None),
    ],
)
def test_variants_are_encoded_right_or_left_alone(change, name, folder, texts, tmp_path):
    """``name`` is who has to encode it; with None it is whoever is right."""
    pytest.importorskip("gigatoken")
    file = json.loads((folder / "ours.json").read_text())
    change(file)
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    encoder, reason = choose_encoder(tokenizer, [])
    assert encoder.name == (name or encoder.name) and (encoder.name == "gigatoken") == (reason is None)
    texts = [text for text in texts if len(text) < 5000]
    assert not differences(encoder, texts, [tokenizer.encode(text) for text in texts])


def test_a_panic_in_gigatoken_is_survived(folder, monkeypatch):
    gigatoken = pytest.importorskip("gigatoken")

    class PanicException(BaseException):  # pyo3's is no Exception either
        pass

    def panic(content):
        raise PanicException("index out of\nbounds")

    monkeypatch.setattr(gigatoken.Tokenizer, "from_json", panic)
    encoder, reason = choose_encoder(load_tokenizer(folder / "ours.json"), [])
    assert encoder.name == "tokenizers" and reason.endswith("does not support this tokenizer (index out of bounds)")


@pytest.mark.parametrize("kind", ["WordPiece", "Unigram", "lowercase"])
def test_unsupported_tokenizers_take_the_way_that_works(kind, tmp_path):
    pytest.importorskip("gigatoken")
    if kind == "WordPiece":
        tokenizer, trainer = Tokenizer(models.WordPiece(unk_token="<unk>")), trainers.WordPieceTrainer
    elif kind == "Unigram":
        tokenizer, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer
    else:
        tokenizer, trainer = Tokenizer(models.BPE(unk_token="<unk>")), trainers.BpeTrainer
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"special_tokens": ["<unk>"], "show_progress": False}
    options = special | ({"unk_token": "<unk>"} if kind == "Unigram" else {})
    tokenizer.train_from_iterator(TEXTS, trainer(vocab_size=300, **options))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    encoder, reason = choose_encoder(loaded, [])
    assert encoder.name == "tokenizers" and reason.startswith("gigatoken ") and "\n" not in reason
    texts = [*TEXTS, *HARD_TEXTS]
    tokenizer.encode_special_tokens = True
    expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert not differences(encoder, texts, expected)


# --- loading


def test_truncation_and_padding_saved_in_the_tokenizer_are_dropped(folder, tmp_path, encoder_of):
    tokenizer = Tokenizer.from_file(str(folder / "ours.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "cut.json"))
    whole, cut = (load_tokenizer(path) for path in (folder / "ours.json", tmp_path / "cut.json"))
    texts = [*TEXTS, "a longer text of more than four tokens"]
    assert not differences(encoder_of(cut), texts, [whole.encode(text) for text in texts])


@pytest.mark.parametrize("kind", [*KINDS, "llama", "bytes"])
def test_fingerprint_without_loading(kind, folder):
    path = "bytes" if kind == "bytes" else folder / kind
    assert fingerprint(path) == load_tokenizer(path).fingerprint


def test_the_end_of_documents(folder):
    assert load_tokenizer(folder / "saved").eod() == ("<|im_end|>", 1501)
    assert load_tokenizer(folder / "saved").eod("<|endoftext|>") == ("<|endoftext|>", 0)
    with pytest.raises(UserError, match="has no token '<eos>'"):
        load_tokenizer(folder / "saved").eod("<eos>")
    with pytest.raises(UserError, match="name one with --eod"):
        load_tokenizer(folder / "llama.json").eod()
    with pytest.raises(UserError, match="has no token '<eos>'"):
        load_tokenizer(folder / "llama").eod("<eos>")


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("tokenizer.json", None, "no such tokenizer"),
        ("tokenizer.json", "{}", "not a tokenizer.json"),
        ("tokenizer.json", "\xff", "not a tokenizer.json"),
        ("x.model", "no model", "not a SentencePiece model"),
        ("folder/notes.txt", "", "no tokenizer.json, tokenizer.model or tokenizer_config.json"),
        ("folder/tokenizer_config.json", "{}", "cannot be turned into a tokenizer.json"),
    ],
)
def test_bad_tokenizer(tmp_path, name, content, expected):
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    with pytest.raises(UserError, match=expected) as error:
        load_tokenizer(path.parent if path.parent.name == "folder" else path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_bad_tokenizer_config(folder, tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes((folder / "ours.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(UserError, match="tokenizer_config.json: cannot be read"):
        load_tokenizer(tmp_path)


def test_train_bpe(tmp_path):
    assert train_bpe(TEXTS, 300, tmp_path / "a.json") == 300
    assert train_bpe(iter(TEXTS), 300, tmp_path / "b.json") == 300
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2
    tokenizer = Tokenizer.from_file(str(tmp_path / "a.json"))
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    unseen = "".join(map(chr, range(0x100))) + "日本語 𝄞 \x00"
    assert tokenizer.decode(tokenizer.encode(unseen).ids) == unseen
    assert train_bpe(["ab"], 1000, tmp_path / "small.json") == 258
    with pytest.raises(UserError, match="need 257"):
        train_bpe(TEXTS, 256, tmp_path / "c.json")
