"""The same short training in every layout, against plain autograd and AdamW in one process.

``run_cases`` trains the cases (see ``cases.py``) on ranks that are already there,
``reference`` trains in this process without engine, split layers, chunked loss or fused optimizer, and ``errors``
says how far apart the two are. ``python -m tests.parallel.matrix`` prints the table.
"""

import functools
import gc
import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from megamtp.engine.build import build_engine
from megamtp.engine.engine import Engine
from megamtp.engine.fragments import fragments
from megamtp.engine.optimizer import OptimizerConfig
from megamtp.model.heads import HeadsConfig
from megamtp.model.model import build_model, logical_parameters
from megamtp.model.transformer import Block
from megamtp.ops.choice import OpsConfig
from megamtp.parallel.groups import ProcessGrid
from tests.distributed import run_ranks
from tests.parallel.cases import GLOBAL_BATCH, IGNORE, SEQ_LEN, Case, held_out_batch, model_config, train_batch

SEED = 3
RATES = [1e-3, 3e-3, 3e-3, 2e-3, 1e-3, 5e-4]
EVALUATE_AFTER = 3  # steps
LOSS_WEIGHTS = [1.0, 0.5, 2.0, 0.75]
# Largest relative errors; of parameters that of each whole tensor, ||a - b|| / ||b||.
TOLERANCE = {"loss": 2e-6, "grad_norm": 1e-5, "parameters": 1e-4, "evaluation": 2e-6, "replicas": 0}


@dataclass
class Training:
    """What a training leaves behind: global values of each step, whole tensors by logical name."""

    losses: list[list[float]] = field(default_factory=list)  # mean per head, by step
    counts: list[list[int]] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    skipped: list[bool] = field(default_factory=list)
    weights: list[dict[str, np.ndarray]] = field(default_factory=list)  # at the end; of a poisoned case by step
    evaluation: list[float] = field(default_factory=list)
    differing: set[str] = field(default_factory=set)  # names of which two ranks hold different values
    running: dict[str, Any] = field(default_factory=dict)  # as the ranks found it
    seconds: float = 0.0


# --- the reference: nothing of the engine, of the split layers, of the heads' loss or of the optimizer's groups


@functools.cache
def reference(
    n_trunk_layers: int, clip: float = 0.5, skipped_step: int | None = None, replicated: bool = False
) -> Training:
    """The whole global batch at once, in this process."""
    model = build_model(model_config(n_trunk_layers, replicated), ops=OpsConfig(attention="reference"), seed=SEED)
    parameters = dict(logical_parameters(model))
    config = OptimizerConfig()
    groups = [
        {"params": [p for name, p in parameters.items() if "norm" not in name], "weight_decay": config.weight_decay},
        {"params": [p for name, p in parameters.items() if "norm" in name], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=betas, eps=config.eps, foreach=False, fused=False)
    result = Training()
    for step, rate in enumerate(RATES):
        inputs = train_batch(step)
        sums = _summed_losses(model, inputs)
        adamw.zero_grad()
        sum(w * head for w, head in zip(LOSS_WEIGHTS, sums, strict=True)).div(inputs["tokens"].numel()).backward()
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in parameters.values()))
        if clip and norm > clip:
            for parameter in parameters.values():
                parameter.grad *= clip / norm
        for group in adamw.param_groups:
            group["lr"] = rate
        if step != skipped_step:
            adamw.step()
        counts = (inputs["targets"] != IGNORE).sum((1, 2))
        result.losses.append((sums.detach() / counts).tolist())
        result.counts.append(counts.tolist())
        result.grad_norms.append(norm)
        result.skipped.append(step == skipped_step)
        result.weights.append({name: p.detach().numpy().copy() for name, p in parameters.items()})
        if step + 1 == EVALUATE_AFTER:
            with torch.no_grad():
                inputs = held_out_batch()
                counts = (inputs["targets"] != IGNORE).sum((1, 2))
                result.evaluation = (_summed_losses(model, inputs) / counts).tolist()
    return result


def _summed_losses(model, inputs: dict[str, Tensor]) -> Tensor:
    logits = model(**(inputs | {"targets": None}))  # (n, b, s, V)
    pairs = zip(logits, inputs["targets"], strict=True)
    return torch.stack([F.cross_entropy(x.flatten(0, 1), y.flatten(), reduction="sum") for x, y in pairs])


# --- what runs on the ranks


