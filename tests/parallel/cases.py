"""The cases of the matrix: layouts, what is on in them, and the model and samples that they all train on."""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from megamtp.model.transformer import ModelConfig
from megamtp.parallel.groups import ParallelConfig

SEQ_LEN, N_HEADS = 16, 4
GLOBAL_BATCH, HELD_OUT = 8, 12  # samples; no layout evaluates in as many micro-batches as it trains
IGNORE = -100


@dataclass(frozen=True)
class Case:
    """A layout and what is on in it."""

    world: int = 1
    tensor: int = 1
    pipeline: int = 1
    sequence: bool = False
    schedule: str = "1f1b"
    zero: int = 0
    offload: bool = False
    recompute: str = "none"
    mode: str = "sequential"
    precision: str = "fp32"
    clip: float = 0.5
    replicated: bool = False  # an unembedding for each head
    poison: tuple[int, int] | None = None  # (rank, step): a gradient there is not finite

    @property
    def data(self) -> int:
        return self.world // (self.tensor * self.pipeline)

    @property
    def layout(self) -> str:
        return f"TP{self.tensor} PP{self.pipeline} DP{self.data}"

    def __str__(self) -> str:
        parts = [self.layout.replace(" ", "-"), "sp" * self.sequence, self.schedule * (self.pipeline > 1)]
        parts += [f"zero{self.zero}{'-offload' * self.offload}", f"recompute-{self.recompute}", self.mode]
        parts += ["" if self.precision == "fp32" else self.precision, "" if self.clip == 0.5 else f"clip{self.clip}"]
        parts += ["replicated" * self.replicated]
        return "-".join(part for part in parts if part)

    @property
    def n_trunk_layers(self) -> int:
        """Enough for the stages that it is cut into."""
        return 6 if self.schedule == "dualpipev" and self.pipeline == 4 else 3

    @property
    def model(self) -> ModelConfig:
        return model_config(self.n_trunk_layers, self.replicated)

    @property
    def micro_batch_size(self) -> int:
        """The largest that leaves two micro-batches a pipeline rank, as DualPipeV needs."""
        return next(size for size in (4, 2, 1) if GLOBAL_BATCH // self.data // size >= 2 * self.pipeline)

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            tensor=self.tensor,
            pipeline=self.pipeline,
            sequence=self.sequence,
            schedule=self.schedule,
            zero_stage=self.zero,
            offload_optimizer=self.offload,
        )


LAYOUTS = [(1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 1, 2), (4, 1, 1), (4, 2, 1), (4, 4, 1), (4, 1, 2), (4, 2, 2), (4, 1, 4)]
LAYOUTS += [(8, 2, 2)]  # ranks, TP, PP


def every_case() -> list[Case]:
    """Layout x sequence parallelism x schedule x ZeRO x recomputation; the heads' modes take turns."""
    cases = []
    for world, tensor, pipeline in LAYOUTS:
        sequences = [False, True] if tensor > 1 else [False]
        schedules = ["1f1b", "dualpipev"] if pipeline > 1 else ["1f1b"]
        zeros = [(0, False), (1, False), (1, True)]
        zeros += [(2, False), (2, True), (3, False), (3, True)] if pipeline == 1 else []
        for schedule, sequence, zero, recompute in product(schedules, sequences, zeros, ["none", "selective", "full"]):
            turn = len(cases) + zeros.index(zero) + sequence + (schedule == "dualpipev")
            mode = "joint" if zero[0] == 3 or turn % 2 else "sequential"
            cases.append(Case(world, tensor, pipeline, sequence, schedule, *zero, recompute, mode))
    return cases


# A case of each kind, for every run of the tests.
QUICK = [
    Case(1, recompute="full"),
    Case(1, zero=3, mode="joint", recompute="selective"),
    Case(2, zero=2, mode="joint"),
    Case(2, zero=3, offload=True, mode="joint", recompute="full"),
    Case(2, tensor=2, sequence=True, zero=1, offload=True),
    Case(2, tensor=2, zero=3, mode="joint"),
    Case(2, pipeline=2, zero=1, recompute="selective"),
    Case(2, pipeline=2, schedule="dualpipev", mode="joint", recompute="full"),
    Case(4, tensor=4, sequence=True, zero=2, mode="joint"),
    Case(4, pipeline=4, zero=0),
    Case(4, tensor=2, pipeline=2, sequence=True, zero=1, recompute="full"),
    Case(4, pipeline=2, schedule="dualpipev", zero=1),
    Case(4, tensor=2, sequence=True, zero=3, mode="joint", recompute="selective"),
    Case(8, tensor=2, pipeline=2, sequence=True, zero=1, mode="joint"),
]


def model_config(n_trunk_layers: int, replicated: bool = False) -> ModelConfig:
    """Fewer key/value heads than TP 4 has ranks, a vocabulary that is no multiple of 128, weights that matter."""
    return ModelConfig(
        vocab_size=101,
        dim=32,
        n_layers=n_trunk_layers + N_HEADS,
        n_heads=4,
        n_kv_heads=2,
        n_future_tokens=N_HEADS,
        ffn_dim=48,
        init_std=0.1,
        replicated_unembedding=replicated,
    )


def batch(seed: int, n_samples: int) -> dict[str, Tensor]:
    """Samples of several documents: from nearly one to many, so that micro-batches differ in valid targets."""
    generator = torch.Generator().manual_seed(seed)
    shape = n_samples, SEQ_LEN + N_HEADS
    stream = torch.randint(0, 101, shape, generator=generator)
    begins = torch.rand(shape, generator=generator) < torch.linspace(0.08, 0.5, n_samples)[:, None]
    begins[:, 5] = True
    begins[:, 0] = False
    ids = begins.cumsum(1)
    index = torch.arange(shape[1]).expand(shape)
    targets = [
        stream[:, k : k + SEQ_LEN].where(ids[:, k : k + SEQ_LEN] == ids[:, :SEQ_LEN], IGNORE)
        for k in range(1, N_HEADS + 1)
    ]
    return {
        "tokens": stream[:, :SEQ_LEN],
        "targets": torch.stack(targets),
        "positions": (index - (index * begins).cummax(1).values)[:, :SEQ_LEN],
        "document_ids": ids[:, :SEQ_LEN].int(),
    }


def train_batch(step: int) -> dict[str, Tensor]:
    return batch(100 + step, GLOBAL_BATCH)


def held_out_batch() -> dict[str, Tensor]:
    return batch(7, HELD_OUT)
