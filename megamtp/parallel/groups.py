"""The layout of the processes, as a value that is passed in; nobody looks it up in a global."""

import os
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.distributed as dist
from pydantic import Field

from megamtp.config import config_dataclass, option


@config_dataclass
class ParallelConfig:
    """The layout: the only section that changes from a laptop to a cluster."""

    zero_stage: Annotated[int, Field(ge=0, le=1)] = option(
        1, "0: every rank holds all optimizer states; 1: each data-parallel rank holds its share"
    )


@dataclass(frozen=True)
class ProcessGrid:
    """Which process this is. ``dp`` counts the data-parallel replicas."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    dp_rank: int
    dp_size: int
    dp_group: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_over_dp(self, values: torch.Tensor) -> torch.Tensor:
        """All-reduce ``values`` in place over the data-parallel ranks."""
        if self.dp_size > 1:
            dist.all_reduce(values, group=self.dp_group)
        return values


def launch_environment() -> tuple[int, int, int]:
    """(rank, world size, local rank) as torchrun sets them; (0, 1, 0) for a plain ``python``."""
    return tuple(int(os.environ.get(name, default)) for name, default in _LAUNCH_VARIABLES)


_LAUNCH_VARIABLES = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
