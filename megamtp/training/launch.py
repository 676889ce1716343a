"""From a validated config to a running (or described) training: what ``pretrain.py`` calls."""

import sys
from dataclasses import asdict

import torch

from megamtp.config import dump
from megamtp.data.datasets import describe_data
from megamtp.host_memory import keep_freed_memory
from megamtp.model.cost import parameters, train_flops_per_token
from megamtp.model.model import MultiTokenModel
from megamtp.parallel.environment import launch_environment
from megamtp.planner.estimate import estimate_run, stages_and_traffic
from megamtp.planner.stages import stage_table
from megamtp.training.device import check_kernels, choose_chunk, choose_kernels, grow_segments
from megamtp.training.loop import open_run_data, train
from megamtp.training.run_config import RunConfig


def pretrain(config: RunConfig, dry_run: bool = False) -> int:
    """Start this rank's part of the run and return the exit code. Raises ``UserError`` before any work is lost."""
    rank, world_size, *_ = launch_environment()
    micro_batches = config.micro_batches(world_size)
    grow_segments()
    config, kernels = choose_kernels(config)
    if torch.cuda.is_available():
        gpu_bytes = torch.cuda.get_device_properties(0).total_memory
        config = choose_chunk(config, stages_and_traffic(config, world_size)[0], gpu_bytes)
    if dry_run:
        data = open_run_data(config)
        with torch.device("meta"):
            model = MultiTokenModel(config.model, config.heads_of_layout, config.ops)
        if rank == 0:
            print(describe_run(config, world_size, micro_batches))
            print(f"parameter tensors: {len(list(model.parameters()))}")
            print(kernels)
            print(describe_data(data, config.training.steps * config.training.global_batch_size))
        return 0
    on_cpu = not torch.cuda.is_available()
    if rank == 0:
        print(kernels)
        estimate = estimate_run(config, world_size, None if on_cpu else torch.cuda.get_device_name())
        if config.parallel.stages > 1:
            print(stage_table(estimate.stages))
        print(estimate.summary(), flush=True)
    if on_cpu and rank == 0:
        print(keep_freed_memory(), file=sys.stderr)
    elif on_cpu:
        keep_freed_memory()

    from megamtp.engine.launch import start_processes, stop_processes

    grid = start_processes(config.parallel, config.model.kv_heads)
    check_kernels(config, grid)
    code = train(config, grid)
    stop_processes()
    return code


def describe_run(config: RunConfig, world_size: int, micro_batches: int) -> str:
    """What ``--dry-run`` prints: the resolved config, parameters by part, FLOPs per token, layout, memory estimate."""
    count, layout = parameters(config.model), config.parallel
    parts = {name: value for name, value in asdict(count).items()} | {"total": count.total}
    estimate = estimate_run(config, world_size)
    fullest = estimate.memory.tensors
    flops = train_flops_per_token(config.model, config.data.seq_len)
    tokens = config.training.steps * config.training.global_batch_size * config.data.seq_len
    sizes = asdict(fullest) | {"total": fullest.total}
    return "\n".join(
        [
            dump(config),
            _table("parameters", {name: f"{value:,}" for name, value in parts.items()}),
            f"layout: {world_size} ranks = TP {layout.tensor} x PP {layout.pipeline} x "
            f"DP {layout.data_parallel(world_size)}; {micro_batches} micro-batches a step; "
            f"heads: {config.heads_of_layout.mode}",
            *([stage_table(estimate.stages)] if layout.stages > 1 else []),
            _table(
                "memory estimate of one rank (the fullest), MiB", {k: f"{v / 2**20:,.1f}" for k, v in sizes.items()}
            ),
            f"training FLOPs per token: {flops:,.0f}",
            f"tokens of the whole run: {tokens:,}",
        ]
    )


def _table(title: str, rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return f"{title}:\n" + "\n".join(f"  {name:<{width}} {value:>16}" for name, value in rows.items())
