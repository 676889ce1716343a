"""The n heads, their shared norm, their unembedding, and the loss (arXiv:2404.19737, section 2).

Head k is one transformer block that reads the trunk's output z; its target is the k-th next token. All heads share
one unembedding, or each has its own (``replicated_unembedding``).
The loss is ``sum_k weight_k * (summed cross-entropy of head k) / divisor``, the divisor a constant (b x s):
masking and micro-batch size then leave the gradient unchanged.

Three modes give the same losses and gradients:

sequential  each head runs forward *and* backward inside the forward pass of one autograd function, so that one
            head's activations and one chunk of logits exist at a time; gradients wait until ``backward``.
joint       plain autograd through all heads, one chunked linear cross-entropy over their hidden states.
naive       plain autograd, whole logits, n times ``F.cross_entropy``: the reference.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from megamtp.config import config_dataclass, option
from megamtp.model.transformer import Block, BlockInputs, ModelConfig, RMSNorm
from megamtp.ops.choice import OpsConfig, backend
from megamtp.ops.cross_entropy import (
    CHUNK_TOKENS,
    TokenLosses,
    Workspace,
    linear_cross_entropy,
    linear_cross_entropy_with_grads,
    reference_linear_cross_entropy,
    scale_in_place,
)
from megamtp.parallel.layers import ColumnParallel
from megamtp.parallel.tensor import WHOLE, TensorParallel


@config_dataclass
class HeadsConfig:
    """How the heads are computed and weighed; nothing here changes the model's parameters."""

    mode: Literal["sequential", "joint", "naive"] | None = option(
        None,
        "sequential: least memory; joint: plain autograd, chunked loss; naive: the slow reference; "
        "null = sequential, or joint under ZeRO-3",
    )
    loss_weights: list[float] | None = option(None, "one weight per head; null = 1 each, as in the paper")
    chunk_tokens: Annotated[int, Field(ge=1)] | None = option(
        None, f"tokens whose logits exist at a time; null = {CHUNK_TOKENS}, on a GPU as many as its memory allows"
    )

    @property
    def chunk(self) -> int:
        """``chunk_tokens``, or what stands for it where nobody has chosen."""
        return self.chunk_tokens or CHUNK_TOKENS

    def mode_under(self, zero_stage: int) -> str:
        """What ``mode: null`` stands for; ZeRO-3 has partitioned what sequential's own backward needs."""
        return self.mode or ("joint" if zero_stage == 3 else "sequential")


@dataclass(frozen=True)
class GradientSink:
    """Where sequential heads may add their parameters' gradients at once, in place of keeping them until backward.

    ``scale`` is the factor that the loss will have in backward, and ``accumulator`` a parameter's wide gradient.
    """

    scale: float
    accumulator: Callable[[nn.Parameter], Tensor]


class HeadLosses(NamedTuple):
    """loss is what backward starts from; the rest are sums for logging, one entry a head, detached."""

    loss: Tensor  # scalar
    sums: Tensor  # (n,) summed cross-entropy, nats
    counts: Tensor  # (n,) targets that are not ignored
    correct: Tensor  # (n,) targets that have the largest logit


