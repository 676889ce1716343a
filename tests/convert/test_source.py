"""Every kind of source gives the logical tensors, by any rows; what is no source is told in one line."""

import json
import random
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from megamtp.convert.formats import LLAMA, META, extra_head
from megamtp.convert.huggingface import from_llama_state_dict
from megamtp.convert.source import open_source
from megamtp.errors import UserError
from megamtp.model.model import build_model, logical_parameters
from megamtp.training.checkpoint import write_manifest
from tests.convert.models import config_of_run, foreign_llama, parameters_of, stripped, write_run


@pytest.fixture(scope="module")
def config():
    return config_of_run()


@pytest.fixture(scope="module")
def parameters(config):
    return parameters_of(config)


@pytest.fixture(scope="module")
def run_dir(config, parameters, tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("source") / "run", config, parameters)


def require_all(source, expected):
    """Every tensor, whole and in random ranges of rows."""
    draw = random.Random(0)
    assert set(source.names()) == set(expected) and len(source.names()) == len(expected)
    for name, value in expected.items():
        value = stripped(name, value, source.config)
        assert source.shape(name) == tuple(value.shape)
        assert torch.equal(source.tensor(name), value), name
        for _ in range(6):
            start, stop = sorted(draw.choices(range(len(value) + 1), k=2))
            assert torch.equal(source.rows(name, start, stop), value[start:stop]), (name, start, stop)
        with pytest.raises(IndexError):
            source.rows(name, 0, len(value) + 1)


def test_a_run_and_its_checkpoint(run_dir, config, parameters):
    source = open_source(run_dir)
    assert source.config == config
    require_all(source, parameters)
    assert (source.context, source.eos_id, source.tokenizer) == (16, 256, "bytes")
    assert source.facts["validation_loss_per_head"] == [2.5] * 4
    assert source.facts["tokens"] == 256 and source.facts["step"] == 2
    assert [data["name"] for data in source.facts["data"]] == ["train"]
    json.dumps(source.facts)
    checkpoint = open_source(run_dir / "checkpoints" / "step-00000002")
    require_all(checkpoint, parameters)
    assert checkpoint.facts == source.facts
    assert set(source.checksums()) == set((run_dir / "checkpoints/step-00000002").glob("*.safetensors"))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", ["50GB", "10KB"])
def test_a_foreign_llama(tmp_path, shards, tied):
    model = foreign_llama(tmp_path, torch.bfloat16, shards, tie_word_embeddings=tied)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "10KB")
    source = open_source(tmp_path)
    assert source.config.rope_theta == 5000.0 and source.config.n_layers == 3
    expected = from_llama_state_dict(model.state_dict(), source.config)
    require_all(source, expected)
    assert source.tensor("output.weight").dtype == torch.bfloat16
    assert torch.equal(source.tensor("output.weight"), source.tensor("tok_embeddings.weight")) == tied


@pytest.mark.parametrize("where", ["top level", "rope_parameters"])
def test_rope_theta_of_either_version_of_transformers(tmp_path, where):
    foreign_llama(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content.pop("rope_parameters", None)
    content |= {"rope_theta": 77.0} if where == "top level" else {"rope_parameters": {"rope_theta": 77.0}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert open_source(tmp_path).config.rope_theta == 77.0


def refusal(path) -> str:
    with pytest.raises(UserError) as caught:
        source = open_source(path)
        for name in source.names():
            source.tensor(name)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_folders_that_hold_no_model(tmp_path):
    assert "is not there" in refusal(tmp_path / "nothing")
    assert "no model here" in refusal(tmp_path)
    (tmp_path / "file").write_text("")
    assert "is no folder" in refusal(tmp_path / "file")
    (tmp_path / "checkpoints").mkdir()
    assert "no checkpoint yet" in refusal(tmp_path)
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "params.json").write_text("{}")
    assert "consolidated.pth" in refusal(tmp_path / "meta")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{")
    assert "config.json: cannot be read" in refusal(tmp_path / "hf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_type is 'llama3'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is 'linear'"),
        ({"head_dim": 8}, "head_dim is 8"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": "x"}, "hidden_size is 'x'"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_hidden_layers": 4}, "lacks model.layers.3"),
        ({"num_hidden_layers": 2}, "unknown tensor model.layers.2"),
        ({"vocab_size": 49}, "has shape"),
        ({"num_key_value_heads": 4}, "has shape"),
        ({"n_future_tokens": 2}, "extra_heads.safetensors: is missing"),
        ({"n_future_tokens": "4"}, "n_future_tokens is '4'"),
        ({"num_hidden_layers": 1}, "n_future_tokens 1 must be smaller than n_layers 1"),
        ({"rope_parameters": [1]}, "no mapping"),
    ],
)
def test_llamas_that_are_not_supported(tmp_path, change, message):
    foreign_llama(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | change))
    assert re.search(message, text := refusal(tmp_path)), text
    assert str(tmp_path) in text


