"""The model as a list of layers: embedding, trunk blocks, heads. Here the list becomes one module."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from megamtp.model.heads import HeadLosses, HeadsConfig, MultiTokenHeads
from megamtp.model.initialize import initialize_
from megamtp.model.transformer import Block, ModelConfig, block_inputs
from megamtp.ops.choice import OpsConfig
from megamtp.parallel.layers import Layer, VocabParallelEmbedding
from megamtp.parallel.tensor import WHOLE, Shard, TensorParallel


def build_layers(
    config: ModelConfig, heads: HeadsConfig, ops: OpsConfig, tp: TensorParallel = WHOLE, cut: slice = slice(None)
) -> list[tuple[str, nn.Module]]:
    """(prefix of the logical parameter names, layer): embedding, trunk blocks, heads; of these, those of ``cut``.

    Only what is returned is built, on the current device.
    """
    layers = [
        ("tok_embeddings.", lambda: VocabParallelEmbedding(config.padded_vocab_size, config.dim, tp)),
        *((f"layers.{i}.", lambda: Block(config, ops, tp)) for i in range(config.n_trunk_layers)),
        ("", lambda: MultiTokenHeads(config, heads, ops, tp)),
    ]
    return [(prefix, build()) for prefix, build in layers[cut]]


class MultiTokenModel(nn.Module):
    """The layers run one after another in this process, as DeepSpeed's engine wants them.

    ``forward`` takes what the loader gives and returns the losses; with ``targets=None`` the logits of all heads.
    """

    def __init__(
        self,
        config: ModelConfig,
        heads: HeadsConfig | None = None,
        ops: OpsConfig | None = None,
        tp: TensorParallel = WHOLE,
    ):
        super().__init__()
        self.config, self.ops = config, ops or OpsConfig()
        (_, self.tok_embeddings), *blocks, (_, self.output_heads) = build_layers(
            config, heads or HeadsConfig(), self.ops, tp
        )
        self.layers = nn.ModuleList(block for _, block in blocks)

    def named_layers(self) -> "list[NamedLayer]":
        """The list of layers that the model was made from."""
        blocks = ((f"layers.{i}.", block) for i, block in enumerate(self.layers))
        return [("tok_embeddings.", self.tok_embeddings), *blocks, ("", self.output_heads)]

    def trunk(self, tokens: Tensor, positions: Tensor | None = None, document_ids: Tensor | None = None):
        """tokens (b, s) -> z (b, s, d) and what the blocks share."""
        inputs = block_inputs(self.config, self.ops, tokens.shape[1], tokens.device, positions, document_ids)
        z = self.tok_embeddings(tokens)
        for layer in self.layers:
            z = layer(z, inputs)
        return z, inputs

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> HeadLosses | Tensor:
        """tokens, positions, document_ids (b, s); targets (n, b, s) -> ``HeadLosses``, or logits (n, b, s, V).

        ``document_ids`` confines attention to documents; ``positions`` default to 0 ... s - 1.
        """
        z, inputs = self.trunk(tokens, positions, document_ids)
        if targets is None:
            return self.output_heads.logits(z, inputs)
        return self.output_heads(z, targets, inputs)


NamedLayer = tuple[str, nn.Module]  # prefix of the logical parameter names, layer


def sharded_parameters(layers: Iterable[NamedLayer]) -> Iterator[tuple[str, nn.Parameter, Shard]]:
    """Every parameter of ``layers`` under its logical name, which is the same in every layout and checkpoint."""
    for prefix, layer in layers:
        for name, module in layer.named_modules():
            if isinstance(module, Layer):
                yield f"{prefix}{name}{'.' if name else ''}weight", module.weight, module.shard


def logical_parameters(model: MultiTokenModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter of a whole model under its logical name."""
    for name, parameter, _ in sharded_parameters(model.named_layers()):
        yield name, parameter


def materialize_(
    layers: Iterable[NamedLayer],
    config: ModelConfig,
    seed: int | None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> None:
    """Give layers built on the meta device memory and, unless ``seed`` is None, their initial values."""
    layers = list(layers)
    for _, layer in layers:
        layer.to(dtype).to_empty(device=device)
    if seed is not None:
        for name, parameter, shard in sharded_parameters(layers):
            initialize_(parameter, name, config, seed, shard)


def build_model(
    config: ModelConfig,
    heads: HeadsConfig | None = None,
    ops: OpsConfig | None = None,
    *,
    seed: int | None,
    dtype: torch.dtype = torch.float32,
    tp: TensorParallel = WHOLE,
    device: torch.device | str = "cpu",
) -> MultiTokenModel:
    """Build on the meta device, then give each parameter its values (none for ``seed=None``: left uninitialised)."""
    with torch.device("meta"):
        model = MultiTokenModel(config, heads, ops, tp)
    materialize_(model.named_layers(), config, seed, dtype, device)
    return model
