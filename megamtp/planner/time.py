"""Seconds of one training step, before it is launched: what each stage computes and moves, and who waits for whom.

A pass through a stage is the sum of

- matrix products: their FLOPs (``model/cost.py``) at an assumed share of the device's peak; attention apart;
- what is bound by memory: the bytes that norms, rotary, SwiGLU, residuals, the loss and the sums of gradients move;
- tensor parallelism's messages, less what the weights' gradients hide.

``simulate`` runs the passes in the schedule's order, where the pipeline's messages and its idle time come in. After it
come gradients and weights between replicas, and the optimizer. A kernel's launch, the latency of a message, the host,
reading data and checkpoints count nothing.
"""

from dataclasses import dataclass, fields

from megamtp.model.cost import (
    attention_forward_flops,
    block_parameters,
    kv_width,
    layer_parameters,
    share,
    table_parameters,
    unembedding_forward_flops,
)
from megamtp.parallel.cut import stages_of_ranks
from megamtp.planner.devices import Assumptions, Device
from megamtp.planner.pipeline import Event, Message, Pass, Pipeline, simulate
from megamtp.planner.stages import Stage
from megamtp.planner.traffic import Traffic, pipeline_bytes
from megamtp.training.run_config import RunConfig


@dataclass(frozen=True)
class Seconds:
    """Of a pass, or of a whole step, by what for."""

    matmul: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    tensor: float = 0.0  # messages of tensor parallelism that nothing hides
    data: float = 0.0  # messages between replicas that nothing hides
    optimizer: float = 0.0
    waiting: float = 0.0  # the pipeline's messages and idle time, and the slowest rank

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, factor: float) -> "Seconds":
        return Seconds(*(getattr(self, f.name) * factor for f in fields(self)))


@dataclass(frozen=True)
class StageTime:
    """One micro-batch's passes through one stage."""

    forward: Seconds
    backward: Seconds


@dataclass(frozen=True)
class StepTime:
    """``seconds``: of the step by part, the mean over the pipeline's ranks, so that the parts add up to its length."""

    seconds: Seconds
    stages: list[StageTime]
    events: list[Event]  # of the pipeline; empty where there is none

    @property
    def total(self) -> float:
        return self.seconds.total


@dataclass(frozen=True)
class _Work:
    """Of one rank and one pass over some layers: FLOPs and bytes."""

    matmul: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    tensor: float = 0.0  # bytes around the ring that must be waited for
    behind: float = 0.0  # bytes around the ring that matrix products may hide
    hiding: float = 0.0  # FLOPs of these

    def __add__(self, other: "_Work") -> "_Work":
        return _Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, factor: float) -> "_Work":
        return _Work(*(getattr(self, f.name) * factor for f in fields(self)))


