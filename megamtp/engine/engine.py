"""One training step on DeepSpeed's engines: forward, backward, gradient norm, clipping, update.

DeepSpeed shards, reduces and updates; the gradient norm, clipping and the check for non-finite gradients are
ours, so that they mean the same in every layout and precision. ``build_engine`` chooses: without a pipeline the
layers are one module under ``DeepSpeedEngine`` (here), with one they are stages (``pipeline.py``).
"""

import io
import math
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from megamtp.engine.optimizer import OptimizerConfig, build_optimizer
from megamtp.engine.part_timer import PartTimer
from megamtp.model.heads import GradientSink, HeadLosses, MultiTokenHeads
from megamtp.model.model import MultiTokenModel, NamedLayer
from megamtp.model.transformer import Block
from megamtp.ops.choice import AdamWName
from megamtp.parallel.groups import ParallelConfig, ProcessGrid

Precision = Literal["fp32", "bf16"]
NORM_PIECE = 1 << 18
BUCKET = 50_000_000  # values in one message of ZeRO
ModelInputs = dict[str, Tensor | None]  # the keyword arguments of MultiTokenModel.forward, one micro-batch


class StepResult(NamedTuple):
    """Per-head sums, each (n,), which summed over all ranks are the step's; the global norm before clipping."""

    sums: Tensor
    counts: Tensor
    correct: Tensor
    grad_norm: float
    skipped: str | None  # why the update was left out, on all ranks alike; None = it was made


# (sums (n,), counts (n,), gradient norm), the step's over all ranks -> why its update is left out, or None.
Judge = Callable[[list[float], list[float], float], str | None]


def _refuse_non_finite(sums: list[float], counts: list[float], grad_norm: float) -> str | None:
    return None if math.isfinite(grad_norm) else "non-finite"


