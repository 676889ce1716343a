"""What was trained in any layout is, exported, the same model in stock transformers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megamtp.convert.export import export, parse_size
from megamtp.convert.formats import LLAMA, extra_head
from megamtp.data.tokenizer import load_tokenizer
from megamtp.errors import UserError
from megamtp.model.model import build_model, logical_parameters
from megamtp.model.transformer import ModelConfig
from tests.convert.models import config_of_run, parameters_of, stripped, write_run
from tests.distributed import run_ranks
from tests.training.tiny import newest, run_config, run_training, tensors, write_corpus

ONE_HEAD = {"model.n_layers": 3, "model.n_future_tokens": 1}
LAYOUTS = {
    "one rank": (1, {}),
    "one head, TP 2": (2, ONE_HEAD | {"parallel.tensor": 2}),
    "TP 2 x PP 2": (4, {"parallel.tensor": 2, "parallel.pipeline": 2}),
    "PP 2, ZeRO-1, bf16": (2, {"parallel.pipeline": 2, "parallel.zero_stage": 1, "training.precision": "bf16"}),
    "DP 2, ZeRO-1, bf16": (2, {"parallel.zero_stage": 1, "training.precision": "bf16"}),
    "TP 2, DP 2, ZeRO-3": (4, {"parallel.tensor": 2, "parallel.zero_stage": 3}),
    "an unembedding for each head, TP 2": (2, {"parallel.tensor": 2, "model.replicated_unembedding": True}),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "train", 60, seed=0)
    write_corpus(folder / "validation", 15, seed=1)
    return folder


@pytest.fixture(scope="module", params=LAYOUTS)
def trained(request, corpus, tmp_path_factory) -> Path:
    world_size, changes = LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp("trained")
    changes = changes | {"training.steps": 2, "optimizer.lr": 0.02, "model.init_std": 0.1}
    run_ranks(world_size, run_training, run_config(folder, corpus, changes))
    return folder


def our_model(config: ModelConfig, parameters: dict[str, torch.Tensor]):
    model = build_model(config, seed=None).requires_grad_(False)
    for name, parameter in logical_parameters(model):
        parameter.copy_(parameters[name])
    return model


def load_plain(folder: Path):
    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not any(told.values()), told
    return model.eval()


@torch.no_grad()
def test_logits_are_those_of_the_training_model(trained, tmp_path):
    export(trained, tmp_path / "out", dtype=torch.float32)
    checkpoint = newest(trained)
    config, parameters = ModelConfig(**checkpoint.manifest["model"]), tensors(checkpoint)
    tokens = torch.randint(config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    ours = our_model(config, parameters)(tokens)[0][..., : config.vocab_size]
    theirs = load_plain(tmp_path / "out")(tokens).logits
    assert ours.std() > 0.05
    assert (ours - theirs).abs().max() < 1e-5
    # The other heads, each in the place of the last layer.
    if config.n_future_tokens > 1:
        extra = load_file(tmp_path / "out" / "extra_heads.safetensors")
        model = load_plain(tmp_path / "out")
        for j in range(config.n_future_tokens - 1):
            prefix = f"extra_heads.{j}."
            state = {name.removeprefix(prefix): t for name, t in extra.items() if name.startswith(prefix)}
            model.model.layers[-1].load_state_dict(state)
            if config.replicated_unembedding:
                model.lm_head.weight = torch.nn.Parameter(extra[f"extra_lm_heads.{j}.weight"])
            ours = our_model(config, parameters)(tokens)[j + 1][..., : config.vocab_size]
            assert (ours - model(tokens).logits).abs().max() < 1e-5


def test_half_precision_is_the_masters_cast_bit_for_bit(trained, tmp_path):
    checkpoint = newest(trained)
    config, masters = ModelConfig(**checkpoint.manifest["model"]), tensors(checkpoint)
    for dtype in (torch.bfloat16, torch.float16):
        export(trained, tmp_path / str(dtype), dtype=dtype)
        exported = {k: v for file in (tmp_path / str(dtype)).glob("*.safetensors") for k, v in load_file(file).items()}
        names = LLAMA.names(config)
        assert set(exported) == set(names.values())
        for name, theirs in names.items():
            wanted = stripped(name, masters[name], config).to(dtype)
            assert exported[theirs].dtype == dtype
            assert torch.equal(exported[theirs].view(torch.int16), wanted.view(torch.int16)), name


# --- what is in the folder


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    config = config_of_run(vocab_size=257, vocab_multiple=64)
    return write_run(tmp_path_factory.mktemp("run") / "run", config, parameters_of(config))


@pytest.fixture(scope="module")
def exported(run_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "out"
    export(run_dir, out, shard_bytes=10_000)
    return out


def test_files(exported):
    shards = sorted(path.name for path in exported.glob("model-*"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    small = "README.md config.json generation_config.json megamtp.json model.safetensors.index.json tokenizer.json "
    small += "tokenizer_config.json extra_heads.safetensors modeling_megamtp.py"
    assert {path.name for path in exported.iterdir()} == {*shards, *small.split()}
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    held = {}
    for name in shards:
        state = load_file(exported / name)
        assert sum(value.nbytes for value in state.values()) <= 10_000
        held |= dict.fromkeys(state, name)
    assert held == index["weight_map"]
    extra = load_file(exported / "extra_heads.safetensors")
    config = config_of_run()
    assert set(extra) == {theirs for name, theirs in LLAMA.names(config).items() if extra_head(name)}
    assert not set(extra) & set(held)


def test_remote_code_is_copied_as_it_is(exported):
    import megamtp.convert.export as module

    assert (exported / "modeling_megamtp.py").read_bytes() == module.REMOTE_CODE.read_bytes()
    config = json.loads((exported / "config.json").read_text())
    assert config["n_future_tokens"] == 4 and config["architectures"] == ["LlamaForCausalLM"]
    assert config["auto_map"] == {"AutoModelForCausalLM": "modeling_megamtp.MultiTokenLlamaForCausalLM"}


def test_one_head_is_a_plain_llama_and_nothing_else(tmp_path):
    config = config_of_run(n_layers=3, n_future_tokens=1)
    run_dir = write_run(tmp_path / "run", config, parameters_of(config))
    # 50 tokens: no tokenizer of bytes fits.
    text = (run_dir / "config.yaml").read_text().replace("tokenizer: bytes", "tokenizer: null")
    (run_dir / "config.yaml").write_text(text)
    export(run_dir, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not names & {"extra_heads.safetensors", "modeling_megamtp.py"}
    assert not {"auto_map", "n_future_tokens"} & set(json.loads((tmp_path / "out" / "config.json").read_text()))
    assert "model.safetensors.index.json" in names
    load_plain(tmp_path / "out")


def test_the_card_states_the_facts(exported):
    card = (exported / "README.md").read_text()
    for fact in ("4 heads", "6: 2 in the trunk + 4 heads", "257", "2 of 20", "128 tokens: 8 x 16", "0.003 after 2"):
        assert fact in card
    assert "| 4 | 2.5000 | 0.2500 |" in card and "trust_remote_code=True" in card and "4.57 or newer" in card
    size = sum(t.numel() for file in exported.glob("*.safetensors") for t in load_file(file).values())
    assert f"{size:,}" in card
    assert "/tmp" not in card and "/tmp" not in (exported / "megamtp.json").read_text()


def test_bytes_as_a_tokenizer_of_transformers(exported):
    theirs, ours = AutoTokenizer.from_pretrained(exported), load_tokenizer(exported)
    raw = load_tokenizer("bytes")
    everything = "".join(map(chr, range(0x250))) + "  def f():\n\treturn '\u4e2d\U0001f600' \r\n\n  "
    for text in (everything, "", " ", "a<|endoftext|", "\n\n\n"):
        assert theirs(text)["input_ids"] == ours.encode(text) == raw.encode(text) == list(text.encode())
        assert theirs.decode(raw.encode(text)) == text
    assert len(theirs) == 257 and theirs.eos_token_id == 256 and theirs.eos_token == "<|endoftext|>"
    assert theirs.model_max_length == 16
    assert theirs.decode([104, 256, 105]) == "h<|endoftext|>i"
    assert [theirs.convert_tokens_to_ids(token) for token in theirs.convert_ids_to_tokens(range(257))] == [*range(257)]


def test_generation_ends_at_the_end_of_a_document(exported):
    model = load_plain(exported)
    assert model.generation_config.eos_token_id == 256 and model.generation_config.bos_token_id is None
    assert model.config.eos_token_id == 256 and model.config.max_position_embeddings == 16
    assert model.dtype == torch.bfloat16


def test_a_tokenizer_file_and_a_folder(run_dir, exported, tmp_path):
    file = exported / "tokenizer.json"
    export(run_dir, tmp_path / "file", tokenizer=file)
    assert (tmp_path / "file" / "tokenizer.json").read_bytes() == file.read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "file").eos_token_id == 256
    folder = tmp_path / "folder"
    AutoTokenizer.from_pretrained(exported).save_pretrained(folder)
    (folder / "notes.txt").write_text("of no concern")
    export(run_dir, tmp_path / "copy", tokenizer=folder)
    copied = {path.name for path in folder.iterdir()} - {"notes.txt"}
    assert copied
    for name in copied:
        assert (tmp_path / "copy" / name).read_bytes() == (folder / name).read_bytes()
    assert not (tmp_path / "copy" / "notes.txt").exists()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_sentencepiece_model(run_dir, tmp_path, kind):
    sentencepiece = pytest.importorskip("sentencepiece")
    text = tmp_path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    options = {"vocab_size": 60, "hard_vocab_limit": kind == "bpe", "minloglevel": 2, "model_type": kind}
    sentencepiece.SentencePieceTrainer.train(input=str(text), model_prefix=str(tmp_path / "sp"), **options)
    if kind == "unigram":
        with pytest.raises(UserError, match="is a Unigram model"):
            export(run_dir, tmp_path / "out", tokenizer=tmp_path / "sp.model")
        return
    export(run_dir, tmp_path / "out", tokenizer=tmp_path / "sp.model")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (tmp_path / "sp.model").read_bytes()
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "out"), load_tokenizer(tmp_path / "sp.model")
    for sentence in ("the lazy dog", "over the fox jumps quick"):
        assert theirs(sentence)["input_ids"] == ours.encode(sentence)


def test_a_tokenizer_that_does_not_fit(run_dir, exported, tmp_path):
    config = config_of_run()
    small = write_run(tmp_path / "run", config, parameters_of(config))
    with pytest.raises(UserError, match="has 257 tokens, the model 50"):
        export(small, tmp_path / "out", tokenizer=exported / "tokenizer.json")
    with pytest.raises(UserError, match="no such tokenizer"):
        export(run_dir, tmp_path / "out", tokenizer=tmp_path / "nothing.json")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == []


@pytest.mark.parametrize(("text", "size"), [("4GB", 4 * 10**9), ("500mb", 5 * 10**8), ("1.5 KB", 1500), ("7", 7)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "4 TBB", "1e9"])
def test_what_is_no_size(text):
    with pytest.raises(UserError, match="--shard-size"):
        parse_size(text)
