"""The paper's model as Meta's code computes it, for one checkpoint: rotary by complex numbers, pairs interleaved."""

import json
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

PARAMS = {"dim": 32, "n_layers": 5, "n_heads": 4, "n_kv_heads": 2, "n_future_tokens": 3, "rope_theta": 500.0}
VOCAB, FFN, EPS = 53, 40, 1e-5


def checkpoint(seed: int = 0) -> dict[str, Tensor]:
    """5 layers as the paper counts, 3 of them heads: layers.0 to 2, the last of which is head 1, and extra_heads."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, mean: float = 0.0, std: float = 0.3) -> Tensor:
        return mean + std * torch.randn(shape, generator=generator)

    dim, kv = PARAMS["dim"], 2 * 8
    state = {"tok_embeddings.weight": normal(VOCAB, dim), "output.weight": normal(VOCAB, dim)}
    state |= {"norm.weight": normal(dim, mean=1), "rope.freqs": normal(4)}
    for block in ("layers.0", "layers.1", "layers.2", "extra_heads.0", "extra_heads.1"):
        for name, shape in {"wq": (dim, dim), "wk": (kv, dim), "wv": (kv, dim), "wo": (dim, dim)}.items():
            state[f"{block}.attention.{name}.weight"] = normal(*shape)
        for name, shape in {"w1": (FFN, dim), "w2": (dim, FFN), "w3": (FFN, dim)}.items():
            state[f"{block}.feed_forward.{name}.weight"] = normal(*shape)
        for name in ("attention_norm", "ffn_norm"):
            state[f"{block}.{name}.weight"] = normal(dim, mean=1)
    return state


def save(folder: Path, state: dict[str, Tensor], **params) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "consolidated.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS | params))
    return folder


def logits(state: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """(n, b, s, V) in fp64."""
    state = {name: value.double() for name, value in state.items()}
    s, head_dim = tokens.shape[1], PARAMS["dim"] // PARAMS["n_heads"]
    frequencies = PARAMS["rope_theta"] ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    angles = torch.outer(torch.arange(s).double(), frequencies)
    turns = torch.polar(torch.ones_like(angles), angles)[None, :, None, :]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * turns).flatten(3)

    def block(x: Tensor, prefix: str) -> Tensor:
        w = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        h = norm(x, w["attention_norm.weight"])
        q, k, v = ((h @ w[f"attention.{name}.weight"].T).unflatten(-1, (-1, head_dim)) for name in ("wq", "wk", "wv"))
        q, k = rotate(q), rotate(k)
        k, v = (x.repeat_interleave(2, dim=2) for x in (k, v))
        scores = torch.einsum("bshd,bthd->bhst", q, k) / head_dim**0.5
        scores = scores.masked_fill(torch.ones(s, s).triu(1).bool(), float("-inf"))
        x = x + torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v).flatten(2) @ w["attention.wo.weight"].T
        h = norm(x, w["ffn_norm.weight"])
        gate = F.silu(h @ w["feed_forward.w1.weight"].T) * (h @ w["feed_forward.w3.weight"].T)
        return x + gate @ w["feed_forward.w2.weight"].T

    z = state["tok_embeddings.weight"][tokens]
    for i in range(2):
        z = block(z, f"layers.{i}.")
    heads = [block(z, prefix) for prefix in ("layers.2.", "extra_heads.0.", "extra_heads.1.")]
    return torch.stack([norm(h, state["norm.weight"]) @ state["output.weight"].T for h in heads])
