"""One training step on DeepSpeed's engine: forward, backward, gradient norm, clipping, update.

DeepSpeed shards, reduces and updates; the gradient norm, clipping and the check for non-finite gradients are
ours, so that they mean the same under every ZeRO stage and precision.
"""

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megamtp.engine.optimizer import OptimizerConfig, build_optimizer
from megamtp.model.heads import HeadLosses
from megamtp.model.model import MultiTokenModel
from megamtp.parallel.groups import ParallelConfig, ProcessGrid

Precision = Literal["fp32", "bf16"]
ModelInputs = dict[str, Tensor | None]  # the keyword arguments of MultiTokenModel.forward, one micro-batch


class StepResult(NamedTuple):
    """Per-head sums over this rank's micro-batches, each (n,); the global gradient norm before clipping."""

    sums: Tensor
    counts: Tensor
    correct: Tensor
    grad_norm: float
    skipped: bool


class Engine:
    """Owns the DeepSpeed engine of one rank. ``module`` is the model, in the training precision."""

    def __init__(
        self,
        model: MultiTokenModel,
        *,
        grid: ProcessGrid,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        precision: Precision,
        micro_batch_size: int,
        micro_batches: int,
    ):
        import deepspeed

        self.grid, self.clip = grid, optimizer.clip
        self.micro_batches = micro_batches
        self.deepspeed, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, optimizer),
            config=deepspeed_config(parallel, precision, micro_batch_size, micro_batches),
        )
        # With one replica there is nothing to reduce, and DeepSpeed would still copy every gradient twice.
        self.deepspeed.enable_backward_allreduce = grid.dp_size > 1 or parallel.zero_stage > 0
        self.module: MultiTokenModel = self.deepspeed.module

    def train_step(self, batches: list[ModelInputs], lr: float) -> StepResult:
        """One optimizer step over this rank's micro-batches. A non-finite gradient norm skips the update."""
        if len(batches) != self.micro_batches:
            raise ValueError(f"expected {self.micro_batches} micro-batches, got {len(batches)}")
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        totals = None
        for index, batch in enumerate(batches):
            losses = self._forward(self.deepspeed, batch)
            self.deepspeed.backward(losses.loss)
            totals = _add(totals, losses)
            if index + 1 < len(batches):
                self.deepspeed.step()  # counts the micro-batch; the update waits for the last one
        grad_norm = self._clip_gradients()
        if not math.isfinite(grad_norm) and not self.deepspeed.zero_optimization():
            # ZeRO's optimizers skip a non-finite step themselves; a bare AdamW would step into NaN.
            self.module.zero_grad(set_to_none=True)
        self.deepspeed.step()
        return StepResult(*totals, grad_norm=grad_norm, skipped=not math.isfinite(grad_norm))

    @torch.no_grad()
    def evaluate(self, batches: Iterable[ModelInputs]) -> tuple[Tensor, Tensor, Tensor]:
        """Per-head (sums, counts, correct), each (n,), over this rank's batches; zeros for none."""
        totals = tuple(torch.zeros(self.module.config.n_future_tokens, device=self.grid.device) for _ in range(3))
        for batch in batches:
            totals = _add(totals, self._forward(self.module, batch))
        return totals

    def gradients(self) -> list[Tensor]:
        """The reduced gradients that this rank's share of the optimizer is about to use, after the last backward."""
        optimizer = self.deepspeed.optimizer
        if hasattr(optimizer, "fp32_groups_gradient_flat_partition"):  # BF16_Optimizer: bf16 with ZeRO-1
            return list(optimizer.fp32_groups_gradient_flat_partition)
        if hasattr(optimizer, "averaged_gradients"):  # DeepSpeedZeroOptimizer: fp32 with ZeRO-1
            return [grad for group in optimizer.averaged_gradients.values() for grad in group or []]
        return [p.grad for p in self.module.parameters() if p.grad is not None]

    def _clip_gradients(self) -> float:
        """Global norm of the gradient; scales it to at most ``clip`` where it is finite."""
        grads = self.gradients()
        # In fp32 a GPU's norm overflows for finite gradients beyond 1e19; the CPU's does not, and is slow in fp64.
        wide = torch.float64 if self.grid.device.type == "cuda" else None
        square = torch.stack(torch._foreach_norm(grads, dtype=wide)).double().square().sum()
        if self.deepspeed.zero_optimization():  # each rank holds its own share; without ZeRO each holds all
            self.grid.sum_over_dp(square)
        grad_norm = square.sqrt().item()
        if self.clip and math.isfinite(grad_norm) and grad_norm > self.clip:
            torch._foreach_mul_(grads, self.clip / grad_norm)
        return grad_norm

    def _forward(self, run, inputs: ModelInputs) -> HeadLosses:
        device = self.grid.device
        return run(**{name: None if x is None else x.to(device) for name, x in inputs.items()})


def deepspeed_config(parallel: ParallelConfig, precision: Precision, micro_batch_size: int, micro_batches: int) -> dict:
    """DeepSpeed's own config. Clipping is off: ours runs before its step."""
    config = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "zero_optimization": {"stage": parallel.zero_stage},
        "gradient_clipping": 0.0,
        "steps_per_print": None,
    }
    if precision == "bf16":
        # Without grad_accum_dtype ZeRO-1 would silently sum micro-batches in bf16.
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return config


def _add(totals, losses: HeadLosses):
    new = losses.sums.double(), losses.counts, losses.correct
    return new if totals is None else tuple(a + b for a, b in zip(totals, new, strict=True))