class StepModel:
    """The work of a run's step on one device, and its seconds.

    ``stages``: the table of ``plan_stages``; ``traffic``: of ``step_traffic``.
    """

    def __init__(
        self,
        config: RunConfig,
        world_size: int,
        device: Device,
        stages: list[Stage],
        traffic: list[Traffic],
        assumptions: Assumptions,
    ):
        self.config, self.model, self.parallel = config, config.model, config.parallel
        self.world_size, self.device, self.traffic, self.assumed = world_size, device, traffic, assumptions
        self.micro_batches = config.micro_batches(world_size)
        self.dp_size = self.parallel.data_parallel(world_size)
        self.tokens = config.data.seq_len * config.training.micro_batch_size
        self.width = 4 if config.training.precision == "fp32" else 2
        self.mode = config.heads.mode_under(self.parallel.zero_stage)
        self.stages = [self._stage_time(stage) for stage in stages]
        # Of one process of each pipeline rank: parameters, and seconds that it is busy with its passes.
        layers, held = layer_parameters(self.model, self.parallel.tensor), self._held()
        self.parameters = [sum(sum(layers[stages[i].begin : stages[i].end]) for i in numbers) for numbers in held]
        self.passes = [self._rank_seconds(numbers) for numbers in held]
        self.busy = [seconds.total for seconds in self.passes]

    # --- one step

    def lower_bound(self) -> float:
        """Seconds that the step takes at least: without the pipeline's messages and idle time."""
        return max(busy + self._between_replicas(rank) for rank, busy in enumerate(self.busy)) + self._update()

    def step(self) -> StepTime:
        ranks, events = self.parallel.pipeline, []
        ends = self.busy
        if ranks > 1:
            events = self.simulate()
            ends = [max(event.end for event in events if event.rank == rank) for rank in range(ranks)]
        length = max(end + self._between_replicas(rank) for rank, end in enumerate(ends)) + self._update()
        own = Seconds()
        for rank in range(ranks):
            own += self.passes[rank] + Seconds(data=self._between_replicas(rank), optimizer=self._update(rank))
        own = own * (1 / ranks)
        return StepTime(own + Seconds(waiting=max(0.0, length - own.total)), self.stages, events)

    def simulate(self) -> list[Event]:
        """Passes and messages of the pipeline's ranks."""
        parallel, sizes = self.parallel, self._message_bytes()
        pipeline = Pipeline(parallel.pipeline, self.micro_batches, parallel.schedule)
        stride = self.world_size // parallel.pipeline
        speed = self.device.pair(stride, parallel.pipeline, self.world_size) * self.assumed.network_share
        times = {
            (kind, number): getattr(stage, kind).total
            for number, stage in enumerate(self.stages)
            for kind in ("forward", "backward")
        }

        def pass_seconds(each: Pass) -> float:
            return times[each.kind, each.stage]

        def message_seconds(message: Message) -> float:
            return sizes[message.of.kind] / speed

        return simulate(pipeline, pass_seconds, message_seconds)

    def _held(self) -> list[tuple[int, ...]]:
        """Stages of each pipeline rank."""
        return stages_of_ranks(self.parallel.pipeline, self.parallel.schedule == "dualpipev")

    def _rank_seconds(self, numbers: tuple[int, ...]) -> Seconds:
        held = [self.stages[number] for number in numbers]
        return sum((stage.forward + stage.backward for stage in held), Seconds()) * self.micro_batches

    def _message_bytes(self) -> dict[str, float]:
        """Of a hidden state with what travels beside it, and of its gradient, as ``pipeline_bytes`` counts."""
        sent = dict(
            ranks=2,
            tokens=self.tokens,
            width=self.width,
            tensor=self.parallel.tensor,
            sequence_parallel=self.parallel.sequence_parallel,
            documents=self.config.data.document_attention,
        )
        return {
            "forward": pipeline_bytes(self.model, rank=0, **sent),
            "backward": pipeline_bytes(self.model, rank=1, **sent),
        }

    def _between_replicas(self, rank: int) -> float:
        """Seconds of gradients and weights between replicas.

        ZeRO-3 sends them while it computes, the others between micro-batches or at the end.
        """
        if self.dp_size == 1:
            return 0.0
        speed = self.device.ring(self.parallel.tensor, self.dp_size, self.world_size) * self.assumed.network_share
        sending = self.traffic[rank].data / speed
        behind = self.assumed.overlap * sending if self.parallel.zero_stage == 3 else 0.0
        return sending - min(behind, self.busy[rank])

    def _update(self, rank: int | None = None) -> float:
        """Seconds of the optimizer on a rank; of the slowest by default.

        Its bytes a parameter: masters and moments read and written; the gradient for the norm, clipped, and used; the
        weight written. Offloaded states are read and written in host memory, over the bus.
        """
        if rank is None:
            return max(map(self._update, range(self.parallel.pipeline)))
        zero_stage, offloads = self.parallel.zero_stage, self.parallel.offload_optimizer
        own = self.parameters[rank] / (self.dp_size if zero_stage else 1)
        speed = 1e9 * (self.assumed.host_gbs if offloads else self.device.bandwidth_gbs * self.assumed.memory_share)
        return own * (24 + 16 + self.width) / speed

    # --- one pass

    def _stage_time(self, stage: Stage) -> StageTime:
        n_trunk = self.model.n_trunk_layers
        blocks = max(0, min(stage.end, n_trunk + 1) - max(stage.begin, 1))
        forward, backward = self._block() * blocks, self._block_backward(self.config.ops.recompute) * blocks
        if stage.begin == 0:
            of_forward, of_backward = self._embedding()
            forward, backward = forward + of_forward, backward + of_backward
        if stage.end == n_trunk + 2:
            of_forward, of_backward = self._heads()
            forward, backward = forward + of_forward, backward + of_backward
        return StageTime(self._seconds(forward), self._seconds(backward))

    def _seconds(self, work: _Work) -> Seconds:
        device, assumed = self.device, self.assumed
        peak = device.flops(self.config.training.precision)
        tensor = 0.0
        if self.parallel.tensor > 1:
            speed = device.ring(1, self.parallel.tensor, self.world_size) * assumed.network_share
            hidden = min(assumed.overlap * work.behind / speed, work.hiding / (peak * assumed.matmul_share))
            tensor = (work.tensor + work.behind) / speed - hidden
        return Seconds(
            matmul=work.matmul / (peak * assumed.matmul_share),
            attention=work.attention / (peak * assumed.attention_share),
            memory=work.memory / (1e9 * device.bandwidth_gbs * assumed.memory_share),
            tensor=tensor,
        )

    def _is_fused(self, operation: str, backends: tuple[str, ...]) -> bool:
        """Whether one kernel computes it; where nobody has named one, as a GPU's start chooses (``ops/choice.py``)."""
        named = getattr(self.config.ops, operation)
        return named in backends if named else self.device.is_gpu

    def _ring_bytes(self, crossings: float) -> float:
        """Of hidden states (b, s, d) that cross the ring."""
        t = self.parallel.tensor
        return crossings * self.tokens * self.model.dim * self.width * (t - 1) / t

    def _block(self) -> _Work:
        """Forward pass of one block."""
        model, t = self.model, self.parallel.tensor
        matrices = block_parameters(model, t) - 2 * model.dim
        between = share(model.dim, t) if self.parallel.sequence_parallel else model.dim
        rotated, ffn = share(model.dim, t) + kv_width(model, t), share(model.hidden_dim, t)
        # Norms and residuals read and write 10 dim. Fused, rotary and SwiGLU are one kernel each; else every
        # operator reads and writes, rotary's in fp32: products and sums of halves with their inputs, cat, narrowed.
        if self.config.ops.compile or self._is_fused("elementwise", ("triton", "compiled")):
            moved = self.width * (10 * between + 2 * rotated + 3 * ffn)
        else:
            rotary = 4 * (self.width + 4) / 2 + 2 * 12 / 2 + 8 + (4 + self.width) * (self.width == 2)
            moved = self.width * (10 * between + 5 * ffn) + rotary * rotated
        return _Work(
            matmul=2 * matrices * self.tokens,
            attention=attention_forward_flops(model, self.config.data.seq_len) * self.tokens / t,
            memory=moved * self.tokens,
            tensor=self._ring_bytes(4),  # into and out of both split regions, or two all-reduces
        )

    def _block_backward(self, recompute: str) -> _Work:
        """Twice the forward pass, what is computed again, and the gradients' sum."""
        model, t = self.model, self.parallel.tensor
        forward, count = self._block(), block_parameters(self.model, t)
        entry = (
            self.tokens
            * 2
            * (model.dim * (share(model.dim, t) + 2 * kv_width(model, t)) + 2 * model.dim * share(model.hidden_dim, t))
        )
        sp = self.parallel.sequence_parallel
        backward = _Work(
            matmul=2 * forward.matmul,
            attention=2 * forward.attention,
            memory=2 * forward.memory + self._accumulated(count),
            tensor=self._ring_bytes(2 if sp else 0),
            # The sum of the inputs' gradients travels behind the weights' gradients; under sequence parallelism the
            # inputs are gathered again behind their own gradients as well.
            behind=self._ring_bytes(4),
            hiding=(2 if sp else 1) * entry,
        )
        if recompute == "none":
            return backward
        # All but the block's last product, or of attention from q to its output; see ``layer_train_flops``.
        if recompute == "full":
            last = 2 * self.tokens * model.dim * share(model.hidden_dim, t)
            again = _Work(forward.matmul - last, forward.attention, forward.memory)
        else:
            projections = 2 * self.tokens * model.dim * (share(model.dim, t) + 2 * kv_width(model, t))
            again = _Work(projections, forward.attention, forward.memory / 2)
        extra = {"selective": (0, 1), "full": (2, 3)}[recompute][sp]
        return backward + again + _Work(tensor=self._ring_bytes(extra))

    def _accumulated(self, count: int) -> float:
        """Bytes moved to add the gradients of ``count`` parameters to their fp32 sum."""
        return count * (self.width + 8)

    def _embedding(self) -> tuple[_Work, _Work]:
        """A row read and written; its gradient read and added, and the table's gradient added to its sum."""
        row = self.model.dim * self.width * self.tokens
        table = self._accumulated(table_parameters(self.model, self.parallel.tensor))
        return _Work(memory=2 * row, tensor=self._ring_bytes(2)), _Work(memory=3 * row + table)

    def _heads(self) -> tuple[_Work, _Work]:
        """All heads: (in the forward pass, in the backward pass). The loss's gradient is made with the loss."""
        n, recompute = self.model.n_future_tokens, self.config.ops.recompute
        loss = self._loss() * n
        if self.mode == "sequential":
            return (self._block() + self._block_backward("none")) * n + loss, _Work()
        if self.mode == "naive":
            return self._block() * n + loss * (1 / 3), self._block_backward(recompute) * n + loss * (2 / 3)
        return self._block() * n + loss, self._block_backward(recompute) * n

    def _loss(self) -> _Work:
        """One head's final norm, unembedding and cross-entropy, forward and backward."""
        model, t, w = self.model, self.parallel.tensor, self.width
        rows = min(model.vocab_size, share(model.padded_vocab_size, t))
        # A logit in the passes of ``ops/cross_entropy.py``: written, widened, largest twice, softmax, scaled, narrowed.
        # One kernel reads twice and writes once.
        fused = self._is_fused("cross_entropy", ("triton", "liger", "apex"))
        per_logit = 4 * w if fused else w + 28 + (2 * w + 8) * (w == 2)
        chunks = -(-self.tokens // min(self.tokens, self.config.heads.chunk))
        return _Work(
            matmul=3 * unembedding_forward_flops(model) * self.tokens * rows / model.vocab_size,
            memory=per_logit * rows * self.tokens
            + chunks * rows * model.dim * (2 * w + 8 if w == 2 else 8)  # the product, added to the sum
            + 6 * model.dim * w * self.tokens,
            tensor=self._ring_bytes(2) + (24 * self.tokens * (t - 1) / t),
        )
