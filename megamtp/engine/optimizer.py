"""AdamW and its parameter groups."""

from typing import Annotated

import torch
from pydantic import Field

from megamtp.config import config_dataclass, option
from megamtp.model.model import NamedLayer, sharded_parameters


@config_dataclass
class OptimizerConfig:
    """AdamW with the paper's defaults (arXiv:2404.19737, table S13)."""

    lr: Annotated[float, Field(gt=0)] = option(3e-4, "peak learning rate")
    beta1: Annotated[float, Field(ge=0, lt=1)] = option(0.9, "decay of the first moment")
    beta2: Annotated[float, Field(ge=0, lt=1)] = option(0.95, "decay of the second moment")
    eps: Annotated[float, Field(gt=0)] = option(1e-8, "added to the root of the second moment")
    weight_decay: Annotated[float, Field(ge=0)] = option(0.1, "decoupled weight decay; norms have none")
    clip: Annotated[float, Field(ge=0)] = option(1.0, "largest global gradient norm; 0 = no clipping")


def build_optimizer(layers: list[NamedLayer], config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW; norms (the one-dimensional parameters) are not decayed.

    ZeRO flattens each group, so what other tensor-parallel ranks hold as well stands in groups of its own: the
    gradient norm counts it on one of them (``counts_in_norm``). A rank without such parameters has fewer groups.
    """
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for _, parameter, shard in sharded_parameters(layers):
        groups.setdefault((len(shard.shape) > 1, shard.replica == 0), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": members, "weight_decay": config.weight_decay if decays else 0.0, "counts_in_norm": counts}
            for (decays, counts), members in groups.items()
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
