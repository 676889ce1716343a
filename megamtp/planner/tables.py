"""What the planner prints."""

from collections.abc import Sequence

from megamtp.errors import UserError
from megamtp.model.cost import parameters
from megamtp.planner.estimate import GIB, Estimate
from megamtp.planner.layouts import Ranking
from megamtp.planner.stages import stage_table

PARTS = {
    "matmul": "matrix products",
    "attention": "attention",
    "memory": "bound by memory",
    "tensor": "tensor-parallel messages",
    "data": "between replicas",
    "optimizer": "optimizer",
    "waiting": "pipeline: idle, messages",
}


def describe_estimate(estimate: Estimate) -> str:
    """Layout, memory by purpose, time by part, and the whole run."""
    config, memory, step = estimate.config, estimate.memory, estimate.step
    parallel, training = config.parallel, config.training
    schedule = f", {parallel.schedule}" if parallel.pipeline > 1 else ""
    count, mode = parameters(config.model).total / 1e9, config.heads.mode_under(parallel.zero_stage)
    lines = [
        f"model: {count:,.3g} B parameters, {config.model.n_future_tokens} heads ({mode}), {training.precision}, "
        f"{config.data.seq_len} tokens a sample",
        f"layout: TP {parallel.tensor} x PP {parallel.pipeline} x DP {parallel.data_parallel(estimate.world_size)}"
        f"{schedule}, ZeRO-{parallel.zero_stage}; {config.micro_batches(estimate.world_size)} micro-batches of "
        f"{training.micro_batch_size}; recompute {config.ops.recompute}",
    ]
    if parallel.stages > 1:
        lines.append(stage_table(estimate.stages))
    rows = [(name.replace("_", " "), f"{value / GIB:,.2f}") for name, value in memory.lines.items()]
    rows.append(("total", f"{memory.total / GIB:,.2f}"))
    lines += ["memory of the fullest device, GiB:", *_columns(rows)]
    lines.append(
        f"  {'fits' if estimate.fits else 'DOES NOT FIT'}: the device has {1e9 * estimate.device.memory_gb / GIB:,.2f}"
    )
    rows = [
        (PARTS[part], f"{seconds:,.3f}", f"{seconds / step.total:.1%}")
        for part, seconds in vars(step.seconds).items()
        if seconds
    ]
    rows.append(("total", f"{step.total:,.3f}", ""))
    lines += ["time of a step, seconds (mean of the pipeline's ranks):", *_columns(rows)]
    hours = estimate.days * 24 * estimate.world_size
    lines += [
        f"{estimate.flops_per_step / 1e15:,.4g} PFLOP a step: {estimate.mfu:.1%} MFU",
        f"{estimate.tokens_per_step:,} tokens a step: {estimate.tokens_per_day / 1e9:,.4g} B tokens a day",
        f"{training.steps:,} steps, {training.steps * estimate.tokens_per_step / 1e9:,.4g} B tokens: "
        f"{estimate.days:,.3g} days, {hours:,.0f} device hours",
    ]
    return "\n".join(lines)


def describe_ranking(ranking: Ranking) -> str:
    """The best layouts. Raises ``UserError`` where none fits."""
    if not ranking.best:
        raise UserError(_why_none(ranking))
    header = ("s/step", "MFU", "days", "GiB", "TP", "PP", "DP", "schedule", "ZeRO", "micro-batches", "recompute")
    rows = [(*header, "most memory", "after products")]
    for estimate in ranking.best:
        config, step = estimate.config, estimate.step
        parallel, training = config.parallel, config.training
        rows.append(
            (
                f"{step.total:,.3f}",
                f"{estimate.mfu:.1%}",
                f"{estimate.days:,.3g}",
                f"{estimate.memory.total / GIB:.1f}",
                str(parallel.tensor),
                str(parallel.pipeline),
                str(parallel.data_parallel(estimate.world_size)),
                parallel.schedule if parallel.pipeline > 1 else "-",
                str(parallel.zero_stage),
                f"{config.micro_batches(estimate.world_size)} of {training.micro_batch_size}",
                config.ops.recompute,
                _largest_memory(estimate),
                _slowest_part(estimate),
            )
        )
    memory = 1e9 * ranking.best[0].device.memory_gb / GIB
    return "\n".join(
        [
            *_columns(rows),
            f"{ranking.considered} layouts divide; {ranking.too_large} of them need more than the device's "
            f"{memory:,.1f} GiB",
            "the first one: " + _overrides(ranking.best[0]),
        ]
    )


def _overrides(estimate: Estimate) -> str:
    config = estimate.config
    parallel = config.parallel
    text = f"--parallel.tensor {parallel.tensor} --parallel.pipeline {parallel.pipeline}"
    text += f" --parallel.schedule {parallel.schedule} --parallel.zero_stage {parallel.zero_stage}"
    text += f" --training.micro_batch_size {config.training.micro_batch_size} --ops.recompute {config.ops.recompute}"
    return text


def _why_none(ranking: Ranking) -> str:
    smallest = ranking.smallest
    if not smallest:
        return (
            "no layout divides: --gpus is TP x PP x DP, where TP divides model.n_heads and a node, and DP "
            "training.global_batch_size; change one of them"
        )
    return (
        f"none of {ranking.considered} layouts fits into {1e9 * smallest.device.memory_gb / GIB:,.1f} GiB: "
        f"the smallest ({_overrides(smallest)}) needs {smallest.memory.total / GIB:,.1f}, "
        f"most of it {_largest_memory(smallest)}; use more devices, or larger ones"
    )


def _largest_memory(estimate: Estimate) -> str:
    name, value = max(estimate.memory.lines.items(), key=lambda line: line[1])
    return f"{name.replace('_', ' ')} {value / estimate.memory.total:.0%}"


def _slowest_part(estimate: Estimate) -> str:
    """Of what is not multiplication: where a step's time goes."""
    seconds = {
        part: value for part, value in vars(estimate.step.seconds).items() if part not in ("matmul", "attention")
    }
    part, value = max(seconds.items(), key=lambda each: each[1])
    return f"{PARTS[part]} {value / estimate.step.total:.0%}"


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Words to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = [not any(row[i][:1].isdigit() for row in rows[1:]) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(f"{cell:{'<' if left[i] else '>'}{widths[i]}}" for i, cell in enumerate(row)).rstrip()
        for row in rows
    ]
