"""Which layers of the model's list go to which pipeline stage."""

from megamtp.model.cost import layer_train_flops
from megamtp.model.transformer import ModelConfig
from megamtp.parallel.cut import cut_stage_pairs, cut_stages
from megamtp.parallel.groups import ParallelConfig


def choose_cut(
    config: ModelConfig, heads_mode: str, parallel: ParallelConfig, seq_len: int, recompute: str
) -> list[int]:
    """Boundaries of ``parallel.stages`` stages over [embedding, trunk blocks, heads]: by hand, or by cost.

    Stage i holds the layers ``cut[i] : cut[i + 1]``. By hand (``parallel.pipeline_cut``) the first stage holds the
    embedding, and the last one the heads, beside their trunk layers. Raises ``ValueError`` where that is no cut of
    this model, or the model has too few layers.
    """
    n_trunk, n_stages = config.n_trunk_layers, parallel.stages
    if parallel.pipeline_cut is not None:
        return _cut_by_hand(parallel.pipeline_cut, n_trunk)
    if n_stages > n_trunk + 2:
        raise ValueError(
            f"parallel.pipeline {parallel.pipeline} with {parallel.schedule} makes {n_stages} stages, more than the "
            f"{n_trunk + 2} layers (embedding, {n_trunk} trunk layers, heads); lower parallel.pipeline"
        )
    costs = layer_train_flops(config, seq_len, recompute, heads_mode)
    if parallel.schedule == "dualpipev":
        return cut_stage_pairs(costs, parallel.pipeline)
    return cut_stages(costs, n_stages)


def _cut_by_hand(counts: list[int], n_trunk: int) -> list[int]:
    if sum(counts) != n_trunk:
        raise ValueError(
            f"parallel.pipeline_cut {counts} holds {sum(counts)} trunk layers; the model has {n_trunk} "
            "(model.n_layers - model.n_future_tokens): change the entries to that sum"
        )
    if 0 in counts[1:-1]:
        raise ValueError(
            f"parallel.pipeline_cut {counts} leaves a stage without layers: only the first (embedding) and the "
            "last (heads) may have 0 trunk layers; give the others 1 or more"
        )
    boundaries, end = [0], 1
    for count in counts:
        end += count
        boundaries.append(end)
    boundaries[-1] += 1
    return boundaries
