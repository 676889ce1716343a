import pytest
import torch

from megamtp.model.heads import HeadsConfig
from megamtp.model.model import build_model, logical_parameters
from megamtp.ops.choice import OpsConfig
from tests.model.llama import expected_losses, llama, llama_logits, micro_batch, random_model, small_config
from tests.ops.closeness import EXACT, relative_error

GROUPED = pytest.mark.parametrize("n_kv_heads", [None, 2, 1], ids=["mha", "gqa", "mqa"])
DOCUMENTS = pytest.mark.parametrize("documents", [False, True], ids=["whole", "documents"])
ATTENTION = pytest.mark.parametrize("attention", ["sdpa", "reference"])


def parameters_of(model):
    return {name: parameter.detach() for name, parameter in logical_parameters(model)}


@DOCUMENTS
@ATTENTION
@GROUPED
def test_one_head_is_a_llama(n_kv_heads, attention, documents):
    config = small_config(n_kv_heads=n_kv_heads)
    model = random_model(config, ops=OpsConfig(attention=attention), seed=1)
    batch = micro_batch(config, s=20, documents=documents)
    theirs = llama(parameters_of(model), config)
    assert len(theirs.model.layers) == config.n_layers == len(model.layers) + 1
    with torch.no_grad():
        ours, wanted = model(batch.tokens, None, batch.positions, batch.document_ids), llama_logits(theirs, batch)
    assert ours.shape == (1, 2, 20, config.vocab_size)
    assert wanted.std() > 0.5
    assert (ours[0] - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize("overrides", [{"norm_eps": 0.3}, {"rope_theta": 3.0}])
def test_constants_reach_the_model(overrides):
    batch = micro_batch(small_config(), s=20)
    model = random_model(small_config(**overrides), seed=1)
    with torch.no_grad():
        ours, default = model(batch.tokens), random_model(small_config(), seed=1)(batch.tokens)
        wanted = llama_logits(llama(parameters_of(model), small_config(**overrides)), batch)
    assert (ours[0] - wanted).abs().max() <= 1e-5
    assert (ours - default).abs().max() > 0.01


@pytest.mark.parametrize("n_kv_heads", [None, 2])
@DOCUMENTS
def test_each_head_is_the_last_layer_of_a_llama(documents, n_kv_heads):
    config = small_config(n_layers=7, n_future_tokens=4, n_kv_heads=n_kv_heads)
    model = random_model(config, seed=1)
    batch = micro_batch(config, s=20, documents=documents)
    with torch.no_grad():
        logits = model(batch.tokens, None, batch.positions, batch.document_ids)
        assert logits.shape == (4, 2, 20, config.vocab_size)
        for k in range(4):
            theirs = llama(parameters_of(model), config, head=k)
            assert len(theirs.model.layers) == 4
            assert (logits[k] - llama_logits(theirs, batch)).abs().max() <= 1e-5


@DOCUMENTS
@GROUPED
@pytest.mark.parametrize("mode", ["sequential", "joint", "naive"])
def test_gradients_of_one_head_in_fp64(mode, n_kv_heads, documents):
    config = small_config(n_kv_heads=n_kv_heads)
    model = random_model(config, HeadsConfig(mode=mode), seed=1, dtype=torch.float64)
    batch = micro_batch(config, documents=documents)
    losses = model(*batch)
    losses.loss.backward()
    wanted = expected_losses(parameters_of(model), config, [batch], [1.0], [1.0])
    assert relative_error(losses.loss.detach(), wanted.loss) <= EXACT
    assert {name for name, _ in logical_parameters(model)} == set(wanted.grads)
    for name, parameter in logical_parameters(model):
        assert relative_error(parameter.grad, wanted.grads[name]) <= EXACT, name


def test_unmodified_llama_has_the_same_gradients():
    """With transformers' own norms and angles, which are fp32, agreement ends there."""
    config = small_config(n_kv_heads=2)
    model = random_model(config, seed=1, dtype=torch.float64)
    batch = micro_batch(config, masked=0.0)
    theirs = llama(parameters_of(model), config)
    model(*batch).loss.backward()
    logits = llama_logits(theirs, batch)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).backward()
    ours = dict(logical_parameters(model))
    assert (
        relative_error(ours["layers.0.attention.wk.weight"].grad, theirs.model.layers[0].self_attn.k_proj.weight.grad)
        < 1e-5
    )
    assert (
        relative_error(ours["heads.0.feed_forward.w1.weight"].grad, theirs.model.layers[3].mlp.gate_proj.weight.grad)
        < 1e-5
    )
    assert relative_error(ours["output.weight"].grad[:50], theirs.lm_head.weight.grad) < 1e-5


@ATTENTION
def test_no_head_sees_the_future(attention):
    config = small_config(n_layers=5, n_future_tokens=3)
    model = random_model(config, ops=OpsConfig(attention=attention), seed=1)
    tokens = micro_batch(config, s=12).tokens
    other = tokens.clone()
    other[:, 7:] = (tokens[:, 7:] + 1) % config.vocab_size
    with torch.no_grad():
        before, after = model(tokens), model(other)
    assert torch.equal(before[:, :, :7], after[:, :, :7])
    assert (before[:, :, 7:] != after[:, :, 7:]).all(-1).all()


@ATTENTION
def test_documents_do_not_meet(attention):
    """Each document gets the logits that it gets alone; another document's tokens change nothing at all."""
    config = small_config(n_layers=5, n_future_tokens=3)
    model = random_model(config, ops=OpsConfig(attention=attention), seed=1, dtype=torch.float64)
    tokens = micro_batch(config, b=1, s=12).tokens
    ids = torch.tensor([[0] * 5 + [1] * 7])
    positions = torch.tensor([[*range(5), *range(7)]])
    other = tokens.clone()
    other[:, :5] = (tokens[:, :5] + 1) % config.vocab_size
    with torch.no_grad():
        before, after = model(tokens, None, positions, ids), model(other, None, positions, ids)
        alone = model(tokens[:, 5:])
    assert torch.equal(before[:, :, 5:], after[:, :, 5:])
    assert not torch.isclose(before[:, :, :5], after[:, :, :5]).all(-1).any()
    assert relative_error(before[:, :, 5:], alone) <= EXACT


@pytest.mark.parametrize("replicated", [False, True])
def test_logical_names(replicated):
    """The names of the paper's released checkpoints, heads and their own unembeddings apart."""
    config = small_config(n_layers=4, n_future_tokens=2, n_kv_heads=2, replicated_unembedding=replicated)
    names = [name for name, _ in logical_parameters(build_model(config, seed=None))]
    block = [f"attention.{w}.weight" for w in ("wq", "wk", "wv", "wo")]
    block += [f"feed_forward.{w}.weight" for w in ("w1", "w2", "w3")] + ["attention_norm.weight", "ffn_norm.weight"]
    prefixes = ["layers.0", "layers.1", "heads.0", "heads.1"]
    wanted = {f"{prefix}.{name}" for prefix in prefixes for name in block}
    assert len(names) == len(set(names))
    outputs = {"output.0.weight", "output.1.weight"} if replicated else {"output.weight"}
    assert set(names) == wanted | {"tok_embeddings.weight", "norm.weight"} | outputs
