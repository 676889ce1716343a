"""Start DeepSpeed's communication in this process, under any launcher or alone."""

import logging
import os
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist

from megamtp.errors import UserError
from megamtp.parallel.environment import launch_environment, set_rendezvous
from megamtp.parallel.groups import ParallelConfig, ProcessGrid

TIMEOUT = timedelta(minutes=10)  # for ranks that never come, and for the neighbours of one that hangs at start


def start_processes(parallel: ParallelConfig | None = None, kv_heads: int = 1) -> ProcessGrid:
    """Join the other ranks (NCCL on GPUs, gloo on CPUs) and return this process's place in the layout.

    Call before ``build_engine``; ``stop_processes`` undoes it. ``kv_heads`` of the model decide which ranks share
    key/value heads. Raises ``UserError`` where the launcher's variables or the number of ranks do not fit.
    """
    environment = launch_environment()
    rank, world_size, local_rank, _ = environment
    set_rendezvous(environment)
    use_cuda = torch.cuda.is_available()
    if use_cuda:
        local_rank = _device_index(local_rank)
    # DeepSpeed reads these when it is imported: without the first it probes for accelerators (seconds), its engine
    # insists on the second even in a single process, and that the third, where there is one, is the same.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if use_cuda else "cpu")
    os.environ["LOCAL_RANK"] = str(local_rank)
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:
        os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(local_rank)
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    elif world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        # torchrun says 1, deepspeed and mpirun nothing: each rank would start a thread per core.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world_size))
    if not dist.is_initialized():
        backend = "nccl" if use_cuda else "gloo"
        if world_size > 1:
            # Without device_id: with one, NCCL's groups would need every rank of the world to be made.
            dist.init_process_group(backend, timeout=TIMEOUT)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    _tame_deepspeed()
    import deepspeed

    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)  # takes over the group that is there
    return ProcessGrid.build(
        parallel or ParallelConfig(),
        kv_heads,
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        device=device,
    )


def _device_index(local_rank: int) -> int:
    """Of this rank's GPU among those that it sees: all of the node's, or one (``srun --gpus-per-task=1``)."""
    count = torch.cuda.device_count()
    if count > 1 and local_rank >= count:
        raise UserError(f"local rank {local_rank}: this node shows {count} GPUs; start at most {count} ranks on it")
    return local_rank if count > 1 else 0


def set_timeouts(timeout: timedelta) -> None:
    """How long the ranks of every group that exists may wait for each other from now on. Every rank calls it."""
    # new_group takes a time-out, but DeepSpeed's groups are made by DeepSpeed, with PyTorch's defaults.
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def stop_processes() -> None:
    """Leave the process group, together."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _tame_deepspeed() -> None:
    """Keep its warnings, not its 30 lines of start-up log, and keep it from compiling C++ at start."""
    import deepspeed
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # It calls collectives by names that torch has replaced.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    # On a CPU it would build a shared-memory all-reduce with the machine's compiler, on every rank at once, and
    # fail where there is none. gloo does without.
    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