class Engine:
    """Owns the DeepSpeed engine of one rank. ``module`` is the model, in the training precision."""

    def __init__(
        self,
        model: nn.Module,
        *,
        grid: ProcessGrid,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        adamw: AdamWName = "torch",
        precision: Precision,
        micro_batch_size: int,
        micro_batches: int,
    ):
        import deepspeed

        self.grid, self.clip = grid, optimizer.clip
        self.timer = PartTimer(grid.device)  # forward, backward, step: of the last step
        self.judge: Judge = _refuse_non_finite
        self.micro_batches = micro_batches
        self.layers = self._named_layers(model)  # this rank's, with the prefixes of their logical names
        if parallel.zero_stage == 3:
            _prepare_for_partitioning(model)
        with redirect_stdout(io.StringIO()):  # lines about memory
            self.deepspeed, *_ = deepspeed.initialize(
                model=model,
                optimizer=build_optimizer(self.layers, optimizer, adamw),
                config=deepspeed_config(parallel, precision, micro_batch_size, micro_batches),
                mpu=self._model_parallel_unit(),
            )
        self.module = self.deepspeed.module
        self._replace_norms()
        self._offer_accumulators()
        # One rank's losses count: under tensor parallelism all of its neighbours have the same.
        self.counts_losses = self.has_heads and grid.tensor.rank == 0
        self._n = self._n_heads(model)
        self._configure()

    # --- what differs with a pipeline

    has_heads = True  # this rank computes losses

    def _named_layers(self, model: MultiTokenModel) -> list[NamedLayer]:
        return model.named_layers()

    def _n_heads(self, model: MultiTokenModel) -> int:
        return model.config.n_future_tokens

    def _model_parallel_unit(self):
        # Always one: DeepSpeed keeps the last in a global, and an engine without would take that of another.
        return ModelParallelUnit(self.grid)

    def _configure(self) -> None:
        self.deepspeed.enable_backward_allreduce = self._needs_reduction()

    def _run_step(self, batches: list[ModelInputs]) -> float:
        for index, batch in enumerate(batches):
            with self.timer.part("forward"):
                losses = self._forward(self.deepspeed, batch)
            with self.timer.part("backward"):
                self.deepspeed.backward(losses.loss)
            self._add(losses)
            if index + 1 < len(batches):
                self.deepspeed.step()  # counts the micro-batch; the update waits for the last one
        with self.timer.part("step"):
            grad_norm = self._clip_gradients()
            self.deepspeed.step()
        return grad_norm

    def _run_evaluation(self, batches: Iterable[ModelInputs]) -> None:
        for batch in batches:
            self._add(self._forward(self.module, batch))

    # --- the same in every layout

    def _needs_reduction(self) -> bool:
        """With one replica there is nothing to reduce, and DeepSpeed would still copy every gradient twice.

        ZeRO's optimizers take their gradients over in the course of it, but for bf16 with ZeRO-1.
        """
        takes_over = hasattr(self.deepspeed.optimizer, "averaged_gradients")
        return self.grid.dp_size > 1 or takes_over

    def train_step(self, batches: list[ModelInputs | None], lr: float) -> StepResult:
        """One optimizer step over this rank's micro-batches. ``judge`` may leave the update out.

        Ranks of a pipeline that hold neither its first nor its last stage may be given None for each.
        """
        if len(batches) != self.micro_batches:
            raise ValueError(f"expected {self.micro_batches} micro-batches, got {len(batches)}")
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        self._totals = None
        self.timer.clear()
        grad_norm = self._run_step(batches)
        return StepResult(*self._counted_totals(), grad_norm=grad_norm, skipped=self._skipped)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[ModelInputs | None]) -> tuple[Tensor, Tensor, Tensor]:
        """Per-head (sums, counts, correct), each (n,), to be summed over all ranks; zeros for none."""
        self._totals = None
        self._run_evaluation(batches)
        return self._counted_totals()

    def gradients(self) -> list[tuple[dict, list[Tensor]]]:
        """(optimizer's group, reduced gradients that this rank is about to use), after the last backward."""
        optimizer, groups = self.deepspeed.optimizer, self.deepspeed.basic_optimizer.param_groups
        if hasattr(optimizer, "_wait_for_offload_copies"):  # they run behind the host's back
            optimizer._wait_for_offload_copies()
        if hasattr(optimizer, "fp32_groups_gradient_flat_partition"):  # BF16_Optimizer: bf16 with ZeRO-1
            return [
                (group, [g]) for group, g in zip(groups, optimizer.fp32_groups_gradient_flat_partition, strict=True)
            ]
        if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3, in sub-groups of the optimizer's groups
            of_flat = [groups[optimizer.sub_group_to_group_id[i]] for i in range(len(optimizer.fp16_groups))]
            flats = optimizer.fp32_partitioned_groups_flat
        elif hasattr(optimizer, "single_partition_of_fp32_groups"):  # ZeRO-1 and 2
            of_flat, flats = groups, optimizer.single_partition_of_fp32_groups
        else:
            return [(group, [p.grad for p in group["params"] if p.grad is not None]) for group in groups]
        if flats and flats[0].grad is not None:  # offloaded
            return [(group, [flat.grad]) for group, flat in zip(of_flat, flats, strict=True)]
        return [(group, list(optimizer.averaged_gradients.get(i) or ())) for i, group in enumerate(of_flat)]

    def _clip_gradients(self) -> float:
        """Global norm of the gradient; scales it to at most ``clip``, or sees to it that no rank steps."""
        # Without ZeRO every replica holds the same gradient: one of them counts.
        counts = self.deepspeed.zero_optimization() or self.grid.dp_rank == 0
        square = torch.zeros((), dtype=torch.float64, device=self.grid.device)
        gradients = self.gradients()
        for group, grads in gradients:
            if counts and grads and group["counts_in_norm"]:
                # In fp32 a GPU's norm overflows for finite gradients beyond 1e19. A CPU's does not, and fp64 is slow
                # there; but it adds the squares one by one, and loses 1 % of 1e8 of them, so it gets short pieces.
                wide = torch.float64 if grads[0].is_cuda else None
                if wide is None:
                    grads = [piece for grad in grads for piece in grad.view(-1).split(NORM_PIECE)]
                square += torch.stack(torch._foreach_norm(grads, dtype=wide)).double().square().sum().to(square.device)
        sums, counts, _ = self._counted_totals()
        # One message, and one look at the device, for all that the step is judged by.
        totals = self.grid.sum_over_ranks(torch.cat([square.view(1), sums.double(), counts.double()]))
        self._norm = totals[0].sqrt()
        square_sum, *losses = totals.tolist()
        grad_norm, n = math.sqrt(square_sum) if square_sum >= 0 else math.nan, len(losses) // 2
        self._skipped = self.judge(losses[:n], losses[n:], grad_norm)
        if self._skipped:
            self._norm = torch.full_like(self._norm, torch.nan)
            # ZeRO's optimizers skip the step when they see this norm. A bare AdamW would step.
            if not self.deepspeed.zero_optimization():
                self.module.zero_grad(set_to_none=True)
        elif self.clip and grad_norm > self.clip:
            for _, grads in gradients:
                if grads:
                    torch._foreach_mul_(grads, self.clip / grad_norm)
        return grad_norm

    def _replace_norms(self) -> None:
        """DeepSpeed's ZeRO optimizers take the norm that was just computed, and skip the step where it is not finite.

        Their own count other tensor-parallel ranks' replicas again or crash where all of a rank's are, and wait for
        one message a group of parameters from every stage, also from a stage that has no such group.
        """
        optimizer = self.deepspeed.optimizer
        if hasattr(optimizer, "scaled_global_norm"):  # ZeRO-1 and 2
            optimizer.scaled_global_norm = lambda *_: self._norm
            optimizer.check_overflow = lambda *_, **__: None  # a pass over all gradients to learn the same
        if hasattr(optimizer, "_get_norm_groups"):  # ZeRO-3
            optimizer._get_norm_groups = lambda: [self._norm]
        if hasattr(optimizer, "get_grads_for_norm"):  # bf16 with ZeRO-1 asks only whether it is finite: 0, or NaN
            optimizer.get_grads_for_norm = lambda *_, **__: ([self._norm * 0], {})

    def _offer_accumulators(self) -> None:
        """Let sequential heads add to the gradients that the optimizer reads, where these are whole tensors."""
        optimizer, scale = self.deepspeed.optimizer, 1 / self.micro_batches
        if hasattr(optimizer, "fp32_groups_gradients"):  # BF16_Optimizer: bf16 with ZeRO-1
            wide = {
                parameter: grad
                for group in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True)
                for parameter, grad in zip(*group, strict=True)
            }
            sink = GradientSink(scale, lambda parameter: wide[parameter].view(parameter.shape))
        elif self._reads_parameter_grads():
            sink = GradientSink(scale, _grad_in_place)
        else:  # ZeRO-2 and 3 reduce what autograd hands over, offload copies it
            return
        for _, layer in self.layers:
            if isinstance(layer, MultiTokenHeads):
                layer.sink = sink

    def _reads_parameter_grads(self) -> bool:
        """fp32 with ZeRO-0 or ZeRO-1 on the device: ``parameter.grad`` is summed over the micro-batches."""
        stage, optimizer = self.deepspeed.zero_optimization_stage(), self.deepspeed.optimizer
        offloads, narrow = getattr(optimizer, "cpu_offload", False), self.deepspeed.bfloat16_enabled()
        return stage <= 1 and not offloads and not narrow

    def _forward(self, run, inputs: ModelInputs) -> HeadLosses:
        device = self.grid.device
        return run(**{name: None if x is None else x.to(device, non_blocking=True) for name, x in inputs.items()})

    def _add(self, losses: HeadLosses) -> None:
        new = losses.sums.double(), losses.counts, losses.correct
        self._totals = new if self._totals is None else tuple(a + b for a, b in zip(self._totals, new, strict=True))

    def _counted_totals(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._totals is not None and self.counts_losses:
            return self._totals
        types = torch.float64, torch.int64, torch.int64
        return tuple(torch.zeros(self._n, dtype=dtype, device=self.grid.device) for dtype in types)


def _grad_in_place(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


class ModelParallelUnit:
    """What DeepSpeed asks of tensor parallelism without a pipeline: who shares gradients, who shares a model."""

    def __init__(self, grid: ProcessGrid):
        self.grid = grid

    def get_data_parallel_rank(self) -> int:
        return self.grid.dp_rank

    def get_data_parallel_world_size(self) -> int:
        return self.grid.dp_size

    def get_data_parallel_group(self):
        return self.grid.dp_group

    def get_model_parallel_rank(self) -> int:
        return self.grid.model_rank

    def get_model_parallel_world_size(self) -> int:
        return self.grid.tensor.size * self.grid.pp_size

    def get_model_parallel_group(self):
        return self.grid.model_group

    # It asks by these names, too, and means the same: without a pipeline both are the tensor-parallel ranks.
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group


def _prepare_for_partitioning(model: MultiTokenModel) -> None:
    """ZeRO-3 gathers a module's parameters when its forward is called; here several are used from outside."""
    from deepspeed.runtime.zero.partition_parameters import register_external_parameter
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(model, [Block])  # gathered as a whole, which is also fewer and larger messages
    for weight in model.output_heads.output_weights():
        register_external_parameter(model.output_heads, weight)


def deepspeed_config(parallel: ParallelConfig, precision: Precision, micro_batch_size: int, micro_batches: int) -> dict:
    """DeepSpeed's own config. Clipping is off: ours runs before its step."""
    # DeepSpeed's own default of 5e8 values allocates gigabytes of buffers, whatever the model.
    zero = {"stage": parallel.zero_stage, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    if parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "zero_optimization": zero,
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        # Both would assume that all tensor-parallel ranks hold the same activations.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        # Offloaded states are updated by torch's AdamW: DeepSpeed's own would compile C++ at first use.
        "zero_force_ds_cpu_optimizer": False,
    }
    if precision == "bf16":
        # ZeRO-1 takes each gradient when it is ready, not when backward ends: it clears gradients in a hook on the
        # output of the module's forward, and in a pipeline the heads, behind that output, have theirs already.
        config["bf16"] = {"enabled": True, "immediate_grad_update": True}
        # Without these it would silently sum micro-batches, and replicas, in bf16.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    return config
