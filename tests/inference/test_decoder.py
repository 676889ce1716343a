"""The decoding forward pass against the training model, through caches, batches and trees."""

import pytest
import torch

from megamtp.inference.decoder import Decoder
from megamtp.inference.tree import Tree
from tests.inference.models import decoder_of, parameters_of
from tests.model.llama import random_model, small_config

EXACT = 1e-12
GROUPED = pytest.mark.parametrize("n_kv_heads", [None, 2, 1], ids=["mha", "gqa", "mqa"])


def model_of(n_kv_heads=2):
    return random_model(small_config(n_layers=6, n_future_tokens=4, n_kv_heads=n_kv_heads), seed=1, dtype=torch.float64)


def random_tokens(*shape, seed=0):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
@GROUPED
def test_all_heads_give_the_training_models_logits(n_kv_heads):
    model = model_of(n_kv_heads)
    tokens = random_tokens(1, 20)
    assert (decoder_of(model).all_heads(tokens) - model(tokens)[:, 0]).abs().max() < EXACT


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
@pytest.mark.parametrize("n_new", [1, 3])
def test_rows_of_different_lengths_see_their_own_past(n_kv_heads, n_new):
    """Prompts of 4, 9 and 6 tokens side by side, then ``n_new`` tokens each: what the whole sequences give."""
    model = model_of(n_kv_heads)
    decoder, lengths = decoder_of(model), [4, 9, 6]
    sequences = [random_tokens(length + n_new, seed=length) for length in lengths]
    cache = decoder.new_cache(4, 16, 3)
    for row, (tokens, length) in enumerate(zip(sequences, lengths, strict=True)):
        at = decoder.prompt_positions(row, length)
        z = decoder.trunk(tokens[None, :length], at, cache)
        whole = model(tokens[None, :length])[:, 0, -1]
        assert (decoder.head_1_at_end(z, at, cache)[0, 0] - whole[0]).abs().max() < EXACT
        assert (decoder.draft(z, at, torch.tensor([length - 1]), 3, cache)[0] - whole[1:]).abs().max() < EXACT
    at = decoder.next_positions(lengths, n_new)
    z = decoder.trunk(torch.stack([tokens[-n_new:] for tokens in sequences]), at, cache)
    logits = decoder.head_1(z, at, cache)
    counts = [n_new, 1, max(1, n_new - 1)]  # the drafting heads look from different places
    path = decoder.path_positions(lengths, counts)
    drafts = decoder.draft(z, path, torch.tensor(counts) - 1, 3, cache)
    for row, tokens in enumerate(sequences):
        whole = model(tokens[None])[:, 0]
        assert (logits[row] - whole[0, -n_new:]).abs().max() < EXACT
        assert (drafts[row] - whole[1:, lengths[row] + counts[row] - 1]).abs().max() < EXACT


@torch.inference_mode()
def test_a_tree_is_all_of_its_branches_at_once():
    model = model_of()
    decoder, tree = decoder_of(model), Tree((2, 3, 1))
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
        assert (logits[node] - whole).abs().max() < EXACT, node


def test_padding_rows_of_the_vocabulary_are_left_out():
    model = model_of()
    assert len(parameters_of(model)["output.weight"]) == 64
    with torch.inference_mode():
        assert decoder_of(model).all_heads(random_tokens(1, 3)).shape == (4, 3, 50)


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
