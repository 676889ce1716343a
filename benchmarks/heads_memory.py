"""Does the peak of a training step grow with the number of heads? 4 trunk layers + n heads, n = 2 against 8, 2 ranks.

    python benchmarks/heads_memory.py     # about 6 minutes on 2 cores; --quick for a look

What is compared is the peak *above weights, gradients and optimizer states*: they belong to the parameters, of which
8 heads have more. Every allocation and release of the CPU allocator from the building of the engine on is recorded
(PyTorch's profiler, which hooks the allocator: temporaries inside operators count, and so do DeepSpeed's buffers).
The peak lies between the beginning of the last step and its update. What is subtracted are the tensors that exist when
the heads of its last micro-batch begin: parameters, their gradients, and all tensors of the optimizer, each storage
once.

Not in it: the buffers of constant size in which DeepSpeed's ZeRO collects gradients (``reduce_bucket_size``), which are
shown apart, and would hide any growth at this size. A CPU never touches most of their pages; a GPU allocates them.

Under ZeRO-2 the sequential heads keep their gradients from their forward pass to the backward pass, beside the sum of
the micro-batches before: these are in the peak and in ``growth_max``, and shown apart. Elsewhere they add to that sum.

With a pipeline the last stage is measured, and 2 of the 4 trunk layers are on it for both n. Under ZeRO-3 the heads run
in the joint mode, which keeps every head's activations; elsewhere they are sequential.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from scaling import Ranks, Run, Size, process_context, report
from torch.profiler import ProfilerActivity, profile, record_function

from megamtp.engine.engine import Engine
from megamtp.model.cost import layer_parameters
from megamtp.model.heads import HeadsConfig, MultiTokenHeads
from megamtp.model.transformer import ModelConfig
from megamtp.parallel import tensor
from megamtp.parallel.groups import ParallelConfig

TRUNK, STEPS = 4, 2
NUMBERS = (2, 8)  # of heads
CHUNK = 512
LIMIT = 1.10


class Case(NamedTuple):
    parallel: ParallelConfig
    precision: str = "fp32"
    ranks: int = 2


CASES = {
    "PP 2": Case(ParallelConfig(pipeline=2, pipeline_cut=[2, 2], zero_stage=0)),
    "PP 2, ZeRO-1": Case(ParallelConfig(pipeline=2, pipeline_cut=[2, 2], zero_stage=1)),
    "PP 2, ZeRO-1, bf16": Case(ParallelConfig(pipeline=2, pipeline_cut=[2, 2], zero_stage=1), "bf16"),
    "TP 2": Case(ParallelConfig(tensor=2, sequence=False, zero_stage=0)),
    "TP 2, sequence": Case(ParallelConfig(tensor=2, sequence=True, zero_stage=0)),
    "DP 2": Case(ParallelConfig(zero_stage=0)),
    "DP 2, ZeRO-1": Case(ParallelConfig(zero_stage=1)),
    "DP 2, ZeRO-1, bf16": Case(ParallelConfig(zero_stage=1), "bf16"),
    "DP 2, ZeRO-2": Case(ParallelConfig(zero_stage=2)),
    "DP 2, ZeRO-3, joint": Case(ParallelConfig(zero_stage=3)),
}


def size_of(n: int, quick: bool, micro_batches: int, dp_size: int) -> Size:
    """The step for n heads: the micro-batch of a rank is the same in every layout."""
    if quick:
        model = dict(vocab_size=1024, dim=64, n_heads=4)
        seq_len, micro_batch = 128, 2
    else:
        model = dict(vocab_size=8192, dim=256, n_heads=8)
        seq_len, micro_batch = 512, 4
    model |= dict(n_layers=TRUNK + n, n_future_tokens=n)
    return Size(model, seq_len, micro_batch, micro_batch * micro_batches * dp_size)


class Memory(NamedTuple):
    """Bytes of one rank in the last step."""

    peak: int
    parameters: int
    gradients: int  # p.grad and, under ZeRO, what is kept of the reduced ones
    optimizer: int  # all else that the optimizer holds
    buckets: int  # DeepSpeed's buffers for gradients on their way, not in the peak

    @property
    def above(self) -> int:
        return self.peak - self.parameters - self.gradients - self.optimizer


class _Done:
    def wait(self) -> None:
        pass


def _release_on_this_thread() -> None:
    """Make tensor parallelism's messages wait until gloo's threads hold none of their tensors any more.

    The profiler sees nothing of those threads. What they are the last to free, and gloo's copies for a
    reduce-scatter always are, would count as live for ever.
    """

    def settled(send: Callable) -> Callable:
        def call(*args, async_op: bool = False, **options):
            result = send(*args, **options)
            time.sleep(0.003)
            return _Done() if async_op else result

        return call

    def reduce_scatter(out: torch.Tensor, parts: torch.Tensor, group) -> None:
        summed = parts.clone()
        dist.all_reduce(summed, group=group)
        time.sleep(0.003)
        out.copy_(summed.chunk(dist.get_world_size(group))[dist.get_rank(group)])

    tensor._all_gather_single = settled(tensor._all_gather_single)
    tensor._reduce_scatter_single = settled(reduce_scatter)
    tensor.dist = SimpleNamespace(**{**vars(dist), "all_reduce": settled(dist.all_reduce)})


def measured_step(size: Size, case: Case, heads: HeadsConfig) -> Memory:
    """Run some steps on this rank; of the last one (memory, what is live at the peak by the operator that made it)."""
    _release_on_this_thread()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run = Run(size, case.parallel, precision=case.precision, heads=heads)
        clip, held = run.engine._clip_gradients, [(0, 0, 0)]

        def before_update():
            with record_function("before the update"):
                return clip()

        run.engine._clip_gradients = before_update
        for _, layer in run.engine.layers:
            if isinstance(layer, MultiTokenHeads):
                layer.loss = _watched(layer.loss, run.engine, held)
        for _ in range(STEPS):
            with record_function("step"):
                run.step()
    events = recorded.profiler.kineto_results.events()
    begin = [event.start_ns() for event in events if event.name() == "step"][-1]
    end = [event.start_ns() for event in events if event.name() == "before the update"][-1]
    allocations = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    bucket = getattr(run.engine.deepspeed.optimizer, "reduce_bucket_size", 0)
    live = peak = in_buckets = buckets = 0
    for when, change in allocations:
        if when >= end:
            break
        if bucket and abs(change) in (2 * bucket, 4 * bucket):
            in_buckets += change
        else:
            live += change
        if when >= begin:
            peak, buckets = max(peak, live), max(buckets, in_buckets)
    return Memory(peak, *held[-1], buckets=buckets)


def _watched(loss: Callable, engine: Engine, held: list) -> Callable:
    """``loss`` of the heads, which first notes what is held."""

    def call(*args):
        held.append(_held(engine))
        return loss(*args)

    return call


def _held(engine: Engine) -> tuple[int, int, int]:
    """Bytes of (parameters, gradients, what else the optimizer holds), each storage once."""
    seen: set[int] = set()

    def count(tensors: Iterable[torch.Tensor]) -> int:
        total = 0
        for storage in (x.untyped_storage() for x in tensors):
            if storage.nbytes() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total += storage.nbytes()
        return total

    parameters = list(engine.module.parameters())
    partitions = [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]  # ZeRO-3
    reduced = [grad for _, grads in engine.gradients() for grad in grads]
    return (
        count([*parameters, *partitions]),
        count([p.grad for p in parameters if p.grad is not None] + reduced),
        count(_tensors([vars(engine.deepspeed.optimizer), vars(engine.deepspeed.basic_optimizer)])),
    )


def _tensors(value: Any) -> list[torch.Tensor]:
    """All tensors in nested dictionaries, lists, tuples and sets."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    return [x for item in value for x in _tensors(item)] if isinstance(value, (list, tuple, set)) else []


