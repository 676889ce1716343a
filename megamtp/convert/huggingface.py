"""To and from Hugging Face's Llama: trunk + head 1 is exactly a ``LlamaForCausalLM``.

Rotary pairs are halves here as there, so a weight moves under another name and nothing else. Nothing here
imports transformers.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from megamtp.model.transformer import ModelConfig

# Logical name -> transformers' name. {block} is ``layers.{i}`` or ``heads.{k}``, {i} the layer that it becomes.
LLAMA_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "{block}.attention_norm.weight": "model.layers.{i}.input_layernorm.weight",
    "{block}.attention.wq.weight": "model.layers.{i}.self_attn.q_proj.weight",
    "{block}.attention.wk.weight": "model.layers.{i}.self_attn.k_proj.weight",
    "{block}.attention.wv.weight": "model.layers.{i}.self_attn.v_proj.weight",
    "{block}.attention.wo.weight": "model.layers.{i}.self_attn.o_proj.weight",
    "{block}.ffn_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
    "{block}.feed_forward.w1.weight": "model.layers.{i}.mlp.gate_proj.weight",
    "{block}.feed_forward.w2.weight": "model.layers.{i}.mlp.down_proj.weight",
    "{block}.feed_forward.w3.weight": "model.layers.{i}.mlp.up_proj.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
VOCABULARY_TABLES = ("tok_embeddings.weight", "output.weight")  # their rows are padded to padded_vocab_size


def to_llama_state_dict(parameters: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Logical parameters -> the state dict of a ``LlamaForCausalLM`` made of the trunk and head 1.

    It has n_layers - n + 1 layers, the last of them head 1; the other heads are left out. Tensors keep their
    dtype and share memory with ``parameters``. The two vocabulary tables come as (padded_vocab_size, dim) and leave
    as (vocab_size, dim). Raises ``KeyError`` for a parameter that is missing and ``ValueError`` for one
    whose shape is not the config's.
    """
    state = {}
    for name, llama_name in _names(config):
        if name not in parameters:
            raise KeyError(f"parameter {name} is missing")
        _check_shape(name, parameters[name], _shape(name, config))
        state[llama_name] = parameters[name][: config.vocab_size] if name in VOCABULARY_TABLES else parameters[name]
    return state


def from_llama_state_dict(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The state dict of a ``LlamaForCausalLM`` with n_layers layers -> logical parameters of a model with n = 1.

    The last layer becomes head 1. The vocabulary tables (vocab_size, dim) get padding rows of zeros, up to
    padded_vocab_size; the other tensors share memory with ``state``. Raises ``ValueError`` where n is not 1, and
    for names that are unknown (a bias, say) or missing, and shapes that are not the config's.
    """
    if config.n_future_tokens != 1:
        raise ValueError(f"a Llama has one head; n_future_tokens is {config.n_future_tokens}")
    names = dict(_names(config))
    missing, unknown = sorted(set(names.values()) - set(state)), sorted(set(state) - set(names.values()))
    if missing or unknown:
        raise ValueError(
            f"not a Llama of {config.n_layers} layers: "
            + "; ".join(f"{what} {found[0]}" for what, found in (("missing", missing), ("unknown", unknown)) if found)
        )
    parameters = {}
    for name, llama_name in names.items():
        tensor, shape = state[llama_name], _shape(name, config)
        if name in VOCABULARY_TABLES:
            _check_shape(llama_name, tensor, (config.vocab_size, config.dim))
            tensor = F.pad(tensor, (0, 0, 0, shape[0] - config.vocab_size))
        _check_shape(llama_name, tensor, shape)
        parameters[name] = tensor
    return parameters


def llama_config_dict(config: ModelConfig) -> dict[str, Any]:
    """Arguments of transformers' ``LlamaConfig`` for the model of ``to_llama_state_dict``.

    The architecture alone: the caller adds what is not part of it (``max_position_embeddings``, ids of special
    tokens, dtype). ``rope_theta`` is understood by transformers 4 and 5.
    """
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_trunk_layers + 1,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "initializer_range": config.init_std,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    }


def _names(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """(logical name, transformers' name) of every parameter of trunk + head 1."""
    blocks = [*(f"layers.{i}" for i in range(config.n_trunk_layers)), "heads.0"]
    for name, llama_name in LLAMA_NAMES.items():
        if "{block}" not in name:
            yield name, llama_name
            continue
        for i, block in enumerate(blocks):
            yield name.format(block=block), llama_name.format(i=i)


def _shape(name: str, config: ModelConfig) -> tuple[int, ...]:
    d, f = config.dim, config.hidden_dim
    table = (config.padded_vocab_size, d)
    shapes = {"tok_embeddings": table, "output": table, "wq": (d, d), "wo": (d, d), "w2": (d, f)}
    shapes |= dict.fromkeys(("wk", "wv"), (config.kv_heads * config.head_dim, d)) | dict.fromkeys(("w1", "w3"), (f, d))
    return shapes.get(name.split(".")[-2], (d,))


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; the config says {shape}")
