"""The same layers as stages of DeepSpeed's pipeline.

Between stages travel the hidden states and, where documents are masked, one integer tensor (2, b, s) with positions
and document ids. The last stage's forward ends with the trunk's output; its loss function runs the heads on it,
because only there DeepSpeed hands out the targets.
"""

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from itertools import islice

import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.dualpipev import DualPipeVModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megamtp.engine.engine import Engine, ModelInputs
from megamtp.model.heads import HeadLosses, HeadsConfig, MultiTokenHeads
from megamtp.model.model import NamedLayer, build_layers, materialize_
from megamtp.model.transformer import BlockInputs, ModelConfig, block_inputs
from megamtp.ops.choice import OpsConfig
from megamtp.ops.cross_entropy import IGNORE_INDEX
from megamtp.parallel.groups import ProcessGrid
from megamtp.parallel.layers import VocabParallelEmbedding

# Waiting for the neighbours' messages is left out: what a step takes beyond these.
TIMED = {
    schedule.ForwardPass: "forward",
    schedule.BackwardPass: "backward",
    schedule.ReduceGrads: "step",
    schedule.OptimizerStep: "step",
}


class PipelineStages(PipelineModule):
    """This rank's layers; ``boundaries`` cut the model's list of them. 1F1B: rank r runs stage r."""

    def __init__(
        self,
        config: ModelConfig,
        heads: HeadsConfig,
        ops: OpsConfig,
        *,
        grid: ProcessGrid,
        boundaries: list[int],
        seed: int | None,
        dtype: torch.dtype,
    ):
        self.config, self._heads, self._ops, self._grid_of_run = config, heads, ops, grid
        self._boundaries, self._seed, self._dtype = boundaries, seed, dtype
        self._prefixes: dict[nn.Module, str] = {}
        self.losses: list[HeadLosses] = []  # of the micro-batches since they were last taken
        topology = PipeModelDataParallelTopology(num_pp=grid.pp_size, num_mp=grid.tensor.size, num_dp=grid.dp_size)
        with redirect_stdout(io.StringIO()):  # it prints its own table
            super().__init__(layers=[None] * boundaries[-1], topology=topology, loss_fn=self._loss)

    def _partition_layers(self, method="uniform"):
        """DeepSpeed's methods know parameters, not what n heads cost."""
        self.parts = self._boundaries
        self._set_bounds(self.parts[self.stage_id], self.parts[self.stage_id + 1])

    def _build(self):
        tp, cut = self._grid_of_run.tensor, slice(self._local_start, self._local_stop)
        with torch.device("meta"):
            layers = build_layers(self.config, self._heads, self._ops, tp, cut)
        materialize_(layers, self.config, self._seed, self._dtype, self._grid_of_run.device)
        for index, (prefix, layer) in enumerate(layers, self._local_start):
            self.forward_funcs.append(layer)
            self.add_module(str(index), layer)
            self._prefixes[layer] = prefix
        for parameter in self.parameters():
            parameter.ds_pipe_replicated = False

    def named_layers(self) -> list[NamedLayer]:
        """This rank's layers under the prefixes of their logical names."""
        return [(prefix, layer) for layer, prefix in self._prefixes.items()]

    def forward(self, inputs: Tensor | tuple[Tensor, Tensor]):
        """tokens (b, s) or hidden states, alone or with positions and documents (2, b, s) -> the same for the next."""
        tp = self._grid_of_run.tensor
        x, packed = inputs if isinstance(inputs, tuple) else (inputs, None)
        seq_len = x.shape[1] * (tp.size if tp.sequence_parallel and x.is_floating_point() else 1)
        documents = () if packed is None else tuple(packed)
        shared = block_inputs(self.config, self._ops, seq_len, x.device, *documents)
        for layer in self.forward_funcs:
            if isinstance(layer, MultiTokenHeads):
                return x, shared
            x = layer(x) if isinstance(layer, VocabParallelEmbedding) else layer(x, shared)
        return x if packed is None else (x, packed)

    def _loss(self, outputs: tuple[Tensor, BlockInputs], targets: Tensor) -> Tensor:
        losses = self.forward_funcs[-1](outputs[0], targets, outputs[1])
        self.losses.append(losses._replace(loss=losses.loss.detach()))
        return losses.loss


