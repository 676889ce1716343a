import pytest
import torch

from megamtp.inference.sampling import Sampling, draw

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 3.0, 0.0]]).log_softmax(-1)


def test_temperature():
    assert torch.allclose(Sampling(1.0).probabilities(LOGITS), LOGITS.exp())
    assert torch.allclose(Sampling(0.5).probabilities(LOGITS), LOGITS.exp() ** 2 / (LOGITS.exp() ** 2).sum(-1, True))


def test_top_k_keeps_the_likeliest():
    p = Sampling(1.0, top_k=2).probabilities(LOGITS[:1])
    assert p[0, 2:].tolist() == [0, 0] and torch.allclose(p[0, :2], LOGITS[0, :2].softmax(-1))
    assert torch.equal(Sampling(1.0, top_k=9).probabilities(LOGITS), Sampling(1.0).probabilities(LOGITS))


def test_top_p_keeps_the_token_that_crosses_the_threshold():
    p = LOGITS[0].exp()  # 0.64, 0.24, 0.09, 0.03
    for threshold, n_kept in [(0.1, 1), (0.64, 1), (0.65, 2), (0.9, 3), (0.99, 4), (1.0, 4)]:
        cut = Sampling(1.0, top_p=threshold).probabilities(LOGITS[:1])[0]
        assert (cut > 0).sum() == n_kept and torch.allclose(cut[:n_kept], p[:n_kept] / p[:n_kept].sum())


def test_narrow_logits_are_widened():
    assert Sampling(1.0).probabilities(LOGITS.bfloat16()).dtype == torch.float32
    assert Sampling(1.0).probabilities(LOGITS.double()).dtype == torch.float64


def test_draws_have_the_given_shape():
    p = torch.eye(5)[torch.tensor([[1, 2, 3], [4, 0, 1]])]
    assert draw(p).tolist() == [[1, 2, 3], [4, 0, 1]]


@pytest.mark.parametrize(
    "values", [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.1}]
)
def test_values_out_of_range(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Sampling(**values)
