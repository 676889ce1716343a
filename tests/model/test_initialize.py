import pytest
import torch

from megamtp.model.initialize import ROWS_PER_BLOCK, initialize_
from megamtp.model.model import build_model, logical_parameters
from tests.model.llama import small_config
from tests.ops.observe import LargestTensor

CONFIG = small_config(
    vocab_size=1000, dim=128, n_heads=4, n_kv_heads=2, ffn_dim=320, n_layers=5, n_future_tokens=2, init_std=0.02
)


def built(config=CONFIG, seed=0, dtype=torch.float32):
    return {name: p.detach() for name, p in logical_parameters(build_model(config, seed=seed, dtype=dtype))}


def drawn(name, shape, config=CONFIG, seed=0):
    parameter = torch.full(shape, torch.nan)
    initialize_(parameter, name, config, seed)
    return parameter


def test_same_seed_same_values_another_seed_others():
    first, again, other = built(seed=3), built(seed=3), built(seed=4)
    for name, values in first.items():
        assert torch.equal(values, again[name]), name
        if values.ndim > 1:
            assert not torch.isclose(values, other[name], rtol=1e-5, atol=0).float().mean() > 0.01, name


def test_every_element_is_written():
    for name, parameter in built().items():
        values = drawn(name, parameter.shape)
        assert values.isfinite().all(), name
        assert torch.equal(values, parameter), name  # and what build_model holds is nothing else
        assert not parameter.is_meta


def test_no_two_parameters_share_values():
    firsts = [values.flatten()[:8] for values in built().values() if values.ndim > 1]
    assert len({tuple(first.tolist()) for first in firsts}) == len(firsts) == 2 + 5 * 7


def test_each_unembedding_has_values_of_its_own():
    whole = built(small_config(**{**vars(CONFIG), "replicated_unembedding": True}))
    tables = [whole.pop(f"output.{k}.weight") for k in range(2)]
    assert not torch.isclose(*tables, rtol=1e-5, atol=0).float().mean() > 0.01
    assert all(table.std().item() == pytest.approx(0.02, rel=0.03) for table in tables)
    shared = built()
    assert tables[0].shape == shared.pop("output.weight").shape
    assert whole.keys() == shared.keys() and all(torch.equal(whole[name], shared[name]) for name in shared)


def test_values_do_not_depend_on_the_rest_of_the_model():
    """Embedding, q, k, v and gates are those of a deeper model with more heads; wo and w2 shrink with its depth."""
    deeper = built(small_config(**{**vars(CONFIG), "n_layers": 10, "n_future_tokens": 4}))
    for name, values in built().items():
        scale = 2**-0.5 if name.split(".")[-2] in ("wo", "w2") else 1.0
        torch.testing.assert_close(deeper[name], values * scale, rtol=1e-6, atol=0, msg=name)


def test_order_of_drawing_does_not_matter():
    forward = [drawn(name, p.shape) for name, p in built().items()]
    torch.manual_seed(99)
    backward = [drawn(name, p.shape) for name, p in reversed(built().items())]
    assert all(torch.equal(a, b) for a, b in zip(forward, reversed(backward), strict=True))


def test_building_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    built()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["wq", "wk", "wv", "w1", "w3", "wo", "w2", "tok_embeddings", "output"])
def test_standard_deviations(kind):
    nominal = 0.02 / 10**0.5 if kind in ("wo", "w2") else 0.02
    found = [values for name, values in built().items() if name.split(".")[-2] == kind]
    assert len(found) == (1 if kind in ("tok_embeddings", "output") else 5)
    for values in found:
        assert values.std().item() == pytest.approx(nominal, rel=0.03)
        assert abs(values.mean().item()) < 5 * nominal / values.numel() ** 0.5
        assert values.abs().max() > 3 * nominal  # a normal's tail


def test_norms_are_one():
    norms = [values for values in built().values() if values.ndim == 1]
    assert len(norms) == 1 + 5 * 2 and all(torch.equal(values, torch.ones(128)) for values in norms)


def test_bf16_is_the_rounded_fp32():
    fp32, bf16 = built(), built(dtype=torch.bfloat16)
    assert all(torch.equal(fp32[name].bfloat16(), bf16[name]) for name in fp32)


def test_rows_are_drawn_in_blocks():
    """The rows before a multiple of the block are the same, however many follow: a rank can draw its own alone."""
    rows = 2 * ROWS_PER_BLOCK + 40
    whole = drawn("output.weight", (rows, 24))
    for part in (ROWS_PER_BLOCK, 2 * ROWS_PER_BLOCK):
        assert torch.equal(drawn("output.weight", (part, 24)), whole[:part])
    blocks = whole.split(ROWS_PER_BLOCK)
    assert not torch.isclose(blocks[0], blocks[1], rtol=1e-5, atol=0).any()
    assert not torch.isclose(blocks[0][:40], blocks[2], rtol=1e-5, atol=0).any()


def test_one_block_is_drawn_at_a_time():
    parameter = torch.empty(4 * ROWS_PER_BLOCK, 8)
    with LargestTensor() as largest:
        initialize_(parameter, "output.weight", CONFIG, 0)
    assert largest.elements == ROWS_PER_BLOCK * 8


def test_padding_of_the_vocabulary_leaves_full_blocks_alone():
    few, many = (built(small_config(**{**vars(CONFIG), "vocab_multiple": m})) for m in (8, 512))
    assert len(few["output.weight"]) == 1000 and len(many["output.weight"]) == 1024
    assert torch.equal(few["output.weight"][: 3 * ROWS_PER_BLOCK], many["output.weight"][: 3 * ROWS_PER_BLOCK])


@pytest.mark.parametrize("name", ["layers.0.attention.bias.weight", "layers.0.attention.wz.weight", "rope.freqs"])
def test_unknown_kind(name):
    with pytest.raises(ValueError, match=f"no initialisation for parameter {name}"):
        drawn(name, (4, 4))
