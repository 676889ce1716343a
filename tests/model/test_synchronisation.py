"""Forward and backward never look at a value on the device: on a GPU that would stall until all work is done.

Tensors of the meta device have no values at all, so that any look raises.
"""

import pytest
import torch

from megamtp.model.heads import HeadsConfig
from megamtp.model.model import MultiTokenModel
from megamtp.ops.choice import OpsConfig
from tests.model.llama import small_config


def step(heads: HeadsConfig, recompute: str, documents: bool) -> torch.Tensor:
    config = small_config(n_layers=6, n_future_tokens=4)
    with torch.device("meta"):
        model = MultiTokenModel(config, heads, OpsConfig(recompute=recompute))
        tokens, targets = torch.empty(2, 16, dtype=torch.long), torch.empty(4, 2, 16, dtype=torch.long)
        ids = torch.empty(2, 16, dtype=torch.long) if documents else None
    losses = model(tokens, targets, ids, ids)
    losses.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    return losses.loss


@pytest.mark.parametrize("documents", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("mode", ["sequential", "joint"])
def test_a_step_without_a_look(mode, recompute, documents):
    assert step(HeadsConfig(mode=mode), recompute, documents).device.type == "meta"


def test_a_look_would_raise(monkeypatch):
    original = MultiTokenModel.trunk

    def looks(self, *args):
        z, inputs = original(self, *args)
        assert z.sum().item() is not None
        return z, inputs

    monkeypatch.setattr(MultiTokenModel, "trunk", looks)
    with pytest.raises(RuntimeError, match="meta"):
        step(HeadsConfig(), "none", False)
