"""From the configs to this rank's engine."""

import torch

from megamtp.engine.engine import Engine, Precision
from megamtp.engine.optimizer import OptimizerConfig
from megamtp.model.cut import choose_cut
from megamtp.model.heads import HeadsConfig
from megamtp.model.model import build_model
from megamtp.model.transformer import ModelConfig
from megamtp.ops.choice import OpsConfig, backend
from megamtp.parallel.groups import ParallelConfig, ProcessGrid


def build_engine(
    model: ModelConfig,
    heads: HeadsConfig,
    ops: OpsConfig,
    *,
    grid: ProcessGrid,
    parallel: ParallelConfig,
    optimizer: OptimizerConfig,
    precision: Precision,
    micro_batch_size: int,
    micro_batches: int,
    seq_len: int,
    seed: int | None,
) -> Engine:
    """Build this rank's share of the model (``seed=None``: uninitialised) and its engine. Every rank calls it."""
    options = dict(
        grid=grid,
        parallel=parallel,
        optimizer=optimizer,
        adamw=backend(ops, "adamw"),
        precision=precision,
        micro_batch_size=micro_batch_size,
        micro_batches=micro_batches,
    )
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if parallel.pipeline == 1:
        whole = build_model(model, heads, ops, seed=seed, dtype=dtype, tp=grid.tensor, device=grid.device)
        return Engine(whole, **options)

    from megamtp.engine.pipeline import DualPipeVStages, PipelineEngine, PipelineStages

    boundaries = choose_cut(model, heads.mode or "sequential", parallel, seq_len, ops.recompute)
    stages = DualPipeVStages if parallel.schedule == "dualpipev" else PipelineStages
    module = stages(model, heads, ops, grid=grid, boundaries=boundaries, seed=seed, dtype=dtype)
    return PipelineEngine(module, **options)
