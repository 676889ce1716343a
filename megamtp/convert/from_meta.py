"""Weights from Meta's release of the paper's models: ``params.json`` and ``consolidated.pth``.

The layout is known from the paper's authors' description and from ports to other programs; the gated files themselves
were never seen by this project.
"""

import pickle
import re
from pathlib import Path

import torch

from megamtp.config import from_dict
from megamtp.convert.base import MappedSource
from megamtp.convert.formats import META
from megamtp.convert.from_huggingface import read_json
from megamtp.data.tokenizer import load_tokenizer
from megamtp.errors import UserError
from megamtp.model.transformer import ModelConfig

PARAMS, WEIGHTS = "params.json", "consolidated.pth"
CONTEXT = 4096  # of the paper's models (arXiv:2404.19737, table S13); params.json does not say
TOKENIZER = "tokenizer.model"


class MetaSource(MappedSource):
    """Head 1 is the last of ``layers``, the others are ``extra_heads``; rotary pairs are interleaved."""


def open_meta(path: Path) -> MetaSource:
    """``UserError`` for files that are missing, cut or unreadable, or that do not go together."""
    params, file = read_json(path / PARAMS), path / WEIGHTS
    if not file.is_file():
        raise UserError(
            f"{path}: has a {PARAMS}, but no {WEIGHTS}; copy it there (parts of several ranks are not read)"
        )
    try:
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: cannot be read, cut short or no file of PyTorch: {why}; copy it again") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise UserError(f"{file}: holds no tensors by name; copy it again")
    tensors.pop("rope.freqs", None)  # can be computed, and is
    source = MetaSource(path, _model_config(path, params, tensors), META, tensors)
    source.context = params.get("max_seq_len", CONTEXT)
    source.facts = {"converted_from": path.resolve().name}
    if (path / TOKENIZER).is_file():
        source.tokenizer = path / TOKENIZER
        source.eos_id = load_tokenizer(source.tokenizer).eod()[1]
    return source


def _model_config(path: Path, params: dict, tensors: dict[str, torch.Tensor]) -> ModelConfig:
    """What params.json says, and the sizes that only the tensors tell."""
    where = path / WEIGHTS
    for key in ("dim", "n_heads"):
        if not isinstance(params.get(key), int) or params[key] < 1:
            raise UserError(
                f"{path / PARAMS}: {key} is {params.get(key)!r}, a positive number is needed; copy it again"
            )
    if params.get("use_scaled_rope"):
        raise UserError(f"{path / PARAMS}: use_scaled_rope is not supported; give another model")
    try:
        head_dim = params["dim"] // params["n_heads"]
        vocab_size, ffn_dim = (len(tensors[name]) for name in ("output.weight", "layers.0.feed_forward.w1.weight"))
        n_kv_heads = len(tensors["layers.0.attention.wk.weight"]) // head_dim
    except KeyError as error:
        raise UserError(f"{where}: lacks {error.args[0]}; give the folder of a released model") from None
    blocks = {int(found[1]) for name in tensors if (found := re.match(r"layers\.(\d+)\.", name))}
    extra_heads = {int(found[1]) for name in tensors if (found := re.match(r"extra_heads\.(\d+)\.", name))}
    n = len(extra_heads) + 1
    for key, found in (("n_future_tokens", n), ("n_layers", len(blocks) + len(extra_heads))):
        if params.get(key, found) != found:
            raise UserError(f"{path}: {PARAMS} says {key} {params[key]}, {WEIGHTS} holds {found}; copy both again")
    model = {
        "vocab_size": vocab_size,
        "dim": params["dim"],
        "n_layers": len(blocks) + len(extra_heads),
        "n_heads": params["n_heads"],
        "n_kv_heads": n_kv_heads,
        "n_future_tokens": n,
        "ffn_dim": ffn_dim,
        "norm_eps": params.get("norm_eps", 1e-5),
        "rope_theta": params.get("rope_theta", 10000.0),
    }
    return from_dict(ModelConfig, model, str(path / PARAMS))
