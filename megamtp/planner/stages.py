"""The table of pipeline stages: who holds what, what it costs, and how much memory it takes."""

from dataclasses import dataclass

from megamtp.model.cost import layer_parameters, layer_train_flops
from megamtp.model.cut import choose_cut
from megamtp.model.heads import HeadsConfig
from megamtp.model.transformer import ModelConfig
from megamtp.parallel.cut import rank_costs, stages_of_ranks
from megamtp.parallel.groups import ParallelConfig
from megamtp.planner.memory import HeldLayers, MemoryEstimate, estimate_memory, micro_batches_in_flight


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline. Under DualPipeV two stages have the same rank, and share what is the rank's."""

    number: int
    rank: int  # in the pipeline
    begin: int  # of the layers [embedding, trunk blocks, heads]
    end: int
    layers: str  # "embedding, 0-6"
    parameters: int  # before any split over tensor- or data-parallel ranks
    flops: float  # per token, as ``layer_train_flops`` counts
    rank_share: float  # FLOPs of its rank over those of the slowest one
    rank_memory: MemoryEstimate  # of one process of its rank


def plan_stages(
    config: ModelConfig,
    heads: HeadsConfig,
    parallel: ParallelConfig,
    *,
    seq_len: int,
    micro_batch_size: int,
    micro_batches: int,
    precision: str,
    dp_size: int,
    recompute: str = "none",
) -> list[Stage]:
    """The stages, first to last, of the cut that ``choose_cut`` makes; one stage where there is no pipeline.

    ``micro_batches`` of ``micro_batch_size`` samples make one optimizer step of a replica. Raises ``ValueError``
    where the model cannot be cut so.
    """
    mode = heads.mode_under(parallel.zero_stage)
    cut = choose_cut(config, mode, parallel, seq_len, recompute)
    flops = layer_train_flops(config, seq_len, recompute, mode)
    parameters = layer_parameters(config)
    dualpipev = parallel.schedule == "dualpipev"
    costs = rank_costs(flops, cut, dualpipev)
    stages = []
    for rank, numbers in enumerate(stages_of_ranks(parallel.pipeline, dualpipev)):
        in_flight = [micro_batches_in_flight(i, parallel.stages, micro_batches) for i in numbers]
        memory = estimate_memory(
            config,
            heads,
            seq_len=seq_len,
            micro_batch_size=micro_batch_size,
            precision=precision,
            zero_stage=parallel.zero_stage,
            dp_size=dp_size,
            micro_batches=micro_batches,
            recompute=recompute,
            tensor=parallel.tensor,
            sequence_parallel=parallel.sequence_parallel,
            offload_optimizer=parallel.offload_optimizer,
            held=[HeldLayers(cut[i], cut[i + 1], n) for i, n in zip(numbers, in_flight, strict=True)],
        )
        for i in numbers:
            layers = slice(cut[i], cut[i + 1])
            stages.append(
                Stage(
                    number=i,
                    rank=rank,
                    begin=layers.start,
                    end=layers.stop,
                    layers=_layer_names(layers.start, layers.stop, config.n_trunk_layers),
                    parameters=sum(parameters[layers]),
                    flops=sum(flops[layers]),
                    rank_share=costs[rank] / max(costs),
                    rank_memory=memory,
                )
            )
    return sorted(stages, key=lambda stage: stage.number)


def stage_table(stages: list[Stage]) -> str:
    """One line a stage. Load and GiB are those of its whole rank, which under DualPipeV holds two stages."""
    rows = [("stage", "rank", "layers", "parameters", "GFLOP/token", "rank's load", "rank's GiB")]
    for stage in stages:
        sizes = f"{stage.flops / 1e9:,.3f}", f"{stage.rank_share:.1%}", f"{stage.rank_memory.total / 2**30:,.2f}"
        rows.append((str(stage.number), str(stage.rank), stage.layers, f"{stage.parameters:,}", *sizes))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  " + "  ".join(f"{cell:{'<' if i == 2 else '>'}{widths[i]}}" for i, cell in enumerate(row)) for row in rows
    ]
    title = "pipeline stages (training FLOPs, with recomputation and the embedding's memory traffic):"
    return "\n".join([title, *lines])


def _layer_names(begin: int, end: int, n_trunk: int) -> str:
    first, last = max(begin - 1, 0), min(end - 2, n_trunk - 1)
    names = ["embedding"] if begin == 0 else []
    if first <= last:
        names.append(str(first) if first == last else f"{first}-{last}")
    return ", ".join(names + (["heads"] if end == n_trunk + 2 else []))
