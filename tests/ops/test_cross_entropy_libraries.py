"""Cross-entropy by liger-kernel (the real one, through Triton's interpreter) and by apex (a stand-in)."""

import pytest
import torch

from megamtp.ops.cross_entropy import linear_cross_entropy_with_grads
from megamtp.parallel.tensor import TensorParallel
from tests.ops.closeness import relative_error
from tests.ops.fake_libraries import SoftmaxCrossEntropyLoss, install
from tests.ops.test_cross_entropy import assert_matches, expected, problem

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LIBRARIES = pytest.mark.parametrize("library", ["liger", "apex"])


@pytest.fixture(autouse=True)
def apex(monkeypatch):
    install(monkeypatch, "apex.contrib.xentropy", SoftmaxCrossEntropyLoss=SoftmaxCrossEntropyLoss)


def run(library, inputs, **options):
    on_device = (x.to(DEVICE) for x in inputs)
    losses, dhidden, dweight = linear_cross_entropy_with_grads(*on_device, backend=library, **options)
    return type(losses)(*(x.cpu() for x in losses)), *(x if x is None else x.cpu() for x in (dhidden, dweight))


@LIBRARIES
@pytest.mark.parametrize("chunk", [7, 200])
def test_values_and_gradients(library, chunk):
    inputs = problem(torch.float32)
    assert_matches(run(library, inputs, chunk_tokens=chunk), expected(*inputs), 2e-6)


@LIBRARIES
def test_each_token_has_its_scale(library):
    inputs = problem(torch.float32)
    scale = torch.linspace(0.5, 2, len(inputs[2]))
    assert_matches(run(library, inputs, grad_scale=scale.to(DEVICE)), expected(*inputs, scale), 2e-6)


@LIBRARIES
def test_without_gradients(library):
    inputs = problem(torch.float32)
    losses, dhidden, dweight = run(library, inputs, need_grads=False)
    assert dhidden is None and dweight is None
    assert relative_error(losses.loss, expected(*inputs)[0]) <= 2e-6


@LIBRARIES
def test_bf16_within_its_rounding(library):
    inputs = problem(torch.bfloat16, t=200, d=32, v=96)
    losses, dhidden, dweight = run(library, inputs, chunk_tokens=64)
    loss, count, _, wanted_dhidden, wanted_dweight = expected(*inputs)
    assert losses.count == count and losses.loss.dtype == torch.float32
    assert relative_error(losses.loss, loss) <= 2**-7  # both round each token's loss to bf16
    assert relative_error(dhidden, wanted_dhidden) <= 0.02 and relative_error(dweight, wanted_dweight) <= 0.02


@LIBRARIES
def test_a_split_vocabulary_is_refused(library):
    with pytest.raises(ValueError, match=f"by {library} needs the whole vocabulary"):
        run(library, problem(torch.float32), split=TensorParallel(size=2))