def run_cases(
    grid: ProcessGrid, cases: Iterable[Case], plant: Callable[[], AbstractContextManager] = nullcontext
) -> list[Training] | None:
    """Train all cases, one after another, with ``plant()`` around each; rank 0 returns what came out."""
    results, grids = [], {}
    for case in cases:
        shape = case.tensor, case.pipeline, case.sequence
        if shape not in grids:
            grids[shape] = ProcessGrid.build(
                case.parallel,
                model_config(1).kv_heads,
                rank=grid.rank,
                world_size=grid.world_size,
                local_rank=grid.local_rank,
                device=grid.device,
            )
        try:
            with plant():
                results.append(_train(case, grids[shape]))
        except Exception as error:
            error.add_note(f"case {case}")
            raise
        gc.collect()
    return results if grid.rank == 0 else None


def _train(case: Case, grid: ProcessGrid) -> Training:
    import deepspeed

    started = time.perf_counter()
    deepspeed.utils.groups.mpu = None  # of the engine before this one
    engine = build_engine(
        case.model,
        HeadsConfig(mode=case.mode, loss_weights=LOSS_WEIGHTS, chunk_tokens=24),
        OpsConfig(recompute=case.recompute),
        grid=grid,
        parallel=case.parallel,
        optimizer=OptimizerConfig(clip=case.clip),
        precision=case.precision,
        micro_batch_size=case.micro_batch_size,
        micro_batches=GLOBAL_BATCH // case.data // case.micro_batch_size,
        seq_len=SEQ_LEN,
        seed=SEED,
    )
    result = Training(running=running(engine))
    poison = {"factor": 1.0}

    def poison_gradient(_module, _inputs, out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(lambda grad: grad * poison["factor"])

    if case.poison and case.poison[0] == grid.rank:
        block = next(module for _, layer in engine.layers for module in layer.modules() if isinstance(module, Block))
        # Through what the block multiplied: a parameter's own hook sees nothing of the heads' gradients.
        block.feed_forward.register_forward_hook(poison_gradient)
    for step, rate in enumerate(RATES):
        poison["factor"] = math.nan if case.poison and step == case.poison[1] else 1.0
        step_result = engine.train_step(micro_batches(case, grid, train_batch(step)), rate)
        counts = grid.sum_over_ranks(step_result.counts.clone())
        result.losses.append((grid.sum_over_ranks(step_result.sums.clone()) / counts).tolist())
        result.counts.append(counts.tolist())
        [(norm, skipped)] = {(str(norm), skipped) for norm, skipped in _of_all_ranks(step_result[-2:])}
        result.grad_norms.append(float(norm))
        result.skipped.append(bool(skipped))
        if case.poison or step + 1 == len(RATES):
            weights, differing = whole_weights(engine)
            result.weights.append(weights)
            result.differing |= differing
        if step + 1 == EVALUATE_AFTER:
            sums, counts, _ = engine.evaluate(micro_batches(case, grid, held_out_batch()))
            result.evaluation = (grid.sum_over_ranks(sums.clone()) / grid.sum_over_ranks(counts.clone())).tolist()
    engine.deepspeed.destroy()
    result.seconds = time.perf_counter() - started
    return result


def micro_batches(case: Case, grid: ProcessGrid, whole: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """This data-parallel rank's share of a global batch."""
    n_samples = whole["tokens"].shape[0]
    share = n_samples // grid.dp_size
    assert share * grid.dp_size == n_samples and share % case.micro_batch_size == 0
    firsts = range(grid.dp_rank * share, (grid.dp_rank + 1) * share, case.micro_batch_size)
    cuts = [slice(first, first + case.micro_batch_size) for first in firsts]
    return [{name: x[:, cut] if name == "targets" else x[cut] for name, x in whole.items()} for cut in cuts]


def whole_weights(engine: Engine) -> tuple[dict[str, np.ndarray], set[str]]:
    """All ranks' fragments put together by hand, each element from its one owner; names whose replicas differ."""
    held = [(f.name, f.shape, f.start, f.columns, f.is_owner, f.tensors["weight"].numpy()) for f in fragments(engine)]
    held = [piece for pieces in _of_all_ranks(held) for piece in pieces]
    whole = {name: np.zeros(shape, np.float32) for name, shape, *_ in held}
    owners = {name: np.zeros(shape, int) for name, shape, *_ in held}
    differing = set()
    for owned in (True, False):
        for name, shape, start, columns, is_owner, values in held:
            if is_owner != owned:
                continue
            left, right = columns or (0, shape[-1])
            rows, across = np.divmod(np.arange(start, start + len(values)), right - left)
            place = rows, across + left
            matrix = whole[name].reshape(-1, shape[-1])
            if owned:
                matrix[place] = values
                owners[name].reshape(-1, shape[-1])[place] += 1
            elif not np.array_equal(matrix[place], values):
                differing.add(name)
    for name, count in owners.items():
        assert (count == 1).all(), f"{name}: elements owned {np.unique(count).tolist()} times"
    return whole, differing


def running(engine: Engine) -> dict[str, Any]:
    """What is really on, as the ranks' engines and layers have it."""
    tensor, deepspeed = engine.grid.tensor, engine.deepspeed
    blocks = [layer for _, layer in engine.layers if isinstance(layer, Block)]
    heads = [layer.mode for prefix, layer in engine.layers if prefix == ""]
    mine = {
        "layout": f"TP{tensor.size} PP{engine.grid.pp_size} DP{engine.grid.dp_size}",
        "sequence": tensor.sequence_parallel,
        "kv_replicas": tensor.kv_replicas,
        "zero": deepspeed.zero_optimization_stage(),
        "offload": bool(deepspeed.zero_cpu_offload()),
        "engine": f"{type(deepspeed).__name__} of {type(engine.module).__name__}",
        "precision": "bf16" if {p.dtype for p in engine.module.parameters()} == {torch.bfloat16} else "fp32",
    }
    held = [(engine.grid.pp_rank, [prefix.strip(".") or "heads" for prefix, _ in engine.layers])]
    all_mine = _of_all_ranks((mine, held, {_recompute(block) for block in blocks}, set(heads)))
    assert all(other[0] == mine for other in all_mine)
    stages = dict(part for other in all_mine for part in other[1])
    [recompute] = set().union(*(other[2] for other in all_mine))
    [mode] = set().union(*(other[3] for other in all_mine))
    return mine | {"recompute": recompute, "mode": mode, "layers": [stages[rank] for rank in sorted(stages)]}


def _recompute(block: Block) -> str:
    return "full" if block.recompute else "selective" if block.attention.recompute else "none"


def _of_all_ranks(value: Any) -> list[Any]:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


# --- comparing


def train_all(cases: list[Case], plant: Callable[[], AbstractContextManager] = nullcontext) -> list[Training]:
    """Cases of one world size, in one group of ranks."""
    return run_ranks(cases[0].world, run_cases, cases, plant, timeout=60 + 20 * len(cases))[0]


def errors(training: Training, expected: Training) -> dict[str, float]:
    """The worst relative error over steps and heads, over steps, over tensors; tensors whose replicas differ."""
    assert training.counts == expected.counts and training.skipped == expected.skipped
    a, b = training.weights[-1], expected.weights[-1]
    assert a.keys() == b.keys()
    kept = [step for step, skipped in enumerate(expected.skipped) if not skipped]
    return {
        "loss": _worst(training.losses, expected.losses),
        "grad_norm": _worst(*([t.grad_norms[step] for step in kept] for t in (training, expected))),
        "parameters": max(float(np.linalg.norm(a[name] - b[name]) / np.linalg.norm(b[name])) for name in b),
        "evaluation": _worst(training.evaluation, expected.evaluation),
        "replicas": len(training.differing),
    }


def too_large(found: dict[str, float], tolerance: dict[str, float] = TOLERANCE) -> list[str]:
    """Names of the errors that exceed their tolerance; NaN does."""
    return [name for name, limit in tolerance.items() if not found[name] <= limit]


def record(case: Case, training: Training) -> dict[str, Any]:
    """A case in plain values: what was asked for, what was on, how far it is off. Of fp32."""
    found = errors(training, reference(case.n_trunk_layers, case.clip, replicated=case.replicated))
    return {
        "case": str(case),
        "ranks": case.world,
        "asked": asdict(case),
        "running": training.running,
        "errors": found,
        "failed": too_large(found),
        "seconds": round(training.seconds, 2),
    }


def _worst(a: list, b: list) -> float:
    a, b = np.array(a), np.array(b)
    return float(np.max(np.abs(a - b) / np.abs(b)))


if __name__ == "__main__":
    from tests.parallel.matrix_report import main

    main()
