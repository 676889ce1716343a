import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megamtp.convert.huggingface import from_llama_state_dict, llama_config_dict, to_llama_state_dict
from megamtp.model.model import build_model, logical_parameters
from tests.model.llama import head_config, random_model, small_config


def parameters_of(config, dtype=torch.float32):
    model = random_model(config, seed=0, dtype=dtype)
    return {name: parameter.detach() for name, parameter in logical_parameters(model)}


def their_model(config):
    return LlamaForCausalLM(LlamaConfig(**llama_config_dict(config)))


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"n_kv_heads": 2},
        {"n_layers": 6, "n_future_tokens": 3},
        {"n_layers": 6, "n_future_tokens": 3, "replicated_unembedding": True},
        {"vocab_size": 64},
    ],
)
def test_names_and_shapes_are_those_of_transformers(overrides):
    config = small_config(**overrides)
    state = to_llama_state_dict(parameters_of(config), config)
    theirs = their_model(config).state_dict()
    assert {name: value.shape for name, value in state.items()} == {name: value.shape for name, value in theirs.items()}


def test_head_one_becomes_the_last_layer_and_the_others_stay_behind():
    config = small_config(n_layers=6, n_future_tokens=3)
    parameters = parameters_of(config)
    state = to_llama_state_dict(parameters, config)
    assert llama_config_dict(config)["num_hidden_layers"] == 4
    assert state["model.layers.3.mlp.down_proj.weight"] is parameters["heads.0.feed_forward.w2.weight"]
    assert state["model.layers.0.self_attn.k_proj.weight"] is parameters["layers.0.attention.wk.weight"]
    assert not any(name.startswith("model.layers.4") for name in state)


@pytest.mark.parametrize(
    ("overrides", "name"), [({}, "output.weight"), ({"replicated_unembedding": True}, "output.0.weight")]
)
def test_padding_is_stripped(overrides, name):
    config = small_config(n_future_tokens=2, **overrides)
    parameters = parameters_of(config)
    state = to_llama_state_dict(parameters, config)
    assert config.padded_vocab_size == len(parameters[name]) == 64
    assert torch.equal(state["lm_head.weight"], parameters[name][:50])
    assert torch.equal(state["model.embed_tokens.weight"], parameters["tok_embeddings.weight"][:50])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overrides", [{}, {"n_kv_heads": 2}, {"replicated_unembedding": True}])
def test_round_trip_from_here(overrides, dtype):
    config = small_config(**overrides)
    parameters = parameters_of(config, dtype)
    back = from_llama_state_dict(to_llama_state_dict(parameters, config), config)
    assert set(back) == set(parameters)
    for name, value in back.items():
        wanted = parameters[name].clone()
        if name.startswith(("tok_embeddings.", "output.")):
            wanted[50:] = 0
        assert value.dtype == dtype and torch.equal(value, wanted), name


def test_round_trip_from_there():
    config = small_config(n_kv_heads=2)
    state = their_model(config).state_dict()
    parameters = from_llama_state_dict(state, config)
    back = to_llama_state_dict(parameters, config)
    assert set(back) == set(state) and all(torch.equal(back[name], state[name]) for name in state)
    model = build_model(config, seed=None)
    for name, parameter in logical_parameters(model):
        parameter.data.copy_(parameters.pop(name))
    assert not parameters


def test_config_arguments():
    config = small_config(n_kv_heads=2, rope_theta=777.0, norm_eps=0.01, ffn_dim=None)
    theirs = LlamaConfig(**llama_config_dict(config))
    assert theirs.rope_parameters["rope_theta"] == 777.0
    assert (theirs.num_attention_heads, theirs.num_key_value_heads, theirs.head_dim) == (4, 2, 4)
    assert (theirs.vocab_size, theirs.hidden_size, theirs.intermediate_size) == (50, 16, 256)
    assert (theirs.rms_norm_eps, theirs.num_hidden_layers, theirs.tie_word_embeddings) == (0.01, 4, False)


def test_missing_parameter():
    config = small_config()
    parameters = parameters_of(config)
    del parameters["heads.0.attention.wo.weight"]
    with pytest.raises(KeyError, match="heads.0.attention.wo.weight is missing"):
        to_llama_state_dict(parameters, config)


@pytest.mark.parametrize(
    "name", ["output.weight", "layers.1.attention.wk.weight", "norm.weight", "heads.0.ffn_norm.weight"]
)
def test_parameter_of_another_shape(name):
    config = small_config(n_kv_heads=2)
    parameters = parameters_of(config)
    parameters[name] = parameters[name][:-1]
    with pytest.raises(ValueError, match=f"{name} has shape"):
        to_llama_state_dict(parameters, config)


def test_state_that_does_not_fit():
    config = small_config()
    state = their_model(config).state_dict()
    with pytest.raises(ValueError, match="n_future_tokens is 2"):
        from_llama_state_dict(state, small_config(n_future_tokens=2))
    with pytest.raises(ValueError, match="missing model.layers.4"):
        from_llama_state_dict(state, small_config(n_layers=5))
    with pytest.raises(ValueError, match="unknown model.layers.3"):
        from_llama_state_dict(state, small_config(n_layers=3))
    with pytest.raises(ValueError, match="unknown model.layers.0.self_attn.q_proj.bias"):
        from_llama_state_dict({**state, "model.layers.0.self_attn.q_proj.bias": torch.zeros(16)}, config)
    with pytest.raises(ValueError, match="lm_head.weight has shape|embed_tokens.weight has shape"):
        from_llama_state_dict(state, small_config(vocab_size=49))
    with pytest.raises(ValueError, match="k_proj.weight has shape"):
        from_llama_state_dict(state, small_config(n_kv_heads=2))


def test_a_single_heads_model_is_the_export_of_many():
    """Head 1's export does not depend on how many heads were trained beside it."""
    config = small_config(n_layers=6, n_future_tokens=3)
    parameters = parameters_of(config)
    wanted = to_llama_state_dict(
        {k: v for k, v in parameters.items() if k[:7] not in ("heads.1", "heads.2")}, head_config(config)
    )
    state = to_llama_state_dict(parameters, config)
    assert llama_config_dict(config) == llama_config_dict(head_config(config))
    assert set(state) == set(wanted) and all(torch.equal(state[name], wanted[name]) for name in state)
