"""The decoding forward pass against the training model, through caches, batches and trees."""

import pytest
import torch

from megamtp.inference.decoder import Decoder
from megamtp.inference.native.decoder import NativeDecoder
from megamtp.inference.tree import Tree
from tests.inference.models import decoder_of, parameters_of
from tests.model.llama import random_model, small_config

# (the class, its dtype, how far its logits may be from the training model's in fp64)
KINDS = [
    pytest.param((Decoder, torch.float64, 1e-12), id="torch"),
    pytest.param((NativeDecoder, torch.float32, 1e-5), id="native"),
]
every_kind = pytest.mark.parametrize("kind", KINDS)
REPLICATED = pytest.mark.parametrize("replicated", [False, True], ids=["shared", "replicated"])
GROUPED = pytest.mark.parametrize("n_kv_heads", [None, 2, 1], ids=["mha", "gqa", "mqa"])


def model_of(n_kv_heads=2, **config):
    config = small_config(n_layers=6, n_future_tokens=4, n_kv_heads=n_kv_heads, **config)
    return random_model(config, seed=1, dtype=torch.float64)


def decoder_and_tolerance(model, kind):
    return decoder_of(model, kind[1], kind=kind[0]), kind[2]


def random_tokens(*shape, seed=0):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
@GROUPED
@REPLICATED
@every_kind
def test_all_heads_give_the_training_models_logits(n_kv_heads, replicated, kind):
    model = model_of(n_kv_heads, replicated_unembedding=replicated)
    decoder, tolerance = decoder_and_tolerance(model, kind)
    for length in (1, 20, 60):
        tokens = random_tokens(1, length)
        assert (decoder.all_heads(tokens) - model(tokens)[:, 0]).abs().max() < tolerance


@torch.inference_mode()
@every_kind
@pytest.mark.parametrize(
    "shape",
    [
        {
            "dim": 144,
            "n_heads": 2,
            "n_kv_heads": 1,
            "ffn_dim": 40,
            "init_std": 0.05,
        },  # heads wider than a panel, not whole panels
        {"dim": 256, "n_heads": 4, "n_kv_heads": 4, "ffn_dim": 96, "init_std": 0.05},
        {"dim": 36, "n_heads": 6, "n_kv_heads": 3, "ffn_dim": 7},
    ],
    ids=str,
)
def test_sizes_need_not_be_round(shape, kind):
    model = model_of(**shape)
    decoder, tolerance = decoder_and_tolerance(model, kind)
    tokens = random_tokens(1, 45)
    assert (decoder.all_heads(tokens) - model(tokens)[:, 0]).abs().max() < tolerance


@torch.inference_mode()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_narrower_dtypes_compute_the_same(dtype, tolerance):
    model = model_of()
    tokens = random_tokens(1, 20)
    logits = decoder_of(model, dtype).all_heads(tokens)
    wanted = model(tokens)[:, 0]
    assert logits.dtype == dtype
    assert (logits - wanted).norm() / wanted.norm() < tolerance


@torch.inference_mode()
@GROUPED
@REPLICATED
@every_kind
@pytest.mark.parametrize("n_new", [1, 3])
def test_rows_of_different_lengths_see_their_own_past(n_kv_heads, replicated, n_new, kind):
    """Prompts of 4, 9 and 6 tokens side by side, then ``n_new`` tokens each: what the whole sequences give."""
    model = model_of(n_kv_heads, replicated_unembedding=replicated)
    (decoder, tolerance), lengths = decoder_and_tolerance(model, kind), [4, 9, 6]
    sequences = [random_tokens(length + n_new, seed=length) for length in lengths]
    cache = decoder.new_cache(4, 16, 3)
    for row, (tokens, length) in enumerate(zip(sequences, lengths, strict=True)):
        at = decoder.prompt_positions(row, length)
        z = decoder.trunk(tokens[None, :length], at, cache)
        whole = model(tokens[None, :length])[:, 0, -1]
        assert (decoder.head_1_at_end(z, at, cache)[0, 0] - whole[0]).abs().max() < tolerance
        assert (decoder.draft(z, at, [length], 3, cache)[0] - whole[1:]).abs().max() < tolerance
    at = decoder.next_positions(lengths, n_new)
    z = decoder.trunk(torch.stack([tokens[-n_new:] for tokens in sequences]), at, cache)
    logits = decoder.head_1(z, at, cache)
    counts = [n_new, 1, max(1, n_new - 1)]  # the drafting heads look from different places
    path = decoder.path_positions(lengths, counts)
    drafts = decoder.draft(z, path, counts, 3, cache)
    for row, tokens in enumerate(sequences):
        whole = model(tokens[None])[:, 0]
        assert (logits[row] - whole[0, -n_new:]).abs().max() < tolerance
        assert (drafts[row] - whole[1:, lengths[row] + counts[row] - 1]).abs().max() < tolerance


@torch.inference_mode()
@every_kind
def test_a_tree_is_all_of_its_branches_at_once(kind):
    model = model_of()
    (decoder, tolerance), tree = decoder_and_tolerance(model, kind), Tree((2, 3, 1))
    prompt = random_tokens(7)
    nodes = random_tokens(tree.n_nodes, seed=3)
    cache = decoder.new_cache(1, 7 + tree.n_nodes, 0)
    decoder.head_1(decoder.trunk(prompt[None], at := decoder.prompt_positions(0, 7), cache), at, cache)
    at = decoder.next_positions([7], tree.n_nodes, tree)
    logits = decoder.head_1(decoder.trunk(nodes[None], at, cache), at, cache)[0]
    for node in range(tree.n_nodes):
        branch = [node]
        while branch[0]:
            branch.insert(0, tree.parents[branch[0]])
        whole = model(torch.cat([prompt, nodes[branch]])[None])[0, 0, -1]
        assert (logits[node] - whole).abs().max() < tolerance, node


@every_kind
def test_padding_rows_of_the_vocabulary_are_left_out(kind):
    model = model_of()
    assert len(parameters_of(model)["output.weight"]) == 64
    with torch.inference_mode():
        assert decoder_and_tolerance(model, kind)[0].all_heads(random_tokens(1, 3)).shape == (4, 3, 50)


def test_trees():
    chain = Tree((1, 1))
    assert (
        chain.is_chain and chain.parents == [-1, 0, 1] and chain.ancestors.tolist() == torch.ones(3, 3).tril().tolist()
    )
    tree = Tree((2, 2))
    assert tree.n_nodes == 7 and tree.depths.tolist() == [0, 1, 1, 2, 2, 2, 2]
    assert tree.choices.tolist() == [0, 1, 2, 3, 2, 3]  # of (heads, widest): head 3's candidates under both of head 2's
    drafts = [5, 6, 7, 8, 7, 8]
    assert tree.follow(drafts, [6, 0, 8, 0, 0, 0, 9]) == [0, 2, 6]
    assert tree.follow(drafts, [4] * 7) == [0]
    assert Tree(()).follow([], [3]) == [0]


def test_a_decoder_does_not_change_the_weights_it_was_given():
    model = model_of()
    before = {name: value.clone() for name, value in parameters_of(model).items()}
    decoder = Decoder(model.config, parameters_of(model).__getitem__, 16)
    with torch.inference_mode():
        decoder.all_heads(random_tokens(1, 5))
    assert all(torch.equal(value, before[name]) for name, value in parameters_of(model).items())
