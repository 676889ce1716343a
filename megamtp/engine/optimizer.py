"""AdamW, its parameter groups, and its states, which each implementation of it keeps a little differently."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from megamtp.config import config_dataclass, option
from megamtp.model.model import NamedLayer, sharded_parameters
from megamtp.ops.choice import AdamWName


@config_dataclass
class OptimizerConfig:
    """AdamW with the paper's defaults (arXiv:2404.19737, table S13)."""

    lr: Annotated[float, Field(gt=0)] = option(3e-4, "peak learning rate")
    beta1: Annotated[float, Field(ge=0, lt=1)] = option(0.9, "decay of the first moment")
    beta2: Annotated[float, Field(ge=0, lt=1)] = option(0.95, "decay of the second moment")
    eps: Annotated[float, Field(gt=0)] = option(1e-8, "added to the root of the second moment")
    weight_decay: Annotated[float, Field(ge=0)] = option(0.1, "decoupled weight decay; norms have none")
    clip: Annotated[float, Field(ge=0)] = option(1.0, "largest global gradient norm; 0 = no clipping")


def build_optimizer(
    layers: list[NamedLayer], config: OptimizerConfig, backend: AdamWName = "torch"
) -> torch.optim.Optimizer:
    """Fused AdamW; norms (the one-dimensional parameters) are not decayed.

    ZeRO flattens each group, so what other tensor-parallel ranks hold as well stands in groups of its own: the
    gradient norm counts it on one of them (``counts_in_norm``). A rank without such parameters has fewer groups.
    Raises ``ImportError`` where the backend's library is not installed.
    """
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for _, parameter, shard in sharded_parameters(layers):
        groups.setdefault((len(shard.shape) > 1, shard.replica == 0), []).append(parameter)
    of_groups = [
        {"params": members, "weight_decay": config.weight_decay if decays else 0.0, "counts_in_norm": counts}
        for (decays, counts), members in groups.items()
    ]
    adamw, own = _implementation(backend)
    return adamw(of_groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, **own)


def _implementation(backend: AdamWName) -> tuple[type[torch.optim.Optimizer], dict[str, bool]]:
    if backend == "apex":
        from apex.optimizers import FusedAdam

        return FusedAdam, {"adam_w_mode": True}
    if backend == "deepspeed":
        from deepspeed.ops.adam import FusedAdam

        return FusedAdam, {"adam_w_mode": True}
    return torch.optim.AdamW, {"fused": True}


def adamw_states(adamw: torch.optim.Optimizer, tensors: list[Tensor]) -> dict[Tensor, dict[str, Tensor]]:
    """``exp_avg`` and ``exp_avg_sq`` of each tensor that it updates, created as its first step would."""
    for tensor in tensors:
        if not adamw.state[tensor]:
            moments = {"exp_avg": torch.zeros_like(tensor), "exp_avg_sq": torch.zeros_like(tensor)}
            adamw.state[tensor] = moments
            if isinstance(adamw, torch.optim.AdamW):
                moments["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
            elif not _counts_in_groups(adamw):
                moments["step"] = 0
    return adamw.state


def adamw_steps(adamw: torch.optim.Optimizer) -> int:
    """Updates made so far, as its bias correction counts them."""
    if _counts_in_groups(adamw):
        return max(int(group.get("step", 0)) for group in adamw.param_groups)
    return max(int(state["step"]) for state in adamw.state.values())


def set_adamw_steps(adamw: torch.optim.Optimizer, steps: int) -> None:
    """Let its bias correction go on from ``steps`` updates; its states are there."""
    if _counts_in_groups(adamw):
        for group in adamw.param_groups:
            group["step"] = steps
        return
    for state in adamw.state.values():
        if isinstance(state["step"], Tensor):
            state["step"].fill_(steps)
        else:
            state["step"] = steps


def _counts_in_groups(adamw: torch.optim.Optimizer) -> bool:
    return type(adamw).__module__.startswith("apex.")
