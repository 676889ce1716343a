"""From a validated config to a running (or described) training: what ``pretrain.py`` calls."""

import sys
from dataclasses import asdict

import torch

from megamtp.config import dump
from megamtp.data.loader import Loader
from megamtp.model.cost import parameters, train_flops_per_token
from megamtp.model.model import MultiTokenModel
from megamtp.parallel.groups import launch_environment
from megamtp.planner.memory import estimate_memory
from megamtp.training.host_memory import keep_freed_memory
from megamtp.training.loop import open_samples, train
from megamtp.training.run_config import RunConfig


def pretrain(config: RunConfig, dry_run: bool = False) -> int:
    """Start this rank's part of the run and return the exit code. Raises ``UserError`` before any work is lost."""
    rank, world_size, _ = launch_environment()
    if dry_run:
        samples, _ = open_samples(config)
        Loader(samples, config.training.global_batch_size, config.training.micro_batch_size, rank, world_size)
        with torch.device("meta"):
            model = MultiTokenModel(config.model, config.heads, config.ops)
        if rank == 0:
            print(describe_run(config, world_size))
            print(f"parameter tensors: {len(list(model.parameters()))}")
        return 0
    on_cpu = not torch.cuda.is_available()
    if on_cpu and rank == 0:
        print(keep_freed_memory(), file=sys.stderr)
    elif on_cpu:
        keep_freed_memory()

    from megamtp.engine.launch import start_processes, stop_processes

    grid = start_processes(config.parallel, config.model.kv_heads)
    code = train(config, grid)
    stop_processes()
    return code


def describe_run(config: RunConfig, world_size: int) -> str:
    """What ``--dry-run`` prints: the resolved config, parameters by part, FLOPs per token, memory estimate."""
    count = parameters(config.model)
    parts = {name: value for name, value in asdict(count).items()} | {"total": count.total}
    memory = estimate_memory(
        config.model,
        config.heads,
        seq_len=config.data.seq_len,
        micro_batch_size=config.training.micro_batch_size,
        precision=config.training.precision,
        zero_stage=config.parallel.zero_stage,
        dp_size=world_size,
    )
    flops = train_flops_per_token(config.model, config.data.seq_len)
    tokens = config.training.steps * config.training.global_batch_size * config.data.seq_len
    sizes = asdict(memory) | {"total": memory.total}
    return "\n".join(
        [
            dump(config),
            _table("parameters", {name: f"{value:,}" for name, value in parts.items()}),
            _table("memory estimate of one rank, MiB", {k: f"{v / 2**20:,.1f}" for k, v in sizes.items()}),
            f"training FLOPs per token: {flops:,.0f}",
            f"tokens of the whole run: {tokens:,}",
        ]
    )


def _table(title: str, rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return f"{title}:\n" + "\n".join(f"  {name:<{width}} {value:>16}" for name, value in rows.items())
