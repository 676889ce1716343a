"""Every backend that can run on this device against its definition, and the check that a run makes at start."""

from dataclasses import replace

import pytest
import torch

from megamtp.errors import RunFailure
from megamtp.ops import cross_entropy_triton, elementwise_triton
from megamtp.ops.choice import OpsConfig, Use, choose, runnable, this_machine
from megamtp.ops.comparison import TOLERANCE, Shape, check_backends, comparisons

CPU = torch.device("cpu")
SMALL = Shape(b=2, s=24, h=4, g=2, hd=8, f=40, vocab=101)
LARGE = Shape(b=2, s=1024, h=16, g=4, hd=128, f=5632, vocab=32_003)
TRITON = OpsConfig(elementwise="triton", cross_entropy="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("ops", [OpsConfig(), TRITON, OpsConfig(attention="cudnn", norm="reference")], ids=str)
def test_backends_of_a_cpu(ops, dtype):
    found = {c.part: c.error() for c in comparisons(ops, SMALL, dtype, CPU)}
    assert found.keys() == {"whole", "documents", "norm", "rotary", "swiglu", "loss"}
    assert max(found.values()) <= TOLERANCE[dtype]
    if dtype == torch.bfloat16:
        assert min(found.values()) > 1e-4  # it has been computed in bf16


def wrong_swiglu(monkeypatch):
    forward = elementwise_triton.swiglu
    monkeypatch.setattr(elementwise_triton, "swiglu", lambda gate, up: forward(gate, up) * 1.001)


def wrong_gradient(monkeypatch):
    original = cross_entropy_triton.logits_to_gradient

    def scaled(logits, *args):
        result = original(logits, *args)
        logits.mul_(1.001)
        return result

    monkeypatch.setattr(cross_entropy_triton, "logits_to_gradient", scaled)


@pytest.mark.parametrize(
    ("break_it", "key"), [(wrong_swiglu, "elementwise"), (wrong_gradient, "cross_entropy")], ids=["forward", "backward"]
)
def test_a_wrong_kernel_ends_the_run_at_start(break_it, key, monkeypatch):
    check_backends(TRITON, SMALL, torch.float32, CPU)
    break_it(monkeypatch)
    with pytest.raises(RunFailure, match=f"ops.{key}: triton is wrong on this device: .* use --ops.{key} torch"):
        check_backends(TRITON, SMALL, torch.float32, CPU)


def test_what_is_portable_is_not_checked(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "rms_norm", None)
    check_backends(OpsConfig(), SMALL, torch.float32, CPU)
    with pytest.raises(TypeError):
        [c.error() for c in comparisons(OpsConfig(), SMALL, torch.float32, CPU)]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [SMALL, replace(LARGE, s=1000), LARGE], ids=["small", "odd", "large"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_backend_of_a_gpu(dtype, shape):
    if shape is SMALL:
        shape = replace(shape, hd=64)
    device, failed = torch.device("cuda"), []
    use = Use(half=dtype == torch.bfloat16, documents=True, split_vocabulary=False)
    for operation, name in runnable(OpsConfig(), this_machine(device), use):
        if operation == "adamw":
            continue
        for comparison in comparisons(OpsConfig(**{operation: name}), shape, dtype, device):
            if comparison.backend == name and not (error := comparison.error()) <= TOLERANCE[dtype]:
                failed.append((operation, comparison.part, name, error))
    assert not failed


@pytest.mark.gpu
def test_what_is_chosen_on_a_gpu_passes_its_check():
    device = torch.device("cuda")
    ops, _ = choose(OpsConfig(), this_machine(device), Use(half=True, documents=True, split_vocabulary=False))
    assert ops.elementwise == ops.cross_entropy == "triton"
    check_backends(ops, LARGE, torch.bfloat16, device)
