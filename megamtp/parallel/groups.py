"""The layout of the processes, as a value that is passed in; nobody looks it up in a global."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.distributed as dist
from pydantic import Field

from megamtp.config import config_dataclass, option
from megamtp.errors import UserError
from megamtp.parallel.tensor import TensorParallel

PositiveInt = Annotated[int, Field(ge=1)]


@config_dataclass
class ParallelConfig:
    """The layout: the only section that changes from a laptop to a cluster. DP = world size / (tensor x pipeline)."""

    tensor: PositiveInt = option(1, "ranks that split every matrix and the vocabulary (TP); keep them in one node")
    pipeline: PositiveInt = option(1, "ranks that the layers are cut over (PP)")
    sequence: bool | None = option(None, "sequence parallelism: norms on a slice of the sequence; null = on with TP")
    schedule: Literal["1f1b", "dualpipev"] = option(
        "1f1b", "of the pipeline; dualpipev: first and last stage on one rank, 2 x pipeline stages"
    )
    pipeline_cut: list[Annotated[int, Field(ge=0)]] | None = option(
        None, "trunk layers of each stage, first to last; null = the cut whose slowest stage is fastest"
    )
    zero_stage: Annotated[int, Field(ge=0, le=3)] = option(
        1, "what DP ranks share out: 0 nothing; 1 optimizer states; 2 and gradients; 3 and weights"
    )
    offload_optimizer: bool = option(False, "keep optimizer states in host memory (ZeRO 1-3)")

    def __post_init__(self):
        if self.pipeline > 1 and self.zero_stage > 1:
            raise ValueError(
                f"parallel.zero_stage {self.zero_stage} does not go with parallel.pipeline {self.pipeline}: "
                "the pipeline accumulates whole gradients over its micro-batches; use zero_stage 0 or 1, or pipeline 1"
            )
        if self.pipeline == 1 and self.schedule == "dualpipev":
            raise ValueError("parallel.schedule dualpipev needs parallel.pipeline of 2 or more; use 1f1b")
        if self.pipeline_cut is not None and len(self.pipeline_cut) != self.stages:
            raise ValueError(
                f"parallel.pipeline_cut has {len(self.pipeline_cut)} entries; {self.schedule} over {self.pipeline} "
                f"ranks has {self.stages} stages"
            )
        if self.sequence and self.tensor == 1:
            raise ValueError("parallel.sequence needs parallel.tensor of 2 or more; leave it out or raise tensor")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("parallel.offload_optimizer needs parallel.zero_stage 1, 2 or 3")

    @property
    def stages(self) -> int:
        """Pieces that the list of layers is cut into; DualPipeV gives each rank two."""
        return self.pipeline * (2 if self.schedule == "dualpipev" else 1)

    def data_parallel(self, world_size: int) -> int:
        """DP size: what is left of ``world_size``. ``UserError`` where nothing fits."""
        model = self.tensor * self.pipeline
        if world_size % model:
            raise UserError(
                f"{world_size} ranks do not make whole replicas of parallel.tensor {self.tensor} x "
                f"parallel.pipeline {self.pipeline} = {model} ranks; start {-(-world_size // model) * model} ranks, "
                "or change the layout"
            )
        return world_size // model

    def reads_data(self, pp_rank: int) -> bool:
        """Whether this pipeline rank holds the first stage (tokens) or the last (targets); DualPipeV: rank 0 both."""
        return pp_rank == 0 or (self.schedule == "1f1b" and pp_rank == self.pipeline - 1)

    @property
    def sequence_parallel(self) -> bool:
        return self.tensor > 1 if self.sequence is None else self.sequence


@dataclass(frozen=True)
class ProcessGrid:
    """Which process this is, and its neighbours along each dimension of the layout.

    Ranks count TP first, then DP, then PP: the chattiest neighbours are nearest (DeepSpeed's order, too).
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    dp_rank: int
    dp_size: int
    dp_group: dist.ProcessGroup
    pp_rank: int
    pp_size: int
    tensor: TensorParallel
    model_rank: int  # among the ranks that together hold one replica
    model_group: dist.ProcessGroup  # those

    @classmethod
    def build(
        cls, parallel: ParallelConfig, kv_heads: int, *, rank: int, world_size: int, local_rank: int, device
    ) -> "ProcessGrid":
        """Create this process's groups. Every rank calls it. ``UserError`` for a world that does not fit."""
        dp_size = parallel.data_parallel(world_size)
        tp_size, pp_size = parallel.tensor, parallel.pipeline
        ranks = torch.arange(world_size).view(pp_size, dp_size, tp_size)
        pp_rank, dp_rank, tp_rank = (index.item() for index in (ranks == rank).nonzero()[0])

        def group(members: torch.Tensor) -> dist.ProcessGroup:
            members = members.flatten().tolist()
            if len(members) == world_size:
                return dist.group.WORLD
            return dist.new_group(members, use_local_synchronization=True)

        replicas = max(1, tp_size // kv_heads)
        tp_ranks = ranks[pp_rank, dp_rank]
        kv_start = tp_rank // replicas * replicas
        return cls(
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            device=device,
            dp_rank=dp_rank,
            dp_size=dp_size,
            dp_group=group(ranks[pp_rank, :, tp_rank]),
            pp_rank=pp_rank,
            pp_size=pp_size,
            tensor=TensorParallel(
                rank=tp_rank,
                size=tp_size,
                group=group(tp_ranks),
                sequence_parallel=parallel.sequence_parallel,
                kv_group=group(tp_ranks[kv_start : kv_start + replicas]) if replicas > 1 else None,
                kv_replicas=replicas,
            ),
            model_rank=pp_rank * tp_size + tp_rank,
            model_group=group(ranks[:, dp_rank]),
        )

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """All-reduce ``values`` in place over the whole world."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values
