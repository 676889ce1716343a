"""From a validated config to a running (or described) training: what ``pretrain.py`` calls."""

import sys

import torch

from megamtp.errors import UserError
from megamtp.model.model import MultiTokenModel, logical_parameters
from megamtp.parallel.groups import launch_environment
from megamtp.training.host_memory import keep_freed_memory
from megamtp.training.loop import describe_run, open_samples, train
from megamtp.training.run_config import RunConfig


def pretrain(config: RunConfig, dry_run: bool = False) -> int:
    """Start this rank's part of the run and return the exit code. Raises ``UserError`` before any work is lost."""
    rank, world_size, _ = launch_environment()
    if dry_run:
        open_samples(config)
        _build_on_meta(config)
        if rank == 0:
            print(describe_run(config, world_size))
        return 0
    on_cpu = not torch.cuda.is_available()
    if on_cpu and rank == 0:
        print(keep_freed_memory(), file=sys.stderr)
    elif on_cpu:
        keep_freed_memory()

    from megamtp.engine.launch import start_processes, stop_processes

    grid = start_processes()
    code = train(config, grid)
    stop_processes()
    return code


def _build_on_meta(config: RunConfig) -> None:
    with torch.device("meta"):
        model = MultiTokenModel(config.model, config.heads, config.ops)
    if not list(logical_parameters(model)):
        raise UserError("the model has no parameters")
