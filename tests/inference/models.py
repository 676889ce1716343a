"""A model that has learned a little of Python, character by character, in seconds; and prompts that it has not seen."""

import argparse
import functools
import inspect
import tarfile
import textwrap

import torch

from megamtp.inference.decoder import Decoder
from megamtp.inference.native.decoder import NativeDecoder
from megamtp.model.heads import HeadsConfig
from megamtp.model.model import MultiTokenModel, build_model, logical_parameters
from megamtp.model.transformer import ModelConfig

CHARACTERS = [chr(i) for i in (10, *range(32, 127))]
IDS = {character: i for i, character in enumerate(CHARACTERS)}
CONTEXT = 160


def encode(text: str) -> list[int]:
    return [IDS[character] for character in text if character in IDS]


def decode(ids: list[int]) -> str:
    return "".join(CHARACTERS[i] for i in ids)


def parameters_of(model: MultiTokenModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in logical_parameters(model)}


def decoder_of(
    model: MultiTokenModel, dtype: torch.dtype = torch.float64, context: int = CONTEXT, kind: type = Decoder
) -> Decoder | NativeDecoder:
    parameters = parameters_of(model)
    return kind(model.config, lambda name: parameters[name].to(dtype), context)


@functools.cache
def trained_model(replicated: bool = False) -> MultiTokenModel:
    """4 heads, grouped queries, fp64 copies of fp32 weights; trained on one module's source."""
    sizes = {"vocab_size": len(CHARACTERS), "dim": 48, "n_layers": 6, "n_heads": 4, "n_kv_heads": 2}
    config = ModelConfig(**sizes, n_future_tokens=4, init_std=0.1, replicated_unembedding=replicated)
    model = build_model(config, HeadsConfig(mode="joint"), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    text = torch.tensor(encode(inspect.getsource(tarfile)))
    generator = torch.Generator().manual_seed(0)
    for _ in range(250):
        starts = torch.randint(len(text) - 64 - 4, (8,), generator=generator)
        windows = torch.stack([text[start : start + 64 + 4] for start in starts.tolist()])
        targets = torch.stack([windows[:, k : k + 64] for k in range(1, 5)])
        optimizer.zero_grad()
        model(windows[:, :64], targets).loss.backward()
        optimizer.step()
    return model.double()


def held_out_prompts(count: int) -> list[list[int]]:
    """Beginnings of another module's functions, of 5 to 84 characters."""
    source = textwrap.dedent(inspect.getsource(argparse))
    places = [i for i in range(len(source)) if source.startswith("def ", i)]
    lengths = [5 + 37 * i % 80 for i in range(count)]
    step = len(source) // count
    places += range(0, len(source) - 100, step)
    return [encode(source[place : place + length]) for place, length in zip(places, lengths, strict=False)]