def worker(pipe, size: Size, case: Case, variables: dict[str, str]) -> None:
    """Answer once, with this rank's ``Memory``."""
    os.environ.update(variables)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)  # DeepSpeed prints
    torch.set_num_threads(1)
    pipe.recv()
    pipe.send(measured_step(size, case, HeadsConfig(chunk_tokens=CHUNK)))
    pipe.recv()


def measure(context, case: Case, n: int, options: argparse.Namespace) -> Memory:
    """Of the last rank: with a pipeline the last stage."""
    dp_size = case.parallel.data_parallel(case.ranks)
    ranks = Ranks(context, size_of(n, options.quick, options.micro_batches, dp_size), case, worker)
    result = ranks.ask("measure")[-1]
    ranks.close()
    return result


def stored_gradients(case: Case, size: Size) -> int:
    """Bytes of the heads' gradients that wait for the backward pass beside those of earlier micro-batches."""
    if case.parallel.zero_stage != 2:
        return 0
    config = ModelConfig(**size.model)
    return layer_parameters(config, case.parallel.tensor)[-1] * (4 if case.precision == "fp32" else 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--micro-batches", type=int, default=2, help="of a step on each rank (default: %(default)s)")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--quick", action="store_true", help="a tiny model, whose figures say little")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    os.environ["KINETO_LOG_LEVEL"] = "99"
    context, rows = process_context(), {}
    few, many = NUMBERS
    print(f"{options.micro_batches} micro-batches, {size_of(few, options.quick, options.micro_batches, 1)}")
    print(f"{'MB above weights, gradients, optimizer':38}{f'n = {few}':>10}{f'n = {many}':>10}{'growth':>9}", end="")
    print(f"{'stored gradients':>19}{'growth without':>16}{'buckets':>9}")
    for name in options.cases:
        case = CASES[name]
        memory = {n: measure(context, case, n, options) for n in NUMBERS}
        above = {n: memory[n].above for n in NUMBERS}
        stored = {n: stored_gradients(case, size_of(n, options.quick, options.micro_batches, 1)) for n in NUMBERS}
        row = {
            "growth": above[many] / above[few],
            "growth_without_stored": (above[many] - stored[many]) / (above[few] - stored[few]),
            "above": above,
            "stored_gradients": stored,
            "memory": {n: memory[n]._asdict() for n in NUMBERS},
        }
        rows[name] = row
        print(f"{name:38}{above[few] / 1e6:10.1f}{above[many] / 1e6:10.1f}{row['growth']:9.3f}", end="")
        print(f"{stored[few] / 1e6:9.1f}{stored[many] / 1e6:10.1f}{row['growth_without_stored']:16.3f}", end="")
        print(f"{memory[many].buckets / 1e6:9.0f}", flush=True)
    sequential = [row for name, row in rows.items() if CASES[name].parallel.zero_stage < 3]
    result = {
        "growth_max": max((row["growth"] for row in sequential), default=None),
        "growth_max_without_stored": max((row["growth_without_stored"] for row in sequential), default=None),
        "all_within_limit": all(row["growth"] <= LIMIT for row in sequential),
        "limit": LIMIT,
        "micro_batches": options.micro_batches,
        "layouts": rows,
    }
    report(result, options.output)


if __name__ == "__main__":
    main()
