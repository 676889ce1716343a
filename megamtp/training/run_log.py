"""What the main rank tells of a run: the progress bar, the lines of ``metrics.jsonl``, and events among them."""

import math
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from megamtp.engine.engine import StepResult
from megamtp.model.cost import train_flops_per_token
from megamtp.parallel.groups import ProcessGrid
from megamtp.planner.estimate import estimate_run
from megamtp.training.checkpoint import Checkpoint
from megamtp.training.device import device_peak
from megamtp.training.metrics import HeadMetrics, MetricsWriter, peak_memory
from megamtp.training.run_config import RunConfig
from megamtp.training.run_state import RunState
from megamtp.training.saver import Saved
from megamtp.training.slow_ranks import WINDOW, SlowRanks

COMPARED_STEP = 5  # of a start: its time and memory are compared with the estimate


class StepTimes(NamedTuple):
    """Where the time of a step went, in seconds."""

    seconds: float  # wall time on the main rank
    per_part: dict[str, float]  # of it, and "checkpoint", for which training stood still before
    of_ranks: list[float]  # what each rank took by itself


class RunLog:
    """Of the main rank alone; closes itself as a context. ``bytes_before``: its peak memory before the engine."""

    def __init__(self, run_dir: Path, config: RunConfig, grid: ProcessGrid, step: int, bytes_before: int):
        self.config, self.grid, self._bytes_before = config, grid, bytes_before
        self.metrics = MetricsWriter(run_dir, step, config.monitor)
        self.bar = tqdm(total=config.training.steps, initial=step, unit="step", dynamic_ncols=True)
        self._flops_per_token = train_flops_per_token(config.model, config.data.seq_len)
        self._trained = 0  # steps of this start
        self._slow_ranks = SlowRanks(grid, config.monitor.slow_rank_ratio)
        self._peak = device_peak(config, grid.device)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()
        self.metrics.close()

    def started(self, checkpoint: Checkpoint | None, damaged: list[tuple[Path, str]], is_over: bool) -> None:
        """The run begins, or goes on from ``checkpoint``, or is over already."""
        layout, world_size = self.config.parallel, self.grid.world_size
        step = checkpoint.manifest["step"] if checkpoint else 0
        self._passed_over(step, damaged)
        if not is_over:
            self.metrics.event(
                step,
                "started",
                world_size=world_size,
                layout={"tensor": layout.tensor, "pipeline": layout.pipeline, "data": layout.data_parallel(world_size)},
                resumed_from=str(checkpoint.path) if checkpoint else None,
            )
        if checkpoint:
            self.bar.write(f"going on from {checkpoint.path} (step {step} of {self.config.training.steps})")

    def trained(
        self,
        state: RunState,
        heads: HeadMetrics,
        result: StepResult,
        lr: float,
        times: StepTimes,
        epochs: dict[str, Any],
    ) -> None:
        """A step is done."""
        seconds = times.seconds
        tokens_per_s = state.tokens_per_step / seconds
        tflops = tokens_per_s * self._flops_per_token / 1e12
        loss = state.weighted(heads.losses)
        self.metrics.write(
            {
                "step": state.step,
                "time": time.time(),
                "tokens": state.counters["tokens"],
                "loss": loss,
                "loss_per_head": heads.losses,
                "accuracy_per_head": heads.accuracies,
                "lr": lr,
                "grad_norm": result.grad_norm,
                "skipped_steps": state.counters["skipped_steps"],
                "seconds": seconds,
                "seconds_per_part": times.per_part,
                **({"slowest_rank": slowest} if (slowest := self._slow_ranks.slowest(times.of_ranks)) else {}),
                "tokens_per_s": tokens_per_s,
                "tflops": tflops,
                "mfu": tflops / (self._peak * self.grid.world_size) if self._peak else None,
                "memory_gib": peak_memory(self.grid.device) / 2**30,
                "epoch": max(epochs.values()),
                **({"epoch_per_source": epochs} if len(epochs) > 1 else {}),
            }
        )
        self._trained += 1
        if self._trained == COMPARED_STEP:
            self._compare(seconds)
        self.bar.set_postfix_str(f"loss {_numbers(heads.losses)}, {tokens_per_s:,.0f} tokens/s")
        self.bar.update()
        for rank, ratio in self._slow_ranks.newly_slow().items():
            self.metrics.event(state.step, "slow_rank", rank=rank, ratio=ratio)
            self.bar.write(
                f"step {state.step}: rank {rank} is slow: {ratio:.2f} times the median of its stage, for {WINDOW} steps"
            )
        if result.skipped:
            self.metrics.event(state.step, "skipped", reason=result.skipped, loss=loss, grad_norm=result.grad_norm)
            values = f"loss {loss:.4g}, gradient norm {result.grad_norm:.4g}"
            self.bar.write(f"step {state.step}: {result.skipped} ({values}): step skipped on all ranks")

    def _compare(self, seconds: float) -> None:
        device = self.grid.device
        on_gpu = device.type == "cuda"
        estimate = estimate_run(
            self.config, self.grid.world_size, torch.cuda.get_device_name(device) if on_gpu else None
        )
        measured = peak_memory(device) - (0 if on_gpu else self._bytes_before)
        self.bar.write(estimate.against(seconds, measured, resident=not on_gpu))

    def evaluated(self, step: int, sets: dict[str, HeadMetrics], heads: HeadMetrics) -> None:
        """Validation: of each set, and of all together."""
        of_sets = {name: of_set._asdict() for name, of_set in sets.items()}
        self.metrics.write(
            {
                "step": step,
                "validation_loss_per_head": heads.losses,
                "validation_accuracy_per_head": heads.accuracies,
                "validation_targets": heads.targets,
                **({"validation_sets": of_sets} if len(sets) > 1 else {}),
            }
        )
        self.bar.write(f"step {step}: validation loss per head {_numbers(heads.losses)}")
        for name, of_set in sets.items() if len(sets) > 1 else ():
            self.bar.write(f"  {name}: {_numbers(of_set.losses)}")

    def saved(self, saved: Saved | None) -> None:
        """A save has ended."""
        if saved is None:
            return
        if saved.error:
            self.metrics.event(saved.step, "checkpoint_failed", error=str(saved.error))
            self.bar.write(f"step {saved.step}: the checkpoint was not written: {saved.error}; training goes on")
        else:
            self.metrics.event(
                saved.step,
                "checkpoint",
                path=str(saved.path),
                stall_seconds=saved.stall_seconds,
                seconds=saved.seconds,
                bytes=saved.bytes,
            )

    def rolled_back(self, step: int, to_step: int, skipped: int, damaged: list[tuple[Path, str]]) -> None:
        """The lines of the steps that are taken back go; events stay."""
        self._passed_over(to_step, damaged)
        skipped_samples = (step - to_step) * self.config.training.global_batch_size
        self.metrics.event(to_step, "rolled_back", from_step=step, to_step=to_step, skipped_samples=skipped_samples)
        self.bar.write(
            f"step {step}: {skipped} steps in a row skipped: back to step {to_step}, past {skipped_samples} samples"
        )
        self.bar.n = to_step
        self.bar.refresh()

    def stopped(self, step: int, by_signal: int | None) -> None:
        """The run ends here, at its last step or by a signal."""
        if by_signal:
            self.metrics.event(step, "stopped", signal=signal.Signals(by_signal).name)

    def _passed_over(self, step: int, damaged: list[tuple[Path, str]]) -> None:
        for path, problem in damaged:
            self.metrics.event(step, "damaged", path=str(path), error=problem)
            self.bar.write(f"passed over a damaged checkpoint: {problem}")


def _numbers(values: list[float]) -> str:
    return " ".join("  -  " if math.isnan(value) else f"{value:.3f}" for value in values)
