"""The pieces of fp32 master weights and optimizer states that this rank holds, by logical name.

Tensor parallelism gives a rank some rows or columns of a logical tensor, and ZeRO a range of those, flattened. What
several ranks hold, one of them owns: replicas of a tensor-parallel slice, and, without ZeRO, all data-parallel ranks.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megamtp.engine.engine import Engine
from megamtp.engine.optimizer import adamw_states, adamw_steps, set_adamw_steps
from megamtp.model.model import sharded_parameters
from megamtp.parallel.tensor import Shard

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """Views into the optimizer's memory: writing to ``tensors`` changes the training state."""

    name: str
    shape: tuple[int, ...]  # of the whole logical tensor
    start: int  # first element, counted row by row inside ``columns``
    tensors: dict[str, Tensor]  # "weight", "exp_avg", "exp_avg_sq": flat fp32, the same length
    is_owner: bool  # of all ranks that hold these elements, this one saves them
    columns: tuple[int, int] | None = None  # of the last dimension, over which the elements run; none = all

    @property
    def stop(self) -> int:
        return self.start + self.tensors["weight"].numel()


def fragments(engine: Engine) -> Iterator[Fragment]:
    """Every fragment on this rank. Creates optimizer states that no step has created yet, as zeros."""
    states, grid = _optimizer_states(engine), engine.grid
    for index, (name, parameter, shard) in enumerate(sharded_parameters(engine.layers)):
        owner = shard.replica == 0
        if parameter in states:  # no ZeRO: the replicas take turns
            owner &= index % grid.dp_size == grid.dp_rank
            master, here, first = parameter.data.view(-1), slice(None), 0
            state = {key: states[parameter][key].view(-1) for key in MOMENTS}
        else:
            place = _place(engine, parameter, shard)
            if place is None:  # the whole parameter lies in other ranks' partitions
                continue
            flat, here, first = place
            master, state = flat.data, states[flat]
        tensors = {"weight": master[here]} | {key: state[key][here] for key in MOMENTS}
        yield _fragment(name, shard, first, tensors, owner)


def _fragment(name: str, shard: Shard, first: int, tensors: dict[str, Tensor], owner: bool) -> Fragment:
    """From an offset in this rank's flattened slice to one in the logical tensor."""
    if shard.length is not None and shard.dim == 1:
        return Fragment(name, shard.shape, first, tensors, owner, (shard.start, shard.start + shard.length))
    return Fragment(name, shard.shape, shard.start * math.prod(shard.shape[1:]) + first, tensors, owner)


def _place(engine: Engine, parameter: torch.nn.Parameter, shard: Shard) -> tuple[Tensor, slice, int] | None:
    """(ZeRO's flat tensor, where in it a part of ``parameter`` lies, that part's offset in the parameter)."""
    optimizer = engine.deepspeed.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3 cuts each parameter into equal, padded parts
        group, begin, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
        first = engine.grid.dp_rank * padded
        length = min(padded, math.prod(shard.local_shape) - first)
        flat = optimizer.fp32_partitioned_groups_flat[group]
        return (flat, slice(begin, begin + length), first) if length > 0 else None
    mapping = parameter._hp_mapping  # ZeRO-1 and 2 cut a group of concatenated parameters
    if mapping is None:
        return None
    here = mapping.get_hp_fragment_address()
    flat = _flat_partitions(engine)[mapping.param_group_index]
    return flat, slice(here.start, here.start + here.numel), mapping.lp_fragment_address.start


def optimizer_steps(engine: Engine) -> int:
    """Updates made so far: AdamW's own count, which its bias correction uses."""
    _optimizer_states(engine)
    return adamw_steps(engine.deepspeed.basic_optimizer)


def fragments_changed(engine: Engine, steps: int) -> None:
    """Call after writing into fragments: sets AdamW's count and refreshes the weights that the model computes with."""
    _optimizer_states(engine)
    set_adamw_steps(engine.deepspeed.basic_optimizer, steps)
    optimizer = engine.deepspeed.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:  # small ones, which every rank holds whole
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif engine.deepspeed.zero_optimization():
        optimizer.update_lp_params()


def _optimizer_states(engine: Engine) -> dict[Tensor, dict[str, Tensor]]:
    """AdamW's state of each tensor that it updates: parameters, or ZeRO's flat partitions."""
    adamw = engine.deepspeed.basic_optimizer
    tensors = _flat_partitions(engine) or [p for group in adamw.param_groups for p in group["params"]]
    return adamw_states(adamw, tensors)


def _flat_partitions(engine: Engine) -> list[Tensor]:
    """ZeRO's fp32 master weights on this rank; none without ZeRO."""
    optimizer = engine.deepspeed.optimizer
    for name in (
        "fp32_groups_flat_partition",  # BF16_Optimizer: bf16 with ZeRO-1
        "single_partition_of_fp32_groups",  # DeepSpeedZeroOptimizer: ZeRO-1 and 2
        "fp32_partitioned_groups_flat",  # DeepSpeedZeroOptimizer_Stage3
    ):
        if hasattr(optimizer, name):
            return getattr(optimizer, name)
    return []
