import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megamtp.model import cost
from megamtp.model.heads import HeadsConfig
from megamtp.model.model import MultiTokenModel, build_model, logical_parameters
from megamtp.model.transformer import ModelConfig
from megamtp.ops.choice import OpsConfig
from megamtp.parallel.tensor import TensorParallel
from tests.model.llama import micro_batch, small_config

# dim, layers, heads and the training time relative to n = 1 that the unembeddings alone predict, n = 2 and n = 4.
PAPER = {
    "0.3B": (1024, 18, 16, 1.10, 1.29),
    "0.6B": (1280, 27, 20, 1.06, 1.17),
    "1.3B": (2048, 24, 16, 1.04, 1.13),
    "3B": (2560, 36, 20, 1.02, 1.07),
    "6.7B": (4096, 32, 32, 1.02, 1.06),
    "13B": (5120, 40, 40, 1.01, 1.04),
}
RECOMPUTE = ("none", "selective", "full")
SIZES = pytest.mark.parametrize("size", PAPER)


def paper_config(size, n):
    dim, layers, heads = PAPER[size][:3]
    return ModelConfig(vocab_size=32000, dim=dim, n_layers=layers, n_heads=heads, n_future_tokens=n)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"n_layers": 6, "n_future_tokens": 3},
        {"n_kv_heads": 2},
        {"n_kv_heads": 1, "n_future_tokens": 2, "ffn_dim": None},
        {"vocab_size": 64},
        {"vocab_size": 65, "n_future_tokens": 2},
        {"vocab_size": 65, "n_future_tokens": 3, "replicated_unembedding": True},
    ],
)
def test_parameters_are_those_of_the_model(overrides):
    config = small_config(**overrides)
    sizes = {name: parameter.numel() for name, parameter in logical_parameters(build_model(config, seed=None))}
    counted = cost.parameters(config)

    def of(*prefixes):
        return sum(size for name, size in sizes.items() if name.startswith(prefixes))

    assert counted.total == sum(sizes.values())
    assert counted.embedding == of("tok_embeddings.") and counted.unembedding == of("output.")
    assert counted.trunk == of("layers.") and counted.heads == of("heads.") and counted.norm == of("norm.")
    assert cost.block_parameters(config) == of("layers.0.")


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("replicated", [False, True])
def test_layers_parameters_are_those_of_the_first_rank(tensor, n_kv_heads, replicated):
    """The first rank holds the larger parts where a split is uneven, as 50 rows over 4 ranks are."""
    sizes = {"n_layers": 6, "n_future_tokens": 2, "n_kv_heads": n_kv_heads, "vocab_multiple": 1, "ffn_dim": 26}
    config = small_config(**sizes, replicated_unembedding=replicated)
    tp = TensorParallel(rank=0, size=tensor, kv_replicas=max(1, tensor // n_kv_heads))
    with torch.device("meta"):
        model = MultiTokenModel(config, tp=tp)
    layers = [model.tok_embeddings, *model.layers, model.output_heads]
    held = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    assert cost.layer_parameters(config, tensor) == held


@SIZES
def test_paper_sizes(size):
    """n heads cost no parameter, and each model has about the size that it is named after."""
    totals = {cost.parameters(paper_config(size, n)).total for n in (1, 2, 4)}
    assert len(totals) == 1
    assert totals.pop() / 1e9 == pytest.approx(float(size[:-1]), rel=0.1)


def test_meta_model_of_the_largest_size():
    config = paper_config("13B", 4)
    with torch.device("meta"):
        model = MultiTokenModel(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == cost.parameters(config).total


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"n_kv_heads": 2},
        {"n_layers": 6, "n_future_tokens": 4},
        {"n_future_tokens": 2, "replicated_unembedding": True},
    ],
)
def test_train_flops_against_pytorchs_counter(overrides):
    """The counter sees every product of scores; causal attention uses (s + 1) / 2 of s positions."""
    config = small_config(vocab_size=100, vocab_multiple=1, dim=64, ffn_dim=160, **overrides)
    b, s = 2, 24
    model = build_model(config, HeadsConfig(mode="naive"), OpsConfig(attention="reference"), seed=0)
    with FlopCounterMode(display=False) as counter:
        model(*micro_batch(config, b=b, s=s)).loss.backward()
    unused = 3 * config.n_layers * 4 * config.dim * (s - (s + 1) / 2)
    assert counter.get_total_flops() / (b * s) == pytest.approx(
        cost.train_flops_per_token(config, s) + unused, rel=0.01
    )


@pytest.mark.parametrize("mode", ["joint", "naive"])
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_layers_flops_against_pytorchs_counter(recompute, mode):
    config = small_config(vocab_size=100, vocab_multiple=1, dim=64, ffn_dim=160, n_layers=5, n_future_tokens=2)
    b, s = 2, 24
    ops = OpsConfig(attention="reference", recompute=recompute)
    model = build_model(config, HeadsConfig(mode=mode), ops, seed=0)
    with FlopCounterMode(display=False) as counter:
        model(*micro_batch(config, b=b, s=s)).loss.backward()
    _embedding, *layers = cost.layer_train_flops(config, s, recompute, mode)
    # The counter sees the unused half of the scores, too, in each pass over them.
    passes = 3 if recompute == "none" else 4
    unused = passes * config.n_layers * 4 * config.dim * (s - (s + 1) / 2)
    assert counter.get_total_flops() / (b * s) == pytest.approx(sum(layers) + unused, rel=1e-3)


def test_layers_flops():
    config = small_config(n_layers=5, n_future_tokens=2)
    costs = {(r, m): cost.layer_train_flops(config, 24, r, m) for r in RECOMPUTE for m in ("sequential", "joint")}
    plain = costs["none", "sequential"]
    assert len(plain) == 1 + 3 + 1 and plain == costs["none", "joint"]
    assert sum(plain[1:]) == pytest.approx(cost.train_flops_per_token(config, 24), rel=1e-12)
    for recompute in RECOMPUTE:
        sequential, joint = costs[recompute, "sequential"], costs[recompute, "joint"]
        again = sequential[1] - plain[1]
        assert sequential[:-1] == joint[:-1] == [plain[0], *[plain[1] + again] * 3]
        assert sequential[-1] == plain[-1] and joint[-1] == plain[-1] + 2 * again
    assert plain[1] < costs["selective", "joint"][1] < costs["full", "joint"][1] < 4 / 3 * plain[1]


@pytest.mark.parametrize("size", ["0.3B", "13B"])
def test_the_embedding_is_small(size):
    embedding, block, *_ = cost.layer_train_flops(paper_config(size, 4), 4096, "none", "sequential")
    assert 0 < embedding < 0.05 * block


def test_padding_rows_cost_nothing():
    flops = {cost.train_flops_per_token(small_config(vocab_multiple=m), 64) for m in (1, 64, 1024)}
    assert len(flops) == 1


@SIZES
def test_predicted_time_of_more_heads(size):
    one, two, four = (cost.train_flops_per_token(paper_config(size, n), 4096) for n in (1, 2, 4))
    assert two / one == pytest.approx(PAPER[size][3], abs=0.02)
    assert four / one == pytest.approx(PAPER[size][4], abs=0.02)


def test_dense_rule_of_thumb():
    """6 FLOPs a parameter and token, the embedding's look-up apart, where attention is short."""
    config = paper_config("6.7B", 1)
    count = cost.parameters(config)
    assert cost.train_flops_per_token(config, 1) == pytest.approx(6 * (count.total - count.embedding), rel=1e-3)
