"""To and from Hugging Face's Llama: trunk + head 1 is exactly a ``LlamaForCausalLM``.

Rotary pairs are halves here as there, so a weight moves under another name and nothing else. Nothing here
imports transformers.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from megamtp.convert.formats import LLAMA, VOCABULARY_TABLES, extra_head, padded_shape
from megamtp.model.initialize import kind_of
from megamtp.model.transformer import ModelConfig


def to_llama_state_dict(parameters: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Logical parameters -> the state dict of a ``LlamaForCausalLM`` made of the trunk and head 1.

    It has n_layers - n + 1 layers, the last of them head 1, and head 1's unembedding; the other heads are left out.
    Tensors keep their dtype and share memory with ``parameters``. The two vocabulary tables come as
    (padded_vocab_size, dim) and leave as (vocab_size, dim). Raises ``KeyError`` for a parameter that is missing and
    ``ValueError`` for one whose shape is not the config's.
    """
    state = {}
    for name, llama_name in _names(config).items():
        if name not in parameters:
            raise KeyError(f"parameter {name} is missing")
        _check_shape(name, parameters[name], padded_shape(name, config))
        is_table = kind_of(name) in VOCABULARY_TABLES
        state[llama_name] = parameters[name][: config.vocab_size] if is_table else parameters[name]
    return state


def from_llama_state_dict(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The state dict of a ``LlamaForCausalLM`` with n_layers layers -> logical parameters of a model with n = 1.

    The last layer becomes head 1. The vocabulary tables (vocab_size, dim) get padding rows of zeros, up to
    padded_vocab_size; the other tensors share memory with ``state``. Raises ``ValueError`` where n is not 1, and
    for names that are unknown (a bias, say) or missing, and shapes that are not the config's.
    """
    if config.n_future_tokens != 1:
        raise ValueError(f"a Llama has one head; n_future_tokens is {config.n_future_tokens}")
    names = _names(config)
    missing, unknown = sorted(set(names.values()) - set(state)), sorted(set(state) - set(names.values()))
    if missing or unknown:
        raise ValueError(
            f"not a Llama of {config.n_layers} layers: "
            + "; ".join(f"{what} {found[0]}" for what, found in (("missing", missing), ("unknown", unknown)) if found)
        )
    parameters = {}
    for name, llama_name in names.items():
        tensor, shape = state[llama_name], padded_shape(name, config)
        if kind_of(name) in VOCABULARY_TABLES:
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


def _names(config: ModelConfig) -> dict[str, str]:
    """Logical name -> transformers' name of every parameter of trunk + head 1."""
    return {name: theirs for name, theirs in LLAMA.names(config).items() if not extra_head(name)}


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; the config says {shape}")
