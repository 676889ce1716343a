"""Bytes that a rank sends in one training step, by form of parallelism, before it is launched.

Collectives count as a ring sends them: an all-gather or a reduce-scatter of a whole of N bytes over r ranks takes
(r - 1) / r x N from each rank, an all-reduce twice that. Norms, losses and flags of the step, a few bytes each, are not
in it. ``tests/parallel/test_traffic.py`` holds these formulas to the messages that are really sent.
"""

from dataclasses import dataclass

from megamtp.model.cost import kv_width, layer_parameters, share, table_parameters
from megamtp.model.cut import choose_cut
from megamtp.model.heads import HeadsConfig
from megamtp.model.transformer import ModelConfig
from megamtp.parallel.cut import stages_of_ranks
from megamtp.parallel.groups import ParallelConfig

# DeepSpeed's defaults for ZeRO-3.
PERSISTENT_VALUES = 100_000  # weights of no more values are gathered once a step, after the update
LIVE_VALUES = 1_000_000_000  # weights beyond are dropped after the forward pass and gathered again for the backward


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in one step, by what for."""

    tensor: float
    data: float
    pipeline: float

    @property
    def total(self) -> float:
        return self.tensor + self.data + self.pipeline


def step_traffic(
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
    documents: bool = False,
) -> list[Traffic]:
    """Of one process of each pipeline rank, first to last; without a pipeline one entry.

    ``micro_batches`` of ``micro_batch_size`` samples make one step of a replica; ``documents``: attention stays inside
    them, so that positions and document ids travel along the pipeline.
    """
    mode = heads.mode_under(parallel.zero_stage)
    tokens, width = seq_len * micro_batch_size, 4 if precision == "fp32" else 2
    split = dict(tensor=parallel.tensor, sequence_parallel=parallel.sequence_parallel)
    cut = choose_cut(config, mode, parallel, seq_len, recompute)
    layers = layer_parameters(config, parallel.tensor)
    dualpipev = parallel.schedule == "dualpipev"
    result = []
    for rank, stages in enumerate(stages_of_ranks(parallel.pipeline, dualpipev)):
        held = [(cut[i], cut[i + 1]) for i in stages]
        activations = sum(
            tensor_parallel_bytes(config, mode, tokens=tokens, width=width, recompute=recompute, layers=part, **split)
            for part in held
        )
        result.append(
            Traffic(
                tensor=micro_batches * activations,
                data=data_parallel_bytes(
                    sum(sum(layers[begin:end]) for begin, end in held),
                    persistent=sum(_persistent(config, parallel.tensor, part) for part in held),
                    zero_stage=parallel.zero_stage,
                    dp_size=dp_size,
                    micro_batches=micro_batches,
                    width=width,
                ),
                pipeline=micro_batches
                * pipeline_bytes(
                    config,
                    rank=rank,
                    ranks=parallel.pipeline,
                    tokens=tokens,
                    width=width,
                    dualpipev=dualpipev,
                    documents=documents,
                    **split,
                ),
            )
        )
    return result


def tensor_parallel_bytes(
    config: ModelConfig,
    heads_mode: str,
    *,
    tokens: int,
    width: int,
    tensor: int,
    sequence_parallel: bool,
    recompute: str = "none",
    layers: tuple[int, int] | None = None,
) -> float:
    """For one micro-batch of ``tokens`` (b x s), with ``width`` bytes a value, by one rank of ``tensor``.

    ``layers`` (begin, end) of [embedding, trunk blocks, heads]; default: all. A whole (b, s, d) crosses the ring

    - per block 8 times: all-reduces after wo and w2, and of the gradients that enter wq, wk, wv and w1, w3. Under
      sequence parallelism 10 times: 2 gathers and 2 reduce-scatters forward, the same backward, and the 2 gathers of
      the forward pass again, because only a slice of their results was kept;
    - per wholly recomputed block 2 or 3 times more: all but what leaves w2, which no gradient needs; of a recomputed
      attention it is only the gather under sequence parallelism;
    - for the embedding twice, and for each head twice around the unembedding.

    Beside it travel three fp32 numbers a token and head (the cross-entropy over a split vocabulary), under sequence
    parallelism the gradients of the norms, and those of key/value heads that several ranks hold.
    """
    if tensor == 1:
        return 0.0
    begin, end = layers or (0, config.n_trunk_layers + 2)
    has_embedding, has_heads = begin == 0, end == config.n_trunk_layers + 2
    trunk = max(0, min(end, config.n_trunk_layers + 1) - max(begin, 1))
    n = config.n_future_tokens if has_heads else 0
    recomputed = trunk + (n if heads_mode == "joint" else 0)
    again = {"none": (0, 0), "selective": (0, 1), "full": (2, 3)}[recompute][sequence_parallel]

    crossings = (10 if sequence_parallel else 8) * (trunk + n) + again * recomputed + 2 * has_embedding + 2 * n
    norms = 2 * (trunk + n) + n if sequence_parallel else 0
    whole = crossings * tokens * config.dim * width + 2 * 3 * 4 * n * tokens + 2 * norms * config.dim * width

    replicas = max(1, tensor // config.kv_heads)
    kv_gradients = 2 * kv_width(config, tensor) * config.dim * width * (trunk + n)
    return _of_ring(whole, tensor) + 2 * _of_ring(kv_gradients, replicas)


def data_parallel_bytes(
    parameters: int,
    *,
    zero_stage: int,
    dp_size: int,
    micro_batches: int,
    width: int,
    persistent: int = 0,
) -> float:
    """For one step, by one of ``dp_size`` ranks that hold the same ``parameters`` (ZeRO-3: share them).

    Weights travel with ``width`` bytes, gradients in fp32. Whole gradients cross the ring twice (an all-reduce) once a
    step, under ZeRO-2 after every micro-batch; ZeRO 1 and 2 gather the updated weights. ZeRO-3 reduce-scatters
    gradients and gathers weights every micro-batch, the latter twice where a rank's layers exceed ``LIVE_VALUES`` (an
    upper bound: what was used last is still there), and gathers its ``persistent`` weights once.
    """
    if zero_stage == 3:
        gathers = 1 if parameters <= LIVE_VALUES else 2
        gradients = micro_batches * parameters
        weights = gathers * micro_batches * (parameters - persistent) + persistent
    else:
        gradients = 2 * (micro_batches if zero_stage == 2 else 1) * parameters
        weights = parameters if zero_stage else 0
    return _of_ring(4 * gradients + width * weights, dp_size)


def pipeline_bytes(
    config: ModelConfig,
    *,
    rank: int,
    ranks: int,
    tokens: int,
    width: int,
    dualpipev: bool = False,
    tensor: int = 1,
    sequence_parallel: bool = False,
    documents: bool = False,
) -> float:
    """For one micro-batch of ``tokens`` (b x s), by pipeline rank ``rank`` of ``ranks``.

    Hidden states (b, s, d), of which each tensor-parallel rank sends all or, under sequence parallelism, its slice, go
    to the next stage, and their gradient comes back; with ``documents`` two int32 a token go along. DualPipeV passes
    every border between two ranks twice.
    """
    hidden = tokens * config.dim * width / (tensor if sequence_parallel else 1)
    packed = 2 * 4 * tokens if documents else 0
    has_next, has_previous = rank < ranks - 1, rank > 0
    if dualpipev:
        return (has_next + has_previous) * (2 * hidden + packed)
    return has_next * (hidden + packed) + has_previous * hidden


def _of_ring(size: float, ranks: int) -> float:
    """What each rank sends when a whole of ``size`` bytes goes around once."""
    return size * (ranks - 1) / ranks


def _persistent(config: ModelConfig, tensor: int, layers: tuple[int, int]) -> int:
    """Values in the weights among ``layers`` that ZeRO-3 always keeps whole."""
    begin, end = layers
    has_embedding, has_heads = begin == 0, end == config.n_trunk_layers + 2
    blocks = end - begin - has_embedding - has_heads + has_heads * config.n_future_tokens
    matrix, feed_forward = (config.dim * share(rows, tensor) for rows in (config.dim, config.hidden_dim))
    of_block = [matrix] * 2 + [config.dim * kv_width(config, tensor)] * 2 + [feed_forward] * 3 + [config.dim] * 2
    n_tables = has_embedding + has_heads * config.n_unembeddings
    weights = of_block * blocks + [table_parameters(config, tensor)] * n_tables
    return sum(size for size in [*weights, config.dim * has_heads] if size <= PERSISTENT_VALUES)
