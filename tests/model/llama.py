"""The reference of the model tests: n Llamas of transformers that share a trunk, and autograd through whole logits."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from megamtp.convert.formats import logical_names
from megamtp.convert.huggingface import from_llama_state_dict, llama_config_dict, to_llama_state_dict
from megamtp.model.model import MultiTokenModel, build_model
from megamtp.model.transformer import ModelConfig
from megamtp.ops.elementwise import rotary_table

# No multiple of vocab_multiple, so that there are padding rows; weights large enough that every term matters.
SMALL = {"vocab_size": 50, "vocab_multiple": 64, "dim": 16, "n_heads": 4, "ffn_dim": 24, "init_std": 0.25}


def small_config(**overrides) -> ModelConfig:
    return ModelConfig(**{**SMALL, "n_layers": 4, **overrides})


def random_model(config, heads=None, ops=None, *, seed, dtype=torch.float32) -> MultiTokenModel:
    """As built, except that the norms' weights are not 1: no two parameters of a block can be mistaken."""
    model = build_model(config, heads, ops, seed=seed, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(1 + torch.randn(parameter.shape, generator=generator) / 3)
    return model


class MicroBatch(NamedTuple):
    """tokens, positions, document_ids (b, s); targets (n, b, s)."""

    tokens: Tensor
    targets: Tensor
    positions: Tensor | None = None
    document_ids: Tensor | None = None


def micro_batch(config: ModelConfig, b=2, s=9, seed=0, documents=False, masked=0.2) -> MicroBatch:
    """Random tokens; a share of the targets is masked."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (b, s), generator=generator)
    targets = torch.randint(config.vocab_size, (config.n_future_tokens, b, s), generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < masked] = -100
    if not documents:
        return MicroBatch(tokens, targets)
    # Each row is cut into documents elsewhere; positions restart.
    begins = torch.rand(b, s, generator=generator) < 0.3
    begins[:, 0] = True
    index = torch.arange(s).expand(b, s)
    positions = index - torch.where(begins, index, 0).cummax(1).values
    return MicroBatch(tokens, targets, positions, begins.cumsum(1).int())


def head_config(config: ModelConfig) -> ModelConfig:
    """The model of the trunk and a single head."""
    values = {name: getattr(config, name) for name in config.__dataclass_fields__}
    own = {"n_layers": config.n_trunk_layers + 1, "n_future_tokens": 1, "replicated_unembedding": False}
    return ModelConfig(**{**values, **own})


def name_in_whole(name: str, config: ModelConfig, head: int) -> str:
    """What the parameter ``name`` of ``head_config`` is called in the model of which that is the 0-based ``head``."""
    if name == "output.weight" and config.replicated_unembedding:
        return f"output.{head}.weight"
    return name.replace("heads.0.", f"heads.{head}.")


def llama(parameters: dict[str, Tensor], config: ModelConfig, head: int = 0, wide: bool = False) -> LlamaForCausalLM:
    """transformers' Llama of the trunk and the 0-based ``head``, in the parameters' dtype.

    transformers computes norms and (eager) softmax in fp32 and has its own fp32 table of angles. ``wide`` takes
    ``torch.nn.RMSNorm``, PyTorch's attention and our table, so that a comparison in fp64 sees nothing but the model.
    """
    names = {name: name_in_whole(name, config, head) for name in logical_names(head_config(config))}
    own = {name: parameters[whole] for name, whole in names.items()}
    state = to_llama_state_dict(own, head_config(config))
    attention = "sdpa" if wide else "eager"
    model = LlamaForCausalLM(LlamaConfig(**llama_config_dict(head_config(config)), attn_implementation=attention))
    if wide:
        for module in list(model.modules()):
            for name, child in module.named_children():
                if type(child).__name__ == "LlamaRMSNorm":
                    setattr(module, name, torch.nn.RMSNorm(config.dim, config.norm_eps))
        model.model.rotary_emb = _OurAngles(config)
    model.to(parameters["norm.weight"].dtype).load_state_dict(state, strict=True)
    return model


class _OurAngles(torch.nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        table = rotary_table(position_ids, self.config.head_dim, self.config.rope_theta)
        return tuple(torch.cat((half, half), -1).squeeze(2).to(x.dtype) for half in table)


def llama_logits(model: LlamaForCausalLM, batch: MicroBatch) -> Tensor:
    """(b, s, V)."""
    arguments = {}
    if batch.document_ids is not None:
        ids, s = batch.document_ids, batch.tokens.shape[1]
        sees = (ids[:, :, None] == ids[:, None, :]) & torch.ones(s, s).tril().bool()
        mask = torch.zeros(sees.shape, dtype=model.dtype).masked_fill(~sees, torch.finfo(model.dtype).min)
        arguments = {"attention_mask": mask[:, None], "position_ids": batch.positions}
    return model(input_ids=batch.tokens, use_cache=False, **arguments).logits


class Expected(NamedTuple):
    loss: Tensor  # scalar, of the last micro-batch
    sums: Tensor  # (n,), of the last micro-batch, as the two below
    counts: Tensor
    correct: Tensor
    grads: dict[str, Tensor]  # logical name -> gradient, summed over the micro-batches


def expected_losses(
    parameters: dict[str, Tensor],
    config: ModelConfig,
    batches: list[MicroBatch],
    loss_weights: list[float],
    upstream: list[float],
) -> Expected:
    """``sum over micro-batches of upstream x sum_k weight_k x CE_k / (b s)`` by n independent Llamas in fp64."""
    parameters = {name: value.detach().double() for name, value in parameters.items()}
    grads = {name: torch.zeros_like(value) for name, value in parameters.items()}
    sums, counts, correct = [], [], []
    for head, weight in enumerate(loss_weights):
        model = llama(parameters, config, head, wide=True)
        for batch, factor in zip(batches, upstream, strict=True):
            logits, targets = llama_logits(model, batch), batch.targets[head]
            total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
            (factor * weight * total / targets.numel()).backward()
        sums.append(total.detach())
        counts.append((targets != -100).sum())
        correct.append((logits.argmax(-1) == targets).sum())
        own = {name: parameter.grad for name, parameter in model.named_parameters()}
        for name, grad in from_llama_state_dict(own, head_config(config)).items():
            grads[name_in_whole(name, config, head)] += grad
    sums = torch.stack(sums)
    loss = (sums * torch.tensor(loss_weights, dtype=torch.float64)).sum() / batches[-1].tokens.numel()
    return Expected(loss, sums, torch.stack(counts), torch.stack(correct), grads)
