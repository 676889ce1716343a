import pytest

from megamtp.config import from_dict
from megamtp.errors import UserError
from megamtp.model.transformer import ModelConfig
from tests.model.llama import small_config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"n_future_tokens": 4}, "n_future_tokens 4 must be smaller than n_layers 4"),
        ({"n_future_tokens": 5}, "n_future_tokens 5 must be smaller than n_layers 4"),
        ({"n_heads": 3}, "dim 16 must be a multiple of n_heads 3"),
        ({"n_heads": 16}, "head_dim 1 .* must be even"),
        ({"n_kv_heads": 3}, "n_heads 4 must be a multiple of n_kv_heads 3"),
        ({"n_kv_heads": 8}, "n_heads 4 must be a multiple of n_kv_heads 8"),
    ],
)
def test_refused_combinations(overrides, message):
    with pytest.raises(ValueError, match=message):
        small_config(**overrides)


@pytest.mark.parametrize(
    "key", ["vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "n_future_tokens", "ffn_dim"]
)
@pytest.mark.parametrize("value", [0, -1, 1.5, "many"])
def test_refused_values(key, value):
    values = {"vocab_size": 50, "dim": 16, "n_layers": 4, "n_heads": 4, key: value}
    with pytest.raises(UserError, match=f"config: {key}: "):
        from_dict(ModelConfig, values, "config")


@pytest.mark.parametrize(("dim", "hidden"), [(4096, 11008), (5120, 13824), (1024, 2816), (96, 256), (192, 512)])
def test_feed_forward_width(dim, hidden):
    """11008 and 13824 are the paper's; the rest 8/3 dim rounded up to 256."""
    config = small_config(dim=dim, ffn_dim=None)
    assert config.hidden_dim == hidden
    assert small_config(dim=dim, ffn_dim=40).hidden_dim == 40


def test_layers_are_counted_as_in_the_paper():
    config = small_config(n_layers=32, n_future_tokens=4)
    assert config.n_trunk_layers == 28
    assert small_config(n_layers=32).n_trunk_layers == 31


@pytest.mark.parametrize(("size", "padded"), [(1, 128), (127, 128), (128, 128), (129, 256), (32000, 32000)])
def test_padded_vocabulary(size, padded):
    assert small_config(vocab_size=size, vocab_multiple=128).padded_vocab_size == padded
