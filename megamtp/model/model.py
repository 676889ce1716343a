"""The model as a list of layers: embedding, trunk blocks, heads. Here the list becomes one module."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from megamtp.config import config_dataclass, option
from megamtp.model.heads import HeadLosses, HeadsConfig, MultiTokenHeads
from megamtp.model.initialize import initialize_
from megamtp.model.transformer import AttentionBackendName, Block, Embedding, ModelConfig, Recompute, block_inputs


@config_dataclass
class OpsConfig:
    """Which backend computes what."""

    attention: AttentionBackendName = option("sdpa", "sdpa: PyTorch's fused attention; reference: the definition")
    recompute: Recompute = option(
        "none", "of a block's activations in its backward pass: none; selective: the attention's; full: all"
    )


def build_layers(config: ModelConfig, heads: HeadsConfig, ops: OpsConfig) -> list[tuple[str, nn.Module]]:
    """(prefix of the logical parameter names, layer) from the embedding to the heads, on the current device."""
    return [
        ("tok_embeddings.", Embedding(config.padded_vocab_size, config.dim)),
        *((f"layers.{i}.", Block(config, ops.attention)) for i in range(config.n_trunk_layers)),
        ("", MultiTokenHeads(config, heads, ops.attention)),
    ]


class MultiTokenModel(nn.Module):
    """The layers run one after another in this process, as DeepSpeed's engine wants them.

    ``forward`` takes what the loader gives and returns the losses; with ``targets=None`` the logits of all heads.
    """

    def __init__(self, config: ModelConfig, heads: HeadsConfig | None = None, ops: OpsConfig | None = None):
        super().__init__()
        self.config, self.ops = config, ops or OpsConfig()
        (_, self.tok_embeddings), *blocks, (_, self.output_heads) = build_layers(
            config, heads or HeadsConfig(), self.ops
        )
        self.layers = nn.ModuleList(block for _, block in blocks)

    def trunk(self, tokens: Tensor, positions: Tensor | None = None, document_ids: Tensor | None = None):
        """tokens (b, s) -> z (b, s, d) and what the blocks share."""
        inputs = block_inputs(self.config, self.ops.attention, tokens, positions, document_ids)
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
        return self.output_heads.loss(z, targets, inputs)


def logical_parameters(model: MultiTokenModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter under the name that it has in every layout and checkpoint."""
    for name, parameter in model.named_parameters():
        yield name.removeprefix("output_heads."), parameter


def build_model(
    config: ModelConfig,
    heads: HeadsConfig | None = None,
    ops: OpsConfig | None = None,
    *,
    seed: int | None,
    dtype: torch.dtype = torch.float32,
) -> MultiTokenModel:
    """Build on the meta device, then give each parameter its values (none for ``seed=None``: left uninitialised)."""
    with torch.device("meta"):
        model = MultiTokenModel(config, heads, ops)
    model.to_empty(device="cpu")
    if seed is not None:
        for name, parameter in logical_parameters(model):
            initialize_(parameter, name, config, seed)
    return model.to(dtype)
