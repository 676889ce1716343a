"""The pieces of fp32 master weights and optimizer states that this rank holds, by logical name.

A fragment is a range of a parameter's flattened logical tensor. Under ZeRO-1 each data-parallel rank holds
the ranges that fall into its partition; without ZeRO every rank holds everything and takes turns at owning it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megamtp.engine.engine import Engine
from megamtp.model.model import logical_parameters

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """Views into the optimizer's memory: writing to ``tensors`` changes the training state."""

    name: str
    shape: tuple[int, ...]  # of the whole logical tensor
    start: int  # first element, counted in the flattened logical tensor
    tensors: dict[str, Tensor]  # "weight", "exp_avg", "exp_avg_sq": flat fp32, the same length
    is_owner: bool  # of all ranks that hold these elements, this one saves them

    @property
    def stop(self) -> int:
        return self.start + self.tensors["weight"].numel()


def fragments(engine: Engine) -> Iterator[Fragment]:
    """Every fragment on this rank. Creates optimizer states that no step has created yet, as zeros."""
    states = _optimizer_states(engine)
    grid = engine.grid
    for index, (name, parameter) in enumerate(logical_parameters(engine.module)):
        shape = tuple(parameter.shape)
        if parameter in states:
            state = states[parameter]
            tensors = {"weight": parameter.data} | {key: state[key] for key in MOMENTS}
            tensors = {key: tensor.view(-1) for key, tensor in tensors.items()}
            yield Fragment(name, shape, 0, tensors, is_owner=index % grid.dp_size == grid.dp_rank)
            continue
        mapping = parameter._hp_mapping
        if mapping is None:  # the whole parameter lies in other ranks' partitions
            continue
        flat = _flat_partitions(engine)[mapping.param_group_index]
        here = mapping.get_hp_fragment_address()
        tensors = {"weight": flat.data} | {key: states[flat][key] for key in MOMENTS}
        tensors = {key: tensor.narrow(0, here.start, here.numel) for key, tensor in tensors.items()}
        yield Fragment(name, shape, mapping.lp_fragment_address.start, tensors, is_owner=True)


def optimizer_steps(engine: Engine) -> int:
    """Updates made so far: AdamW's own count, which its bias correction uses."""
    return int(max(state["step"].item() for state in _optimizer_states(engine).values()))


def fragments_changed(engine: Engine, steps: int) -> None:
    """Call after writing into fragments: sets AdamW's count and refreshes the weights that the model computes with."""
    for state in _optimizer_states(engine).values():
        state["step"].fill_(steps)
    if engine.deepspeed.zero_optimization():
        engine.deepspeed.optimizer.update_lp_params()


def _optimizer_states(engine: Engine) -> dict[Tensor, dict[str, Tensor]]:
    """AdamW's state of each tensor that it updates: parameters, or ZeRO's flat partitions."""
    adamw = engine.deepspeed.basic_optimizer
    for group in adamw.param_groups:
        for tensor in group["params"]:
            if not adamw.state[tensor]:
                # What AdamW creates at its first step.
                adamw.state[tensor] = {
                    "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
                    "exp_avg": torch.zeros_like(tensor),
                    "exp_avg_sq": torch.zeros_like(tensor),
                }
    return adamw.state


def _flat_partitions(engine: Engine) -> list[Tensor]:
    optimizer = engine.deepspeed.optimizer
    if hasattr(optimizer, "fp32_groups_flat_partition"):  # BF16_Optimizer
        return optimizer.fp32_groups_flat_partition
    return optimizer.single_partition_of_fp32_groups  # DeepSpeedZeroOptimizer
