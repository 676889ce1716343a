import numpy as np
import pytest
import torch
from torch.nn import functional as F

from megamtp.ops.attention import attention, attention_backend, document_mask
from megamtp.ops.attention_flash import sequences
from tests.ops.closeness import EXACT, relative_error
from tests.ops.fake_libraries import install_flash_attn

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
B, S, HD = 2, 13, 6
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 1 + [2] * 7, [0] * 13])
# FlexAttention has no backward pass on a CPU, and flash-attn is a stand-in here.
FLASH = ["flash2", "flash3", "flash4"]
PORTABLE = ["cudnn", "reference", "sdpa"]
BACKENDS = pytest.mark.parametrize("backend", [*PORTABLE, "flex", *FLASH])
HEADS = pytest.mark.parametrize(("h", "g"), [(4, 4), (4, 2), (6, 1)])
MASKED = pytest.mark.parametrize("masked", [False, True], ids=["whole", "documents"])


@pytest.fixture(autouse=True)
def flash_attn(monkeypatch):
    install_flash_attn(monkeypatch)


def qkv(h, g, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B, S, n, HD, generator=generator, dtype=torch.float64).to(dtype) for n in (h, g, g))


def attend(backend, q, k, v, documents=None, causal=True):
    backend = attention_backend(backend)
    prepared = None if documents is None else backend.prepare(documents)
    return attention(q, k, v, backend=backend, documents=prepared, causal=causal)


def by_definition(q, k, v, documents=None, causal=True):
    """One query at a time, over the list of positions that it may see."""
    out = torch.empty_like(q)
    b, s, h, hd = q.shape
    for i, t, head in np.ndindex(b, s, h):
        sees = [
            u for u in range(s) if (u <= t or not causal) and (documents is None or documents[i, u] == documents[i, t])
        ]
        group = head // (h // k.shape[2])
        scores = k[i, sees, group] @ q[i, t, head] / hd**0.5
        out[i, t, head] = scores.softmax(0) @ v[i, sees, group]
    return out


@MASKED
@HEADS
@BACKENDS
def test_definition(backend, h, g, masked):
    q, k, v = qkv(h, g)
    documents = DOCUMENTS if masked else None
    out = attend(backend, q, k, v, documents)
    assert out.shape == (B, S, h, HD)
    assert relative_error(out, by_definition(q, k, v, documents)) <= EXACT


@BACKENDS
def test_without_causality(backend):
    q, k, v = qkv(4, 2)
    assert relative_error(attend(backend, q, k, v, causal=False), by_definition(q, k, v, causal=False)) <= EXACT


@MASKED
@HEADS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, EXACT), (torch.float32, 1e-6)])
@pytest.mark.parametrize("backend", [*FLASH, "cudnn", "sdpa"])
def test_backends_agree_forward_and_backward(backend, dtype, tolerance, h, g, masked):
    upstream = qkv(h, g, dtype, seed=1)[0]
    outs, grads = [], []
    for name in (backend, "reference"):
        inputs = [x.requires_grad_() for x in qkv(h, g, dtype)]
        out = attend(name, *inputs, DOCUMENTS if masked else None)
        outs.append(out.detach())
        grads.append(torch.autograd.grad(out, inputs, upstream))
    assert relative_error(*outs) <= tolerance
    for fast, reference in zip(*grads, strict=True):
        assert relative_error(fast, reference) <= tolerance


@BACKENDS
def test_bf16_within_its_rounding(backend):
    inputs = qkv(4, 2, torch.bfloat16)
    out = attend(backend, *inputs, DOCUMENTS)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, by_definition(*(x.double() for x in inputs), DOCUMENTS)) <= 2**-7


@BACKENDS
def test_no_attention_across_documents(backend):
    """Other keys and values in document 0 leave documents 1 and 2, and the other row, exactly as they were."""
    q, k, v = qkv(4, 2)
    before = attend(backend, q, k, v, DOCUMENTS)
    others = [x.clone() for x in (k, v)]
    for x in others:
        x[0, :5] += 100
    after = attend(backend, q, *others, DOCUMENTS)
    assert torch.equal(before[0, 5:], after[0, 5:]) and torch.equal(before[1], after[1])
    assert not torch.equal(before[0, :5], after[0, :5])


@MASKED
@BACKENDS
def test_no_attention_to_the_future(backend, masked):
    q, k, v = qkv(4, 2)
    documents = DOCUMENTS if masked else None
    before = attend(backend, q, k, v, documents)
    k[:, 9:], v[:, 9:] = 50, -50
    after = attend(backend, q, k, v, documents)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.isclose(before[:, 9:], after[:, 9:]).any()


def test_document_mask():
    ids = torch.tensor([[7, 7, 3, 7]])  # the same number again is the same document
    wanted = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [1, 1, 0, 1]]
    assert document_mask(ids).tolist() == [[[[bool(x) for x in row] for row in wanted]]]


def test_sequences_of_documents():
    bounds = sequences(torch.tensor([[4, 4, 4, 7], [7, 7, 9, 9]])).bounds  # a row ends a document
    assert bounds.tolist() == [0, 3, 4, 6, 8] and bounds.dtype == torch.int32


def test_key_value_heads_that_do_not_divide():
    q, k, v = qkv(4, 3)
    with pytest.raises(ValueError, match="3 key/value heads do not divide 4 query heads"):
        attend("sdpa", q, k, v)


def test_documents_without_causality():
    with pytest.raises(ValueError, match="causal=True"):
        attend("sdpa", *qkv(4, 4), DOCUMENTS, causal=False)


def test_sdpa_never_holds_the_scores(monkeypatch):
    """Without documents no mask is passed, so that PyTorch can take its fused kernel."""
    seen = {}
    original = F.scaled_dot_product_attention

    def spy(*args, **kwargs):
        seen.update(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    attend("sdpa", *qkv(4, 4))
    assert seen["attn_mask"] is None and seen["is_causal"] is True
