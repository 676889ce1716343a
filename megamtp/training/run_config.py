"""The whole config of a run: the dataclasses of the rooms, composed, and what only holds between them."""

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from megamtp.config import REQUIRED, config_dataclass, option
from megamtp.data.datasets import DataConfig
from megamtp.engine.optimizer import OptimizerConfig
from megamtp.errors import UserError
from megamtp.model.cut import choose_cut
from megamtp.model.heads import HeadsConfig
from megamtp.model.transformer import ModelConfig
from megamtp.ops.choice import OpsConfig
from megamtp.parallel.groups import ParallelConfig
from megamtp.parallel.tensor import split_range
from megamtp.training.guard import GuardConfig
from megamtp.training.metrics import MonitorConfig
from megamtp.training.schedule import ScheduleConfig

PositiveInt = Annotated[int, Field(ge=1)]


@config_dataclass
class TrainingConfig:
    """How long, in which precision, and what is written when."""

    steps: PositiveInt = option(REQUIRED, "optimizer steps of the whole run")
    global_batch_size: PositiveInt = option(REQUIRED, "samples per optimizer step, over all ranks")
    micro_batch_size: PositiveInt = option(1, "samples per forward pass of one rank")
    precision: Literal["fp32", "bf16"] = option("fp32", "of weights and activations; masters and sums are fp32")
    seed: Annotated[int, Field(ge=0)] = option(0, "of the initial weights and of the order of the data")
    eval_every: PositiveInt | None = option(None, "steps between evaluations; null = only at the end")
    eval_samples: PositiveInt | None = option(None, "validation samples per evaluation; null = all")
    checkpoint_every: PositiveInt | None = option(None, "steps between checkpoints; null = only at the end")
    keep_checkpoints: PositiveInt = option(2, "newest checkpoints that are kept")
    keep_every: PositiveInt | None = option(None, "checkpoints of every so many steps are kept for good; null = none")
    background_save: bool = option(
        True, "save from a copy in host memory (12 bytes a parameter, shared out over the ranks) while training goes on"
    )
    hang_timeout: Annotated[float, Field(ge=1)] | None = option(
        360,
        "seconds that a run may stand still before it names the rank that hangs and ends with exit code 75; more than "
        "a micro-batch or an update ever takes; a save may take ten times that; null = not watched",
    )
    stop_after: PositiveInt | None = option(None, "save and stop at this step, without changing the schedule")
    peak_tflops: Annotated[float, Field(gt=0)] | None = option(
        None, "of one device, for MFU; null = of a GPU known by name, or measured on one that is not"
    )