@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "vocab_size", "intermediate_size"])
def test_a_config_that_lacks_something(tmp_path, key):
    foreign_llama(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    del content[key]
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert f"{key} is None" in refusal(tmp_path)


def test_weights_that_are_not_whole(tmp_path):
    foreign_llama(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for cut in (len(whole) - 1, 2000, 100, 8, 3, 0):
        file.write_bytes(whole[:cut])
        assert str(file) in refusal(tmp_path), cut
    file.write_bytes(whole + b"\0")
    assert "its header speaks of" in refusal(tmp_path)
    file.write_bytes(b"\xff" * 100)
    assert str(file) in refusal(tmp_path)
    state = load_file_bytes(whole, tmp_path)
    save_file(state | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(16)}, file)
    assert "unknown tensor model.layers.0.self_attn.q_proj.bias" in refusal(tmp_path)
    save_file(state | {"model.norm.weight": torch.zeros(16, dtype=torch.int8)}, file)
    assert "stored as I8" in refusal(tmp_path)
    file.unlink()
    assert "save the weights as safetensors" in refusal(tmp_path)


def load_file_bytes(content: bytes, folder):
    (folder / "copy.bin").write_bytes(content)
    return load_file(folder / "copy.bin")


def test_an_index_that_names_what_is_not_there(tmp_path):
    foreign_llama(tmp_path, shard_size="10KB")
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    index["weight_map"]["model.extra.weight"] = first
    file.write_text(json.dumps(index))
    assert "lacks model.extra.weight" in refusal(tmp_path)
    (tmp_path / first).unlink()
    assert f"{tmp_path / first}: cannot be read" in refusal(tmp_path)
    file.write_text("{}")
    assert "has no weight_map" in refusal(tmp_path)


def test_checkpoints_that_are_not_whole(tmp_path, config, parameters):
    run_dir = write_run(tmp_path / "run", config, parameters)
    folder = run_dir / "checkpoints" / "step-00000002"
    manifest = json.loads((folder / "manifest.json").read_text())
    lost = json.loads(json.dumps(manifest))
    name = next(name for name, tensor in manifest["tensors"].items() if len(tensor["pieces"]) > 1)
    del lost["tensors"][name]["pieces"][-1]
    write_manifest(folder, lost)
    assert "not wholly there" in refusal(run_dir)
    del lost["tensors"][name]
    write_manifest(folder, lost)
    assert f"{name} is missing" in refusal(run_dir)
    write_manifest(folder, manifest)
    file = folder / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{file}: has" in refusal(run_dir)


def test_names_of_a_format_are_distinct_and_all_there(config, parameters):
    names = META.names(config)
    assert set(names) == set(parameters) and len(set(names.values())) == len(names)
    assert names["heads.0.attention.wq.weight"] == "layers.2.attention.wq.weight"
    assert names["heads.3.ffn_norm.weight"] == "extra_heads.2.ffn_norm.weight"


def test_unembeddings_of_their_own_have_a_place_in_hugging_faces_format_alone():
    config = config_of_run(replicated_unembedding=True)
    names = LLAMA.names(config)
    assert set(names) == {name for name, _ in logical_parameters(build_model(config, seed=None))}
    theirs = ["lm_head.weight", *(f"extra_lm_heads.{j}.weight" for j in range(3))]
    assert [names[f"output.{k}.weight"] for k in range(4)] == theirs
    assert [extra_head(f"output.{k}.weight") for k in range(4)] == [False, True, True, True]
    with pytest.raises(UserError, match="a format with one unembedding cannot hold 4; export to Hugging Face's"):
        META.names(config)


def test_nothing_heavy_is_imported(run_dir):
    code = (
        f"import sys; from megamtp.convert.source import open_source; open_source({str(run_dir)!r}).facts; "
        "print([name for name in ('deepspeed', 'transformers', 'torch.utils.tensorboard') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
