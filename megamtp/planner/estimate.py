"""What a run will take, before it is launched: memory of the fullest device, seconds of a step, days of the whole."""

from dataclasses import dataclass
from typing import Any

from megamtp.model.cost import layer_parameters, parameters, train_flops_per_token
from megamtp.planner.devices import Assumptions, Device, device_by_name
from megamtp.planner.memory import MemoryEstimate
from megamtp.planner.stages import Stage, plan_stages
from megamtp.planner.time import StepModel, StepTime
from megamtp.planner.traffic import Traffic, step_traffic
from megamtp.training.run_config import RunConfig

GIB = 2**30
DAY = 86_400


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on the fullest device: tensors, and what else needs room there."""

    tensors: MemoryEstimate
    libraries: float  # the driver's context, NCCL's buffers, cuBLAS's workspace: an assumption
    slack: float  # what the allocator cannot use: an assumption
    start: float  # the whole weights that ZeRO-3 takes apart before the first step

    @property
    def total(self) -> float:
        return self.libraries + max(self.tensors.total + self.slack, self.start)

    @property
    def lines(self) -> dict[str, float]:
        return vars(self.tensors) | {"libraries": self.libraries, "slack": self.slack}


@dataclass(frozen=True)
class Estimate:
    """Of a run on ``world_size`` devices. ``step`` is None where the device is not known."""

    config: RunConfig
    world_size: int
    stages: list[Stage]
    traffic: list[Traffic]
    memory: DeviceMemory
    device: Device | None
    step: StepTime | None

    @property
    def tokens_per_step(self) -> int:
        return self.config.training.global_batch_size * self.config.data.seq_len

    @property
    def flops_per_step(self) -> float:
        """Model FLOPs of all devices, as MFU counts them."""
        return train_flops_per_token(self.config.model, self.config.data.seq_len) * self.tokens_per_step

    @property
    def mfu(self) -> float | None:
        if not self.step:
            return None
        peak = self.device.flops(self.config.training.precision) * self.world_size
        return self.flops_per_step / (self.step.total * peak)

    @property
    def tokens_per_day(self) -> float | None:
        return self.tokens_per_step / self.step.total * DAY if self.step else None

    @property
    def days(self) -> float | None:
        """Of all steps, without evaluation, checkpoints, restarts."""
        return self.config.training.steps * self.step.total / DAY if self.step else None

    @property
    def fits(self) -> bool | None:
        return self.memory.total <= 1e9 * self.device.memory_gb if self.device else None

    @property
    def _main_rank_bytes(self) -> float:
        return next(stage.rank_memory.total for stage in self.stages if stage.rank == 0)

    def summary(self) -> str:
        """One line: memory, FLOPs and, where the device is known, seconds a step."""
        text = f"estimate: {self.memory.total / GIB:,.1f} GiB on the fullest rank"
        if self.device:
            text += f" of {1e9 * self.device.memory_gb / GIB:,.1f}{'' if self.fits else ' (does not fit)'}"
        text += f"; {self.flops_per_step / 1e12:,.3g} TFLOP a step"
        if self.step:
            text += f" in {self.step.total:,.3g} s (MFU {self.mfu:.1%}); {self.days:,.3g} days for the run"
        return text

    def against(self, seconds: float, peak_bytes: float, resident: bool = False) -> str:
        """One line: the estimate beside a measured step and the main rank's peak of memory.

        ``peak_bytes`` are those of tensors (``torch.cuda.max_memory_allocated``), or ``resident`` ones, which hold what
        malloc keeps as well.
        """
        tensors = self._main_rank_bytes
        text = f"estimated / measured: {tensors / GIB:,.2f} / {peak_bytes / GIB:,.2f} GiB"
        text += " resident, with freed memory" if resident else f" of tensors ({tensors / peak_bytes:.2f})"
        if self.step:
            return f"{text}; {self.step.total:,.3f} / {seconds:,.3f} s a step ({self.step.total / seconds:.2f})"
        return f"{text}; {seconds:,.3f} s a step"

    def as_json(self) -> dict[str, Any]:
        """Plain values: bytes, seconds, FLOPs."""
        config = self.config
        values: dict[str, Any] = {
            "layout": layout_of(config, self.world_size),
            "parameters": parameters(config.model).total,
            "memory_bytes": {name: int(value) for name, value in self.memory.lines.items()},
            "memory_total_bytes": int(self.memory.total),
            "tokens_per_step": self.tokens_per_step,
            "flops_per_step": self.flops_per_step,
            "stages": [
                {"layers": stage.layers, "rank": stage.rank, "parameters": stage.parameters, "flops": stage.flops}
                for stage in self.stages
            ],
        }
        if self.step:
            values |= {
                "fits": self.fits,
                "seconds_per_step": self.step.total,
                "seconds": vars(self.step.seconds),
                "mfu": self.mfu,
                "tokens_per_day": self.tokens_per_day,
                "days": self.days,
                "device_hours": self.days * 24 * self.world_size,
            }
        return values


def layout_of(config: RunConfig, world_size: int) -> dict[str, Any]:
    """What the planner varies, by the config's keys, and what follows from it."""
    parallel, training = config.parallel, config.training
    return {
        "parallel.tensor": parallel.tensor,
        "parallel.pipeline": parallel.pipeline,
        "parallel.schedule": parallel.schedule,
        "parallel.zero_stage": parallel.zero_stage,
        "training.micro_batch_size": training.micro_batch_size,
        "ops.recompute": config.ops.recompute,
        "data": parallel.data_parallel(world_size),
        "micro_batches": config.micro_batches(world_size),
    }