class MultiTokenHeads(nn.Module):
    """z (b, s, d) -> losses of n heads; parameters ``heads.{k}.*``, ``norm.weight``, ``output.weight``.

    With ``replicated_unembedding`` the last is ``output.{k}.weight``, one for each head.
    Raises ``ValueError`` where the number of loss weights is not n.
    """

    def __init__(self, config: ModelConfig, heads_config: HeadsConfig, ops: OpsConfig, tp: TensorParallel = WHOLE):
        super().__init__()
        n = config.n_future_tokens
        weights = [1.0] * n if heads_config.loss_weights is None else heads_config.loss_weights
        if len(weights) != n:
            raise ValueError(f"heads.loss_weights has {len(weights)} entries; n_future_tokens is {n}")
        self.vocab_size = config.vocab_size
        self.mode, self.chunk_tokens = heads_config.mode or "sequential", heads_config.chunk
        self.loss_weights, self.tp, self.backend = tuple(weights), tp, backend(ops, "cross_entropy")
        self.sink: GradientSink | None = None
        if self.mode == "sequential":  # one head's activations exist at a time: nothing to save
            ops = replace(ops, recompute="none")
        self.heads = nn.ModuleList(Block(config, ops, tp) for _ in range(n))
        self.norm = RMSNorm(config, ops, tp)
        # Not inside the heads: their blocks are what ZeRO-3 gathers and reduces as a whole.
        outputs = [ColumnParallel(config.dim, config.padded_vocab_size, tp) for _ in range(config.n_unembeddings)]
        self.output = nn.ModuleList(outputs) if config.replicated_unembedding else outputs[0]
        shard, rows = outputs[0].shard, len(outputs[0].weight)
        self.vocab_start, self.n_rows = shard.start, min(config.vocab_size - shard.start, rows)  # not padding

    def output_weights(self) -> list[nn.Parameter]:
        """The matrices of all unembeddings, padding rows included: one, or one for each head."""
        return [layer.weight for layer in (self.output if isinstance(self.output, nn.ModuleList) else [self.output])]

    def output_weight(self, k: int) -> nn.Parameter:
        """The matrix that head k (0-based) uses, padding rows included."""
        weights = self.output_weights()
        return weights[k % len(weights)]

    def unembedding(self, k: int) -> Tensor:
        """(V, d): this rank's rows of real tokens. Padding rows never meet a hidden state, so they cannot leak."""
        return self.output_weight(k)[: self.n_rows]

    @property
    def vocabulary(self) -> dict[str, Any]:
        """What the cross-entropy needs to know of a split vocabulary."""
        if self.tp.size == 1:
            return {}
        return {"vocab_start": self.vocab_start, "vocab_size": self.vocab_size, "split": self.tp}

    def hidden(self, k: int, z: Tensor, inputs: BlockInputs) -> Tensor:
        """What head k (0-based) gives to the unembedding: (b, s, d), or this rank's slice of the sequence."""
        return self.norm(self.heads[k](z, inputs))

    def forward(self, z: Tensor, targets: Tensor, inputs: BlockInputs) -> "HeadLosses":
        """``loss``: called as a module where hooks have to see it."""
        return self.loss(z, targets, inputs)

    def logits(self, z: Tensor, inputs: BlockInputs) -> Tensor:
        """All heads' logits (n, b, s, V), of this rank's V. For tests and short prompts: training never holds them."""
        hidden = (self.tp.enter(self.hidden(k, z, inputs)) for k in range(len(self.heads)))
        return torch.stack([x @ self.unembedding(k).t() for k, x in enumerate(hidden)])

    def loss(self, z: Tensor, targets: Tensor, inputs: BlockInputs) -> HeadLosses:
        """z (b, s, d), targets (n, b, s) with ``IGNORE_INDEX`` where masked -> losses over all heads."""
        divisor = targets[0].numel()
        scales = [weight / divisor for weight in self.loss_weights]
        if not torch.is_grad_enabled():
            losses = [self._head_loss(k, z, targets[k], inputs, linear_cross_entropy) for k in range(len(self.heads))]
            return _combine(losses, scales)
        if self.mode == "sequential":
            parameters = list(self.parameters())
            return HeadLosses(*_SequentialHeads.apply(self, targets, inputs, scales, z, *parameters))
        if self.mode == "joint":
            return self._joint_loss(z, targets, inputs, scales)
        losses = [
            self._head_loss(k, z, targets[k], inputs, reference_linear_cross_entropy) for k in range(len(self.heads))
        ]
        return _combine(losses, scales)

    def _head_loss(self, k: int, z: Tensor, targets: Tensor, inputs: BlockInputs, cross_entropy) -> TokenLosses:
        options = {}
        if cross_entropy is not reference_linear_cross_entropy:
            options = {"chunk_tokens": self.chunk_tokens, "backend": self.backend, **self.vocabulary}
        hidden = self.tp.enter(self.hidden(k, z, inputs)).flatten(0, 1)
        return cross_entropy(hidden, self.unembedding(k), targets.flatten(), **options)

    def _joint_loss(self, z: Tensor, targets: Tensor, inputs: BlockInputs, scales: list[float]) -> HeadLosses:
        n = len(self.heads)
        hidden = torch.stack([self.tp.enter(self.hidden(k, z, inputs)) for k in range(n)])  # (n, b, s, d)
        return HeadLosses(
            *_JointLoss.apply(
                hidden.flatten(1, 2),
                targets.flatten(1),
                scales,
                (self.chunk_tokens, self.backend),
                self.vocabulary,
                *(weight[: self.n_rows] for weight in self.output_weights()),
            )
        )


def _combine(losses: list[TokenLosses], scales: list[float]) -> HeadLosses:
    loss = sum(scale * head.loss for scale, head in zip(scales, losses, strict=True))
    return HeadLosses(loss, *(torch.stack([head[i].detach() for head in losses]) for i in range(3)))


