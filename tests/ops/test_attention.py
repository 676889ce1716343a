import numpy as np
import pytest
import torch
from torch.nn import functional as F

from megamtp.ops.attention import ATTENTION_BACKENDS, attention, document_mask
from tests.ops.closeness import EXACT, relative_error

B, S, HD = 2, 13, 6
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 1 + [2] * 7, [0] * 13])
BACKENDS = pytest.mark.parametrize("backend", sorted(ATTENTION_BACKENDS))
HEADS = pytest.mark.parametrize(("h", "g"), [(4, 4), (4, 2), (6, 1)])
MASKED = pytest.mark.parametrize("masked", [False, True], ids=["whole", "documents"])


def qkv(h, g, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B, S, n, HD, generator=generator, dtype=torch.float64).to(dtype) for n in (h, g, g))


def attend(backend, q, k, v, documents=None, causal=True):
    backend = ATTENTION_BACKENDS[backend]
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
def test_backends_agree_forward_and_backward(dtype, tolerance, h, g, masked):
    upstream = qkv(h, g, dtype, seed=1)[0]
    outs, grads = [], []
    for backend in ("sdpa", "reference"):
        inputs = [x.requires_grad_() for x in qkv(h, g, dtype)]
        out = attend(backend, *inputs, DOCUMENTS if masked else None)
        outs.append(out.detach())
        grads.append(torch.autograd.grad(out, inputs, upstream))
    assert relative_error(*outs) <= tolerance
    for sdpa, reference in zip(*grads, strict=True):
        assert relative_error(sdpa, reference) <= tolerance


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
