"""The peak of a training step on this rank, as the CPU's allocator sees it, beside what the planner says."""

import functools
import os
import sys
import time
from pathlib import Path

import torch.distributed as dist

from megamtp.parallel.environment import launch_environment
from megamtp.parallel.groups import ParallelConfig
from megamtp.planner.stages import plan_stages

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
CHUNK = 128
MODEL = dict(vocab_size=2048, dim=256, n_heads=4, n_layers=6, n_future_tokens=2)
SEQ_LEN, MICRO_BATCH, MICRO_BATCHES = 256, 2, 4


def peak_and_estimate(
    parallel: ParallelConfig, precision: str = "fp32", recompute: str = "none", replicated: bool = False
) -> tuple[int, int]:
    """Bytes at the peak of a step, and the estimate; both without the buckets, which would hide an error.

    Call it in a process of its own.
    """
    os.environ["KINETO_LOG_LEVEL"] = "99"
    sys.path.append(BENCHMARKS)
    import heads_memory
    from scaling import Run, Size

    from megamtp.model.heads import HeadsConfig
    from megamtp.model.transformer import ModelConfig

    world_size = launch_environment().world_size
    dp_size, heads = parallel.data_parallel(world_size), HeadsConfig(chunk_tokens=CHUNK)
    _free_messages_on_this_thread()
    heads_memory.Run = functools.partial(Run, recompute=recompute)
    model = MODEL | dict(replicated_unembedding=replicated)
    size = Size(model, SEQ_LEN, MICRO_BATCH, MICRO_BATCH * MICRO_BATCHES * dp_size)
    memory = heads_memory.measured_step(size, heads_memory.Case(parallel, precision), heads)
    stages = plan_stages(
        ModelConfig(**model),
        heads,
        parallel,
        seq_len=SEQ_LEN,
        micro_batch_size=MICRO_BATCH,
        micro_batches=MICRO_BATCHES,
        precision=precision,
        dp_size=dp_size,
        recompute=recompute,
    )
    pp_rank = dist.get_rank() // (parallel.tensor * dp_size)
    estimate = next(stage.rank_memory for stage in stages if stage.rank == pp_rank)
    return memory.peak, estimate.total - memory.buckets


def _free_messages_on_this_thread() -> None:
    """The profiler does not see what gloo's threads are the last to free; DeepSpeed's messages get time to end.

    A reduce-scatter is made from an all-reduce, as gloo makes it, without the copies that its threads free.
    """

    class Done:
        def wait(self, *_):
            return True

        def is_completed(self):
            return True

    def settled(send):
        def call(*args, async_op=False, **options):
            send(*args, **options)
            time.sleep(0.003)
            return Done() if async_op else None

        return call

    all_reduce = settled(dist.all_reduce)

    def reduce_scatter(out, parts, op=dist.ReduceOp.SUM, group=None, async_op=False, **_):
        all_reduce(parts, op=op, group=group)
        out.copy_(parts.view(dist.get_world_size(group), -1)[dist.get_rank(group)].view(out.shape))
        return Done() if async_op else None

    names = ["all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "all_gather_single"]
    for name in names:
        if hasattr(dist, name):
            setattr(dist, name, settled(getattr(dist, name)))
    for name in ("reduce_scatter_tensor", "reduce_scatter_single"):
        if hasattr(dist, name):
            setattr(dist, name, reduce_scatter)
