"""Weights from a folder of Hugging Face: a foreign Llama, or what we have exported."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megamtp.config import from_dict, to_dict
from megamtp.convert.base import MappedSource
from megamtp.convert.formats import LLAMA
from megamtp.convert.huggingface import llama_config_dict
from megamtp.convert.safetensors_file import map_tensors
from megamtp.errors import UserError
from megamtp.model.transformer import ModelConfig

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
EXTRA_HEADS = "extra_heads.safetensors"
OWN = "megamtp.json"  # what an export of ours needs to be imported as it was
OWN_FORMAT = {"format": "megamtp-export", "version": 1}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
OTHER = "only plain Llama models can be read here"


class HuggingFaceSource(MappedSource):
    """``config.json`` and safetensors, with our extra heads where they are there."""


def open_huggingface(path: Path) -> HuggingFaceSource:
    """``UserError`` for files that are missing, cut or unreadable, and for what is no plain Llama."""
    values = read_json(path / CONFIG)
    own = read_json(path / OWN) if (path / OWN).is_file() else None
    tensors = _main_tensors(path)
    config = _model_config(path, values)
    if own is not None:
        config = _own_config(path, own, config)
    if config.n_future_tokens > 1 and not (path / EXTRA_HEADS).is_file():
        raise UserError(
            f"{path / EXTRA_HEADS}: is missing, {CONFIG} says n_future_tokens {config.n_future_tokens}; copy it there, "
            f"or remove n_future_tokens from {CONFIG} (and {OWN}) to go on with head 1 alone"
        )
    if (path / EXTRA_HEADS).is_file():
        tensors |= map_tensors(path / EXTRA_HEADS)
    if values.get("tie_word_embeddings"):
        tensors[LLAMA.top["output.weight"]] = tensors.get(LLAMA.top["tok_embeddings.weight"])
    tensors = {name: t for name, t in tensors.items() if not name.endswith("rotary_emb.inv_freq")}  # old Llamas have it
    source = HuggingFaceSource(path, config, LLAMA, {name: t for name, t in tensors.items() if t is not None})
    source.context, source.eos_id = values.get("max_position_embeddings"), _first(values.get("eos_token_id"))
    if any((path / name).is_file() for name in TOKENIZER_FILES):
        source.tokenizer = path
    if own is not None:
        source.context, source.eos_id, source.facts = own["context"], own["eos_id"], own["facts"]
    else:
        source.facts = {"converted_from": path.resolve().name}
    return source


def read_json(path: Path) -> dict[str, Any]:
    """``UserError`` for a file that holds no JSON object."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}; copy the file again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no JSON object; copy the file again")
    return values


def _main_tensors(path: Path) -> dict[str, Tensor]:
    if (path / SINGLE).is_file():  # what transformers looks for first
        return map_tensors(path / SINGLE)
    if not (path / INDEX).is_file():
        raise UserError(
            f"{path}: has a config.json, but neither {SINGLE} nor {INDEX}; save the weights as safetensors "
            "(save_pretrained does)"
        )
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(Path(file).name == file for file in weight_map.values()):
        raise UserError(f"{path / INDEX}: has no weight_map of files beside it; copy the file again")
    files = {file: map_tensors(path / file) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in files[file]:
            raise UserError(f"{path / file}: lacks {name}, which {INDEX} says it holds; copy the files again")
    return {name: files[file][name] for name, file in weight_map.items()}


def _model_config(path: Path, values: Mapping[str, Any]) -> ModelConfig:
    """The architecture as ``config.json`` tells it; defaults are those of transformers' LlamaConfig."""
    file = path / CONFIG

    def need(key: str, default: int | None = None) -> int:
        value = values.get(key, default)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{file}: {key} is {value!r}, a positive number is needed; {OTHER}")
        return value

    if values.get("model_type") != "llama":
        raise UserError(f"{file}: model_type is {values.get('model_type')!r}; {OTHER}")
    rope, scaling = values.get("rope_parameters") or {}, values.get("rope_scaling") or {}
    if not isinstance(rope, dict) or not isinstance(scaling, dict):
        raise UserError(f"{file}: rope_parameters or rope_scaling is no mapping; {OTHER}")
    dim, n_heads = need("hidden_size"), need("num_attention_heads")
    plain: dict[str, tuple[Any, Any]] = {  # what a plain Llama has, and what this one has
        "hidden_act": ("silu", values.get("hidden_act", "silu")),
        "attention_bias": (False, bool(values.get("attention_bias"))),
        "mlp_bias": (False, bool(values.get("mlp_bias"))),
        "head_dim": (dim // n_heads, values.get("head_dim") or dim // n_heads),
        "rope_scaling": ("default", scaling.get("rope_type", scaling.get("type", "default"))),
        "rope_parameters.rope_type": ("default", rope.get("rope_type", "default")),
        "partial_rotary_factor": (1, rope.get("partial_rotary_factor", values.get("partial_rotary_factor")) or 1),
        "quantization_config": (None, values.get("quantization_config")),
    }
    for key, (wanted, found) in plain.items():
        if found != wanted:
            raise UserError(f"{file}: {key} is {found!r}, not {wanted!r}; {OTHER}")
    n = need("n_future_tokens", 1)
    model = {
        "vocab_size": need("vocab_size"),
        "dim": dim,
        "n_layers": need("num_hidden_layers") + n - 1,
        "n_heads": n_heads,
        "n_kv_heads": values.get("num_key_value_heads") or n_heads,
        "n_future_tokens": n,
        "replicated_unembedding": values.get("replicated_unembedding", False),
        "ffn_dim": need("intermediate_size"),
        "norm_eps": values.get("rms_norm_eps", 1e-6),
        "rope_theta": rope.get("rope_theta") or values.get("rope_theta") or 10000.0,
        "init_std": values.get("initializer_range", 0.02),
    }
    return from_dict(ModelConfig, model, str(file))


def _own_config(path: Path, own: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    """Our own record, which knows more than ``config.json``; the two must agree on the rest."""
    if not OWN_FORMAT.items() <= own.items() or not {"model", "context", "eos_id", "facts"} <= own.keys():
        raise UserError(f"{path / OWN}: is not {OWN_FORMAT} with model, context, eos_id and facts; export again")
    ours = from_dict(ModelConfig, own["model"], f"{path / OWN}: model")
    theirs = _all_values(config)
    for key, value in _all_values(ours).items():
        if theirs[key] != value:
            raise UserError(
                f"{path}: {key} is {theirs[key]} in {CONFIG} and {value} in {OWN}; "
                f"remove {OWN} where {CONFIG} is right, or export again"
            )
    return ours


def _all_values(config: ModelConfig) -> dict[str, Any]:
    """What an export's ``config.json`` says of the architecture."""
    own = {key: getattr(config, key) for key in ("n_future_tokens", "replicated_unembedding")}
    return llama_config_dict(config) | own


def own_record(source_config: ModelConfig, context: int | None, eos_id: int | None, facts: dict) -> dict[str, Any]:
    """The contents of ``megamtp.json``."""
    return {**OWN_FORMAT, "model": to_dict(source_config), "context": context, "eos_id": eos_id, "facts": facts}


def _first(value: Any) -> int | None:
    """Some models end at several tokens; the first is the one that ends documents."""
    return (value[0] if value else None) if isinstance(value, list) else value
