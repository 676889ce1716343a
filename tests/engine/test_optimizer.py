"""AdamW by apex (a stand-in) and by DeepSpeed (its own class, its CUDA kernel replaced) against PyTorch's."""

import copy
from types import SimpleNamespace

import pytest
import torch

from megamtp.engine.optimizer import OptimizerConfig, adamw_states, adamw_steps, build_optimizer, set_adamw_steps
from tests.model.llama import random_model, small_config
from tests.ops.closeness import relative_error
from tests.ops.fake_libraries import FusedAdam, adamw_update, install

BACKENDS = pytest.mark.parametrize("backend", ["torch", "apex", "deepspeed"])


def multi_tensor_adam(_chunk, _overflow, lists, lr, beta1, beta2, eps, step, mode, bias_correction, weight_decay):
    assert mode == bias_correction == 1
    group = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay}
    for grad, p, exp_avg, exp_avg_sq in zip(*lists, strict=True):
        adamw_update(p, grad, exp_avg, exp_avg_sq, step, group)


@pytest.fixture
def build(monkeypatch):
    from deepspeed.ops.adam import fused_adam

    install(monkeypatch, "apex.optimizers", FusedAdam=FusedAdam)
    kernels = SimpleNamespace(multi_tensor_adam=multi_tensor_adam)
    monkeypatch.setattr(fused_adam, "FusedAdamBuilder", lambda: SimpleNamespace(load=lambda: kernels))
    return lambda model, backend: build_optimizer(
        model.named_layers(), OptimizerConfig(lr=1e-2, weight_decay=0.3), backend
    )


def train(model, adamw, seeds) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        adamw.step()


@BACKENDS
def test_updates_and_resume(build, backend):
    """Five steps, of which the last three from moments and a count that were put into a new optimizer."""
    reference, model = (random_model(small_config(), seed=0) for _ in range(2))
    plain = torch.optim.AdamW(
        [
            {"params": [p for p in reference.parameters() if p.ndim > 1], "weight_decay": 0.3},
            {"params": [p for p in reference.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
        foreach=False,
    )
    train(reference, plain, range(5))

    adamw = build(model, backend)
    train(model, adamw, range(2))
    assert adamw_steps(adamw) == 2
    parameters = [p for group in adamw.param_groups for p in group["params"]]
    moments = copy.deepcopy([{k: adamw.state[p][k] for k in ("exp_avg", "exp_avg_sq")} for p in parameters])
    adamw = build(model, backend)
    states = adamw_states(adamw, parameters)
    assert adamw_steps(adamw) == 0
    for p, values in zip(parameters, moments, strict=True):
        for kind, value in values.items():
            assert not states[p][kind].any()
            states[p][kind].copy_(value)
    set_adamw_steps(adamw, 2)
    train(model, adamw, range(2, 5))
    assert adamw_steps(adamw) == 5
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert relative_error(ours, theirs) < 1e-6, name