@config_dataclass
class RunConfig:
    """One YAML file."""

    run_dir: str = option(REQUIRED, "folder of this run: config, metrics, TensorBoard files, checkpoints")
    model: ModelConfig = option(REQUIRED, "the architecture")
    heads: HeadsConfig = option(HeadsConfig, "how the heads are computed")
    ops: OpsConfig = option(OpsConfig, "kernels")
    data: DataConfig = option(REQUIRED, "what is read")
    optimizer: OptimizerConfig = option(OptimizerConfig, "AdamW")
    schedule: ScheduleConfig = option(ScheduleConfig, "learning rate")
    parallel: ParallelConfig = option(ParallelConfig, "layout")
    training: TrainingConfig = option(REQUIRED, "length, precision, evaluation, checkpoints")
    guard: GuardConfig = option(GuardConfig, "steps that are skipped, and going back")
    monitor: MonitorConfig = option(MonitorConfig, "TensorBoard, Weights & Biases")

    def __post_init__(self):
        weights, n = self.heads.loss_weights, self.model.n_future_tokens
        if weights is not None and len(weights) != n:
            raise ValueError(f"heads.loss_weights has {len(weights)} entries; model.n_future_tokens is {n}")
        self._check_layout()
        if self.training.precision == "bf16" and self.parallel.zero_stage == 0:
            raise ValueError(
                "training.precision bf16 needs parallel.zero_stage 1 or more, which keeps fp32 master weights; "
                "use --parallel.zero_stage 1 or --training.precision fp32"
            )
        if self.schedule.warmup_steps > self.training.steps:
            raise ValueError(
                f"schedule.warmup_steps {self.schedule.warmup_steps} exceeds training.steps {self.training.steps}"
            )
        if (self.schedule.decay_steps or self.training.steps) < self.schedule.warmup_steps:
            raise ValueError(
                f"schedule.decay_steps {self.schedule.decay_steps} ends before warm-up, at {self.schedule.warmup_steps}"
            )

    @property
    def heads_of_layout(self) -> HeadsConfig:
        """``heads`` with its mode resolved."""
        return replace(self.heads, mode=self.heads.mode_under(self.parallel.zero_stage))

    def _check_layout(self) -> None:
        model, tp = self.model, self.parallel.tensor
        if model.n_heads % tp:
            raise ValueError(
                f"model.n_heads {model.n_heads} does not divide by parallel.tensor {tp}; use a divisor of n_heads"
            )
        if model.kv_heads % tp and tp % model.kv_heads:
            raise ValueError(
                f"parallel.tensor {tp} must divide model.n_kv_heads {model.kv_heads} or be a multiple of it"
            )
        if model.hidden_dim % tp:
            raise ValueError(f"model.ffn_dim {model.hidden_dim} does not divide by parallel.tensor {tp}")
        last_start = split_range(model.padded_vocab_size, tp, tp - 1)[0]
        if last_start >= model.vocab_size:
            raise ValueError(
                f"model.vocab_size {model.vocab_size} leaves tensor-parallel rank {tp - 1} with padding only; "
                "use a smaller model.vocab_multiple or parallel.tensor"
            )
        if self.parallel.sequence_parallel and self.data.seq_len % tp:
            raise ValueError(
                f"data.seq_len {self.data.seq_len} does not divide by parallel.tensor {tp}; use a multiple, or "
                "--parallel.sequence false"
            )
        if tp > 1 and self.heads.mode == "naive":
            raise ValueError("heads.mode naive needs whole logits, so parallel.tensor 1; use sequential or joint")
        if self.parallel.zero_stage == 3 and self.heads.mode == "sequential":
            raise ValueError(
                "heads.mode sequential does not go with parallel.zero_stage 3, whose parameters are partitioned when "
                "the heads' own backward needs them; use joint or leave it out"
            )
        if self.ops.compile and (tp > 1 or self.parallel.zero_stage == 3):
            raise ValueError(
                "ops.compile compiles blocks that hold their whole weights; use it with parallel.tensor 1 and "
                "parallel.zero_stage 0 to 2, or leave it out"
            )
        choose_cut(model, self.heads_of_layout.mode, self.parallel, self.data.seq_len, self.ops.recompute)

    def micro_batches(self, world_size: int) -> int:
        """Of one step on each data-parallel rank. ``UserError`` where the layout, batch or schedule does not fit."""
        training, dp_size = self.training, self.parallel.data_parallel(world_size)
        unit = training.micro_batch_size * dp_size
        count, rest = divmod(training.global_batch_size, unit)
        if rest or not count:
            nearest = f"{count * unit} or {(count + 1) * unit}" if count else f"{unit}"
            raise UserError(
                f"training.global_batch_size {training.global_batch_size} does not divide into micro-batches of "
                f"{training.micro_batch_size} on {dp_size} data-parallel ranks; use {nearest}"
            )
        if self.parallel.schedule == "dualpipev" and count < 2 * self.parallel.pipeline:
            raise UserError(
                f"training: {count} micro-batches a step are too few for dualpipev, which needs 2 x parallel.pipeline "
                f"= {2 * self.parallel.pipeline}; raise global_batch_size, lower micro_batch_size, or use 1f1b"
            )
        return count
