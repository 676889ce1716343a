"""The whole config of a run: the dataclasses of the rooms, composed, and what only holds between them."""

from typing import Annotated, Literal

from pydantic import Field

from megamtp.config import REQUIRED, config_dataclass, option
from megamtp.data.loader import DataConfig
from megamtp.engine.optimizer import OptimizerConfig
from megamtp.model.heads import HeadsConfig
from megamtp.model.model import OpsConfig
from megamtp.model.transformer import ModelConfig
from megamtp.parallel.groups import ParallelConfig
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
    stop_after: PositiveInt | None = option(None, "save and stop at this step, without changing the schedule")
    peak_tflops: Annotated[float, Field(gt=0)] | None = option(
        None, "of one device, for MFU; null = GPUs known by name"
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

    def __post_init__(self):
        weights, n = self.heads.loss_weights, self.model.n_future_tokens
        if weights is not None and len(weights) != n:
            raise ValueError(f"heads.loss_weights has {len(weights)} entries; model.n_future_tokens is {n}")
        if self.training.precision == "bf16" and self.parallel.zero_stage == 0:
            raise ValueError(
                "training.precision bf16 needs parallel.zero_stage 1, which keeps the fp32 master weights; "
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