class _JointLoss(torch.autograd.Function):
    """One chunked linear cross-entropy per head's hidden state, one accumulator for each unembedding's gradient."""

    @staticmethod
    def forward(ctx, hidden, targets, scales, how, vocabulary, *weights):
        dhidden, dweights, losses = torch.empty_like(hidden), [], []
        workspace, sharing = Workspace(hidden.shape[1], weights[0], *how), len(scales) // len(weights)
        for i, weight in enumerate(weights):
            dweight = None
            for k in range(i * sharing, (i + 1) * sharing):  # the heads that share it: all, or one
                result = linear_cross_entropy_with_grads(
                    hidden[k],
                    weight,
                    targets[k],
                    grad_scale=scales[k],
                    dweight=dweight,
                    workspace=workspace,
                    **vocabulary,
                )
                dhidden[k], dweight = result.dhidden, result.dweight
                losses.append(result.losses)
            dweights.append(dweight.to(weight.dtype))
            del result  # which holds the accumulator
        ctx.grads = [dhidden, *dweights]
        return _mark(ctx, _combine(losses, scales))

    @staticmethod
    def backward(ctx, dloss, *_):
        dhidden, *dweights = scale_in_place(ctx.grads, dloss)
        del ctx.grads
        return dhidden, None, None, None, None, *dweights


class _SequentialHeads(torch.autograd.Function):
    """Each head's forward and backward inside one forward; ``backward`` hands the stored gradients over.

    ``torch.autograd.grad`` and never ``.backward()``: DeepSpeed's bf16 optimizer clears gradients when its own
    backward pass starts, and its hooks must see each gradient once. Never wrap this in activation checkpointing:
    the recomputation would run every head's backward again.
    """

    @staticmethod
    def forward(ctx, module: MultiTokenHeads, targets, inputs, scales, z, *parameters):
        outputs, sink = set(module.output_weights()), module.sink
        # All there before the first head: a gradient that lands among a head's activations would split the memory
        # that the next head needs in one piece, and the peak would grow with n.
        if sink is None:
            grads = {parameter: torch.zeros_like(parameter) for parameter in parameters if parameter not in outputs}
            # Padding rows of the vocabulary keep a gradient of zero.
            wide = torch.promote_types(z.dtype, torch.float32)
            for weight in outputs:
                grads[weight] = torch.zeros(weight.shape, dtype=wide, device=z.device)
        else:
            grads = {parameter: sink.accumulator(parameter) for parameter in parameters}
        dz, losses = torch.zeros_like(z), []
        workspace = Workspace(targets[0].numel(), module.unembedding(0), module.chunk_tokens, module.backend)
        for k, scale in enumerate(scales):
            own = [*module.heads[k].parameters(), module.norm.weight]
            with torch.enable_grad():
                z_k = z.detach().requires_grad_()
                hidden = module.hidden(k, z_k, inputs)
            result = linear_cross_entropy_with_grads(
                module.tp.whole_sequence(hidden.detach()).flatten(0, 1),
                module.unembedding(k).detach(),
                targets[k].flatten(),
                grad_scale=scale if sink is None else scale * sink.scale,
                dweight=grads[module.output_weight(k)][: module.n_rows],
                workspace=workspace,
                **module.vocabulary,
            )
            dhidden = module.tp.sum_to_held(result.dhidden.view(*targets[k].shape, -1))
            dz_k, *dparameters = torch.autograd.grad(hidden, [z_k, *own], dhidden)
            dz.add_(dz_k)
            for parameter, grad in zip(own, dparameters, strict=True):
                grads[parameter].add_(grad)
            losses.append(result.losses)
            # Before the next head, not when it reassigns them.
            del hidden, result, dhidden, z_k, dz_k, dparameters, grad
        ctx.sink, ctx.n_parameters = sink, len(parameters)
        ctx.grads = [dz]
        if sink is None:
            for weight in outputs:
                grads[weight] = grads[weight].to(weight.dtype)
            ctx.grads += [grads[parameter] for parameter in parameters]
        return _mark(ctx, _combine(losses, scales))

    @staticmethod
    def backward(ctx, dloss, *_):
        grads = ctx.grads
        del ctx.grads
        if ctx.sink is None:
            return None, None, None, None, *scale_in_place(grads, dloss)
        if dloss.device.type == "cpu" and not math.isclose(dloss.item(), ctx.sink.scale, rel_tol=1e-6):
            raise RuntimeError(f"gradients were scaled by {ctx.sink.scale}, but the loss's is {dloss.item()}")
        return None, None, None, None, *grads, *[None] * ctx.n_parameters


def _mark(ctx, losses: HeadLosses) -> tuple[Tensor, ...]:
    ctx.mark_non_differentiable(losses.sums, losses.counts, losses.correct)
    return tuple(losses)