def estimate_run(config: RunConfig, world_size: int, device_name: str | None = None) -> Estimate:
    """For a device as its driver names it; of one that the table does not know, or a CPU, there is no time.

    Raises ``UserError`` where the layout does not fit the number of ranks.
    """
    return estimate_on(config, world_size, device_name and device_by_name(device_name))


def estimate_on(
    config: RunConfig, world_size: int, device: Device | None, assumptions: Assumptions | None = None
) -> Estimate:
    """As ``estimate_run``, for a given device."""
    assumptions = assumptions or Assumptions()
    stages, traffic = stages_and_traffic(config, world_size)
    memory = device_memory(config, stages, assumptions, on_device=device is not None)
    step = StepModel(config, world_size, device, stages, traffic, assumptions).step() if device else None
    return Estimate(config, world_size, stages, traffic, memory, device, step)


def stages_and_traffic(config: RunConfig, world_size: int) -> tuple[list[Stage], list[Traffic]]:
    """The run's table of stages, and the bytes that each pipeline rank sends."""
    step = dict(
        seq_len=config.data.seq_len,
        micro_batch_size=config.training.micro_batch_size,
        micro_batches=config.micro_batches(world_size),
        precision=config.training.precision,
        dp_size=config.parallel.data_parallel(world_size),
        recompute=config.ops.recompute,
    )
    stages = plan_stages(config.model, config.heads, config.parallel, **step)
    documents = config.data.document_attention
    return stages, step_traffic(config.model, config.heads, config.parallel, **step, documents=documents)


def device_memory(
    config: RunConfig, stages: list[Stage], assumptions: Assumptions, on_device: bool = True
) -> DeviceMemory:
    """Of the fullest rank. Without a device, in host memory, there are neither libraries nor an allocator's slack."""
    tensors = max((stage.rank_memory for stage in stages), key=lambda memory: memory.total)
    moving = tensors.activations + tensors.temporaries + tensors.loss_buffers + tensors.communication
    libraries, slack = 1e9 * assumptions.libraries_gb, assumptions.slack * moving
    width = 4 if config.training.precision == "fp32" else 2
    start = width * sum(layer_parameters(config.model, config.parallel.tensor))
    return DeviceMemory(
        tensors,
        libraries if on_device else 0.0,
        slack if on_device else 0.0,
        start if config.parallel.zero_stage == 3 else 0.0,
    )
