"""Open a trained model for decoding: weights, tokenizer, context."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from megamtp.convert.base import DTYPES as STORED_DTYPES
from megamtp.convert.base import Source
from megamtp.convert.source import open_source
from megamtp.convert.verification import verifying
from megamtp.data.tokenizer import Tokenizer, load_tokenizer
from megamtp.errors import UserError
from megamtp.inference.decoder import Decoder
from megamtp.inference.graphs import GraphedDecoder
from megamtp.inference.native.build import CannotBuild, library
from megamtp.inference.native.decoder import NativeDecoder

BACKENDS = ("auto", "native", "graphs", "torch")
DTYPES = {**STORED_DTYPES, "fp64": torch.float64}


@dataclass(frozen=True)
class LoadedModel:
    decoder: Decoder | NativeDecoder
    source: Source
    tokenizer: Tokenizer
    context: int  # positions

    @property
    def eos_id(self) -> int | None:
        """The token that ended documents in training."""
        if self.source.eos_id is not None:
            return self.source.eos_id
        token = self.tokenizer.default_eod
        return self.tokenizer.token_to_id(token) if token else None


def load_model(
    path: Path | str,
    *,
    tokenizer: str | None = None,
    context: int | None = None,
    dtype: str | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> LoadedModel:
    """The model in a folder: of a run, a checkpoint, an export, a Hugging Face Llama, Meta's release.

    ``tokenizer`` and ``context`` stand in where the folder does not tell them. Default dtype: bf16 on a GPU, fp32 on a
    CPU. ``backend``: "native", compiled blocks, for a CPU in fp32; "graphs", CUDA graphs; "torch"; "auto", the fastest
    that can be had.
    Raises ``UserError`` for a folder that is no model, for damaged files, and for what nothing tells.
    """
    device = _device(device)
    dtype = DTYPES[dtype or ("bf16" if device.type == "cuda" else "fp32")]
    kind = _decoder_class(backend, dtype, device)
    source = open_source(path)
    tokenizer = tokenizer or source.tokenizer
    if tokenizer is None:
        raise UserError(f"{path}: names no tokenizer; give --tokenizer PATH")
    loaded_tokenizer = load_tokenizer(str(tokenizer))
    if loaded_tokenizer.vocab_size > source.config.vocab_size:
        raise UserError(
            f"{tokenizer}: has {loaded_tokenizer.vocab_size} tokens, the model in {path} knows "
            f"{source.config.vocab_size}; give the tokenizer that it was trained with"
        )
    context = context or source.context
    if context is None:
        raise UserError(f"{path}: does not say how long its context is; give --context TOKENS")
    decoder = load_decoder(source, context, dtype, device, kind)
    return LoadedModel(decoder, source, loaded_tokenizer, context)


def _device(name: torch.device | str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a build without CUDA
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}; use one that is here") from None
    return device


def load_decoder(
    source: Source,
    context: int,
    dtype: torch.dtype,
    device: torch.device,
    kind: type[Decoder] | type[NativeDecoder] = Decoder,
) -> Decoder | NativeDecoder:
    """Read the weights. ``UserError`` for a file whose checksum is on record and wrong."""
    with verifying(source) as verification:
        decoder = kind(source.config, lambda name: source.tensor(name).to(device, dtype), context)
        verification.wait()
    return decoder


def _decoder_class(backend: str, dtype: torch.dtype, device: torch.device) -> type[Decoder] | type[NativeDecoder]:
    able = device.type == "cpu" and dtype == torch.float32
    if backend == "native" and not able:
        raise UserError("--backend native: computes in fp32 on a CPU alone; add --device cpu --dtype fp32")
    if backend == "graphs" and device.type != "cuda":
        raise UserError("--backend graphs: records CUDA graphs, and this is no GPU; use auto")
    if device.type == "cuda" and backend != "torch":
        return GraphedDecoder
    if backend == "torch" or not able:
        return Decoder
    try:
        library()
    except CannotBuild as error:
        if backend == "native":
            raise UserError(f"--backend native: {error}; mend that, or use --backend torch") from None
        print(f"decoding in PyTorch, several times slower than by compiled blocks: {error}", file=sys.stderr)
        return Decoder
    return NativeDecoder
