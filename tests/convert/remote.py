"""Folders with remote code, made with transformers' own ``save_pretrained``, and inputs for them."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import megamtp.convert
from megamtp.convert.huggingface import llama_config_dict, to_llama_state_dict
from megamtp.model.model import logical_parameters
from tests.model.llama import random_model, small_config

CODE = Path(megamtp.convert.__file__).parent / "modeling_megamtp.py"
BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}


def write_folder(folder, model, config, **extra_config):
    """What an exporter has to write, made with transformers' own ``save_pretrained``."""
    parameters = {name: value.detach() for name, value in logical_parameters(model)}
    plain = LlamaForCausalLM(
        LlamaConfig(**llama_config_dict(config), max_position_embeddings=64, bos_token_id=None, eos_token_id=None)
    ).to(parameters["norm.weight"].dtype)
    plain.load_state_dict(to_llama_state_dict(parameters, config))
    plain.save_pretrained(folder, max_shard_size="10KB")
    extra = {}
    for name, value in parameters.items():
        if name.startswith("heads.") and not name.startswith("heads.0."):
            head, part = name.removeprefix("heads.").removesuffix(".weight").split(".", 1)
            extra[f"extra_heads.{int(head) - 1}.{BLOCK[part]}.weight"] = value
        elif name.startswith("output.") and name not in ("output.weight", "output.0.weight"):
            extra[f"extra_lm_heads.{int(name.split('.')[1]) - 1}.weight"] = value[: config.vocab_size].contiguous()
    if extra:
        save_file(extra, folder / "extra_heads.safetensors")
    shutil.copyfile(CODE, folder / "modeling_megamtp.py")
    if config.replicated_unembedding:
        extra_config["replicated_unembedding"] = True
    edit_json(
        folder / "config.json",
        auto_map={"AutoModelForCausalLM": "modeling_megamtp.MultiTokenLlamaForCausalLM"},
        n_future_tokens=config.n_future_tokens,
        **extra_config,
    )
    return folder


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **kwargs).eval()


def make(folder, *, seed=0, dtype=torch.float32, **overrides):
    """(our model, its config, the folder)."""
    config = small_config(**{"n_layers": 5, "n_future_tokens": 4, "n_kv_heads": 2, **overrides})
    model = random_model(config, seed=seed, dtype=dtype)
    return model, config, write_folder(folder, model, config)


def padded(tokens, lengths):
    """Random junk on the left of each row, masked."""
    mask = (torch.arange(tokens.shape[1]) >= tokens.shape[1] - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": tokens, "attention_mask": mask}


def random_tokens(b, s, vocab=50, seed=1):
    return torch.randint(vocab, (b, s), generator=torch.Generator().manual_seed(seed))
