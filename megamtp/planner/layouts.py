"""All layouts of a run on given devices, ranked by the time of a step."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product

from megamtp.errors import UserError
from megamtp.model.cut import choose_cut
from megamtp.parallel.groups import ParallelConfig
from megamtp.planner.devices import Assumptions, Device
from megamtp.planner.estimate import Estimate, device_memory, stages_and_traffic
from megamtp.planner.time import StepModel
from megamtp.training.run_config import RunConfig

MICRO_BATCH_SIZES = (1, 2, 4, 8, 16)
RECOMPUTE = ("none", "selective", "full")


@dataclass
class Ranking:
    """The fastest layouts that fit, fastest first, and how many there were."""

    best: list[Estimate] = field(default_factory=list)
    considered: int = 0
    too_large: int = 0  # for the device's memory
    smallest: Estimate | None = None  # by memory, whether it fits or not; it has no time


def rank_layouts(
    config: RunConfig, world_size: int, device: Device, assumptions: Assumptions | None = None, keep: int = 10
) -> Ranking:
    """Tensor and pipeline parallelism, schedule, ZeRO stage, micro-batch size and recomputation that fit ``config``.

    The model, the batch and the precision stay as they are. Tensor parallelism stays inside a node. Offload and cuts
    by hand are not among the layouts.
    """
    assumptions, ranking = assumptions or Assumptions(), Ranking()
    fitting: list[tuple[float, Estimate, StepModel]] = []
    for layout in _layouts(config, world_size, device):
        stages, traffic = stages_and_traffic(layout, world_size)
        memory = device_memory(layout, stages, assumptions)
        estimate = Estimate(layout, world_size, stages, traffic, memory, device, None)
        ranking.considered += 1
        if not ranking.smallest or memory.total < ranking.smallest.memory.total:
            ranking.smallest = estimate
        if not estimate.fits:
            ranking.too_large += 1
            continue
        model = StepModel(layout, world_size, device, stages, traffic, assumptions)
        fitting.append((model.lower_bound(), estimate, model))

    # Simulating a schedule takes long: no layout whose lower bound is slower than the slowest of the best.
    fitting.sort(key=lambda each: each[0])
    for bound, estimate, model in fitting:
        if len(ranking.best) == keep and bound >= ranking.best[-1].step.total:
            break
        ranking.best.append(replace(estimate, step=model.step()))
        ranking.best.sort(key=lambda each: (each.step.total, each.memory.total))
        del ranking.best[keep:]
    return ranking


def _layouts(config: RunConfig, world_size: int, device: Device) -> Iterator[RunConfig]:
    cuts: dict[tuple, list[int] | None] = {}
    node = min(device.per_node, world_size)
    tensors = [size for size in _divisors(world_size) if node % size == 0]
    for tensor in tensors:
        for pipeline, schedule in product(_divisors(world_size // tensor), ("1f1b", "dualpipev")):
            if pipeline == 1 and schedule == "dualpipev":
                continue
            shares_out = pipeline == 1 and world_size > tensor  # what ZeRO 2 and 3 do, between replicas
            zero_stages = (0, 1, 2, 3) if shares_out else (0, 1)
            sizes = product(zero_stages, MICRO_BATCH_SIZES, RECOMPUTE)
            for zero_stage, micro_batch_size, recompute in sizes:
                mode = config.heads.mode_under(zero_stage)
                key = pipeline, schedule, recompute, mode
                layout = dict(tensor=tensor, pipeline=pipeline, schedule=schedule, zero_stage=zero_stage)
                if key not in cuts:
                    cuts[key] = _cut(config, ParallelConfig(**layout), mode, recompute)
                if cuts[key] is None:
                    continue
                # The cut is given, or it would be made anew for each layout; only the pipeline's ranks change it.
                parallel = ParallelConfig(**layout, sequence=_sequence(config, tensor), pipeline_cut=cuts[key])
                training = replace(config.training, micro_batch_size=micro_batch_size)
                ops = replace(config.ops, recompute=recompute)
                try:
                    candidate = replace(config, parallel=parallel, training=training, ops=ops)
                    candidate.micro_batches(world_size)
                except (ValueError, UserError):  # heads that TP does not divide, a batch that does not
                    continue
                yield candidate


def _sequence(config: RunConfig, tensor: int) -> bool | None:
    return config.parallel.sequence if tensor > 1 else None


def _cut(config: RunConfig, parallel: ParallelConfig, mode: str, recompute: str) -> list[int] | None:
    """Trunk layers of each stage; None where the model has too few."""
    try:
        cut = choose_cut(config.model, mode, parallel, config.data.seq_len, recompute)
    except ValueError:
        return None
    counts = [end - begin for begin, end in zip(cut, cut[1:], strict=False)]
    counts[0] -= 1  # the embedding
    counts[-1] -= 1  # the heads
    return counts


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
