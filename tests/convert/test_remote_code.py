"""The exported folder in transformers: loading, logits, training, saving."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from megamtp.model.model import logical_parameters
from tests.convert.remote import CODE, load, make, padded, random_tokens
from tests.model.llama import head_config, llama


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("attention", "replicated"),
    [("sdpa", False), ("eager", False), ("sdpa", True)],
    ids=["sdpa", "eager", "replicated"],
)
def test_logits_are_those_of_our_model(tmp_path, n, attention, replicated):
    ours, _, folder = make(tmp_path, n_future_tokens=n, replicated_unembedding=replicated)
    model = load(folder, attn_implementation=attention)
    assert type(model).__name__ == "MultiTokenLlamaForCausalLM" and len(model.extra_heads) == n - 1
    assert len(model.extra_lm_heads) == (n - 1 if replicated else 0)
    tokens = random_tokens(3, 9)
    with torch.no_grad():
        wanted = ours.output_heads.logits(*ours.trunk(tokens))
        logits = model.multi_token_logits(tokens)
        assert logits.shape == (n, 3, 9, 50)
        torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits[0], model(tokens).logits, atol=1e-5, rtol=1e-5)
        # Padding on the left changes nothing, nor does what is in it.
        batch = padded(tokens, [9, 5, 2])
        logits = model.multi_token_logits(**batch)
        for row, length in enumerate([9, 5, 2]):
            alone = model.multi_token_logits(tokens[row : row + 1, 9 - length :])[:, 0]
            torch.testing.assert_close(logits[:, row, 9 - length :], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("replicated", [False, True])
def test_each_head_is_a_plain_llamas_last_layer(tmp_path, replicated):
    ours, config, folder = make(tmp_path, replicated_unembedding=replicated)
    parameters = {name: value.detach() for name, value in logical_parameters(ours)}
    tokens = random_tokens(2, 7)
    with torch.no_grad():
        logits = load(folder).multi_token_logits(tokens)
        for head in range(4):
            wanted = llama(parameters, config, head)(tokens).logits
            torch.testing.assert_close(logits[head], wanted, atol=1e-5, rtol=1e-5)
    assert head_config(config).n_layers == load(folder).config.num_hidden_layers


def test_without_remote_code_it_is_stock(exported, caplog, recwarn, capfd):
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert type(model) is LlamaForCausalLM
    assert not [record for record in caplog.records if record.levelname != "INFO"] and not recwarn.list
    assert "trust_remote_code" not in "".join(capfd.readouterr())
    tokens = random_tokens(2, 7)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, load(exported)(tokens).logits, atol=0, rtol=0)


def test_loading_says_nothing_of_missing_weights(exported, caplog, capfd):
    model, info = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert "extra_heads" not in "".join(capfd.readouterr()) + caplog.text
    for name, value in load_file(exported / "extra_heads.safetensors").items():
        assert torch.equal(model.get_parameter(name), value)


def test_dtype_is_respected(exported):
    model = load(exported, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    wanted = load_file(exported / "extra_heads.safetensors")["extra_heads.2.mlp.up_proj.weight"].bfloat16()
    assert torch.equal(model.extra_heads[2].mlp.up_proj.weight, wanted)
    assert model.generate(random_tokens(2, 4), max_new_tokens=5).shape == (2, 9)


def test_subfolder(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "inner")
    shutil.copyfile(CODE, tmp_path / "modeling_megamtp.py")
    model = load(tmp_path, subfolder="inner")
    tokens = random_tokens(2, 4)
    assert torch.equal(model.multi_token_logits(tokens), load(exported).multi_token_logits(tokens))


def test_extra_heads_that_are_missing_or_wrong(exported, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    path = folder / "extra_heads.safetensors"
    state = load_file(path)
    name = "extra_heads.1.self_attn.k_proj.weight"

    save_file({key: value for key, value in state.items() if key != name}, path)
    with pytest.raises(ValueError, match=f"{name} is missing"):
        load(folder)
    save_file({**state, "extra_heads.3.mlp.up_proj.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="extra_heads.3.mlp.up_proj.weight is unknown"):
        load(folder)
    save_file({**state, name: state[name][:-1].contiguous()}, path)
    with pytest.raises(ValueError, match=rf"{name} has shape \(7, 16\); the config says \(8, 16\)"):
        load(folder)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="extra_heads.safetensors cannot be read"):
        load(folder)
    path.unlink()
    with pytest.raises(OSError, match="extra_heads.safetensors"):
        load(folder)
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is LlamaForCausalLM


def test_forward_is_a_llamas(exported):
    model, stock = load(exported), AutoModelForCausalLM.from_pretrained(exported)
    tokens = random_tokens(2, 7)
    for which in (model, stock):
        which(tokens, labels=tokens).loss.backward()
    for name, parameter in stock.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, atol=1e-6, rtol=1e-5)
    assert all(parameter.grad is None for parameter in model.extra_heads.parameters())
    model.multi_token_logits(tokens).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.extra_heads.parameters())


@pytest.mark.parametrize("shard", ["10KB", "5GB"])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_saved_model_loads_both_ways(exported, tmp_path, shard, in_place):
    folder = tmp_path / "saved"
    shutil.copytree(exported, tmp_path / "source")
    model = load(tmp_path / "source")
    if in_place:
        folder = tmp_path / "source"
        (folder / "model.safetensors").write_bytes(b"left by another save: loaders would read it first")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.save_pretrained(folder, max_shard_size=shard)

    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = {file: load_file(folder / file) for file in set(index["weight_map"].values())}
    assert {name: file for file, state in shards.items() for name in state} == index["weight_map"]
    assert len(shards) == 1 if shard == "5GB" else len(shards) > 1
    assert not any("extra_heads" in name for name in index["weight_map"])
    assert {p.name for p in folder.glob("*.safetensors")} == {*shards, "extra_heads.safetensors"}
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
    assert config["auto_map"] == {"AutoModelForCausalLM": "modeling_megamtp.MultiTokenLlamaForCausalLM"}
    assert (folder / "modeling_megamtp.py").read_bytes() == CODE.read_bytes()

    back, stock = load(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert type(stock) is LlamaForCausalLM
    state = model.state_dict()
    assert set(back.state_dict()) == set(state)
    assert all(torch.equal(value, state[name]) for name, value in back.state_dict().items())
    assert all(torch.equal(value, state[name]) for name, value in stock.state_dict().items())


def test_unembeddings_of_their_own_are_saved_and_loaded(tmp_path):
    model = load(make(tmp_path / "made", replicated_unembedding=True)[2], dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    state, back = model.state_dict(), load(tmp_path / "saved").state_dict()
    assert len([name for name in state if name.startswith("extra_lm_heads.")]) == 3
    assert set(back) == set(state) and all(torch.equal(back[name], state[name]) for name in state)
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert not any("extra" in name for name in index["weight_map"])
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(stock) is LlamaForCausalLM and torch.equal(stock.lm_head.weight, state["lm_head.weight"])
    with pytest.raises(ValueError, match="keep their vocabulary"):
        model.resize_token_embeddings(60)


def test_saving_a_state_dict_that_was_gathered_elsewhere(exported, tmp_path):
    model = load(exported)
    state = {name: value + 1 for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    back = load(tmp_path).state_dict()
    assert set(back) == set(state) and all(torch.equal(back[name], state[name]) for name in state)
    with pytest.raises(ValueError, match="a state_dict that lacks the extra heads"):
        model.save_pretrained(tmp_path, state_dict={"lm_head.weight": state["lm_head.weight"]})


@pytest.mark.parametrize(
    "options", [{"push_to_hub": True}, {"variant": "fp16"}, {"safe_serialization": False}], ids=lambda o: next(iter(o))
)
def test_saving_that_is_refused(exported, tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        load(exported).save_pretrained(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