class DualPipeVStages(DualPipeVModule, PipelineStages):
    """DualPipeV: rank r runs stages r and 2P - 1 - r. DeepSpeed's module builds both through ``PipelineStages``."""


class PipelineEngine(Engine):
    """``Engine`` over DeepSpeed's pipeline engines."""

    def _named_layers(self, model: PipelineStages) -> list[NamedLayer]:
        return model.named_layers()

    def _n_heads(self, model: PipelineStages) -> int:
        return model.config.n_future_tokens

    def _model_parallel_unit(self):
        return None  # DeepSpeed takes the module's own

    @property
    def has_heads(self) -> bool:
        return any(isinstance(layer, MultiTokenHeads) for _, layer in self.layers)

    @property
    def reads_data(self) -> bool:
        return self.has_heads or any(isinstance(layer, VocabParallelEmbedding) for _, layer in self.layers)

    def _configure(self) -> None:
        self.deepspeed.pipeline_enable_backward_allreduce = self._needs_reduction()
        # DeepSpeed's schedule ends with the update; norm and clipping go between it and the gradients' reduction.
        instructions = dict(self.deepspeed._INSTRUCTION_MAP)
        step = instructions[schedule.OptimizerStep]

        def clip_and_step(engine):
            self._take_losses()
            self._grad_norm = self._clip_gradients()
            step(engine)

        instructions[schedule.OptimizerStep] = clip_and_step
        for instruction, part in TIMED.items():
            instructions[instruction] = self._timed(part, instructions[instruction])
        self.deepspeed._INSTRUCTION_MAP = instructions

    def _timed(self, part: str, execute: Callable) -> Callable:
        def timed(engine, **arguments):
            with self.timer.part(part):
                execute(engine, **arguments)

        return timed

    def _run_step(self, batches: list[ModelInputs | None]) -> float:
        self.deepspeed.train_batch(self._as_deepspeed(batches))
        return self._grad_norm

    def _run_evaluation(self, batches: Iterable[ModelInputs | None]) -> None:
        # DualPipeV's buffers are numbered for the micro-batches of a training step: it evaluates as many at a time,
        # and empty ones fill up. 1F1B takes any number; enough of them keep its stages busy.
        fixed = isinstance(self.module, DualPipeVStages)
        size = self.micro_batches if fixed else max(self.micro_batches, 8 * self.grid.pp_size)
        batches = iter(batches)
        while group := list(islice(batches, size)):
            if fixed and len(group) < size:
                last = group[-1]
                empty = last and last | {"targets": torch.full_like(last["targets"], IGNORE_INDEX)}
                group += [empty] * (size - len(group))
            self.deepspeed.eval_batch(self._as_deepspeed(group), num_micro_batches=len(group))
            self.module.train()
            self._take_losses()

    def _take_losses(self) -> None:
        for losses in self.module.losses:
            self._add(losses)
        self.module.losses.clear()

    def _as_deepspeed(self, batches: Iterable[ModelInputs | None]) -> Iterator | None:
        """((tokens, packed positions and documents), targets) of each micro-batch."""
        if not self.reads_data:
            return None
        return iter([_as_deepspeed(batch) for batch in batches])


def _as_deepspeed(batch: ModelInputs):
    tokens, positions, documents = batch["tokens"], batch.get("positions"), batch.get("document_ids")
    if documents is None:
        if positions is not None:
            raise ValueError("positions travel through a pipeline with document_ids only; give both, or neither")
        return tokens, batch["targets"]
    if positions is None:
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return (tokens, torch.stack([positions, documents]).to(torch.int32)), batch["targets"]
