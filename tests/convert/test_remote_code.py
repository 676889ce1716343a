"""The exported folder in transformers: the model against ours, drafted generation against transformers' own."""

import json
import shutil
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

import megamtp.convert
from megamtp.convert.huggingface import llama_config_dict, to_llama_state_dict
from megamtp.model.model import logical_parameters
from tests.model.llama import head_config, llama, random_model, small_config

CODE = Path(megamtp.convert.__file__).parent / "modeling_megamtp.py"
BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}


def write_folder(folder, model, config, **extra_config):
    """What an exporter has to write, made with transformers' own ``save_pretrained``."""
    parameters = {name: value.detach() for name, value in logical_parameters(model)}
    plain = LlamaForCausalLM(
        LlamaConfig(**llama_config_dict(config), max_position_embeddings=64, bos_token_id=None, eos_token_id=None)
    ).to(parameters["norm.weight"].dtype)
    plain.load_state_dict(to_llama_state_dict(parameters, config))
    plain.save_pretrained(folder, max_shard_size="10KB")
    extra = {}
    for name, value in parameters.items():
        if name.startswith("heads.") and not name.startswith("heads.0."):
            head, part = name.removeprefix("heads.").removesuffix(".weight").split(".", 1)
            extra[f"extra_heads.{int(head) - 1}.{BLOCK[part]}.weight"] = value
    if extra:
        save_file(extra, folder / "extra_heads.safetensors")
    shutil.copyfile(CODE, folder / "modeling_megamtp.py")
    edit_json(
        folder / "config.json",
        auto_map={"AutoModelForCausalLM": "modeling_megamtp.MultiTokenLlamaForCausalLM"},
        n_future_tokens=config.n_future_tokens,
        **extra_config,
    )
    return folder


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **kwargs).eval()


def make(folder, *, seed=0, dtype=torch.float32, **overrides):
    """(our model, its config, the folder)."""
    config = small_config(**{"n_layers": 5, "n_future_tokens": 4, "n_kv_heads": 2, **overrides})
    model = random_model(config, seed=seed, dtype=dtype)
    return model, config, write_folder(folder, model, config)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder of random weights, n = 4, read only."""
    return make(tmp_path_factory.mktemp("exported"))[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder whose heads mostly agree: n = 3, trained to count modulo 12, noise at every fourth number."""
    config = small_config(vocab_size=12, vocab_multiple=4, n_layers=4, n_future_tokens=3, init_std=0.1)
    folder = tmp_path_factory.mktemp("trained")
    model = load(write_folder(folder, random_model(config, seed=0), config)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        start = torch.randint(12, (16, 1), generator=generator)
        tokens = (start + torch.arange(15)) % 12
        noise = torch.randint(12, tokens.shape, generator=generator)
        tokens = torch.where(tokens % 4 == 0, noise, tokens)
        logits = model.multi_token_logits(tokens[:, :12])
        loss = sum(F.cross_entropy(logits[k].transpose(1, 2), tokens[:, k + 1 : k + 13]) for k in range(3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


def padded(tokens, lengths):
    """Random junk on the left of each row, masked."""
    mask = (torch.arange(tokens.shape[1]) >= tokens.shape[1] - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": tokens, "attention_mask": mask}


def random_tokens(b, s, vocab=50, seed=1):
    return torch.randint(vocab, (b, s), generator=torch.Generator().manual_seed(seed))


# --- logits and loading ---


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_are_those_of_our_model(tmp_path, n, attention):
    ours, _, folder = make(tmp_path, n_future_tokens=n)
    model = load(folder, attn_implementation=attention)
    assert type(model).__name__ == "MultiTokenLlamaForCausalLM" and len(model.extra_heads) == n - 1
    tokens = random_tokens(3, 9)
    with torch.no_grad():
        wanted = ours.output_heads.logits(*ours.trunk(tokens))
        logits = model.multi_token_logits(tokens)
        assert logits.shape == (n, 3, 9, 50)
        torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits[0], model(tokens).logits, atol=1e-5, rtol=1e-5)
        # Padding on the left changes nothing, nor does what is in it.
        batch = padded(tokens, [9, 5, 2])
        logits = model.multi_token_logits(**batch)
        for row, length in enumerate([9, 5, 2]):
            alone = model.multi_token_logits(tokens[row : row + 1, 9 - length :])[:, 0]
            torch.testing.assert_close(logits[:, row, 9 - length :], alone, atol=1e-5, rtol=1e-5)


def test_each_head_is_a_plain_llamas_last_layer(tmp_path):
    ours, config, folder = make(tmp_path)
    parameters = {name: value.detach() for name, value in logical_parameters(ours)}
    tokens = random_tokens(2, 7)
    with torch.no_grad():
        logits = load(folder).multi_token_logits(tokens)
        for head in range(4):
            wanted = llama(parameters, config, head)(tokens).logits
            torch.testing.assert_close(logits[head], wanted, atol=1e-5, rtol=1e-5)
    assert head_config(config).n_layers == load(folder).config.num_hidden_layers


def test_without_remote_code_it_is_stock(exported, caplog, recwarn, capfd):
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert type(model) is LlamaForCausalLM
    assert not [record for record in caplog.records if record.levelname != "INFO"] and not recwarn.list
    assert "trust_remote_code" not in "".join(capfd.readouterr())
    tokens = random_tokens(2, 7)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, load(exported)(tokens).logits, atol=0, rtol=0)


def test_loading_says_nothing_of_missing_weights(exported, caplog, capfd):
    model, info = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert "extra_heads" not in "".join(capfd.readouterr()) + caplog.text
    for name, value in load_file(exported / "extra_heads.safetensors").items():
        assert torch.equal(model.get_parameter(name), value)


def test_dtype_is_respected(exported):
    model = load(exported, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    wanted = load_file(exported / "extra_heads.safetensors")["extra_heads.2.mlp.up_proj.weight"].bfloat16()
    assert torch.equal(model.extra_heads[2].mlp.up_proj.weight, wanted)
    assert model.generate(random_tokens(2, 4), max_new_tokens=5).shape == (2, 9)


def test_subfolder(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "inner")
    shutil.copyfile(CODE, tmp_path / "modeling_megamtp.py")
    model = load(tmp_path, subfolder="inner")
    tokens = random_tokens(2, 4)
    assert torch.equal(model.multi_token_logits(tokens), load(exported).multi_token_logits(tokens))


def test_extra_heads_that_are_missing_or_wrong(exported, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    path = folder / "extra_heads.safetensors"
    state = load_file(path)
    name = "extra_heads.1.self_attn.k_proj.weight"

    save_file({key: value for key, value in state.items() if key != name}, path)
    with pytest.raises(ValueError, match=f"{name} is missing"):
        load(folder)
    save_file({**state, "extra_heads.3.mlp.up_proj.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="extra_heads.3.mlp.up_proj.weight is unknown"):
        load(folder)
    save_file({**state, name: state[name][:-1].contiguous()}, path)
    with pytest.raises(ValueError, match=rf"{name} has shape \(7, 16\); the config says \(8, 16\)"):
        load(folder)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="extra_heads.safetensors cannot be read"):
        load(folder)
    path.unlink()
    with pytest.raises(OSError, match="extra_heads.safetensors"):
        load(folder)
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is LlamaForCausalLM


# --- generation, greedy ---


@pytest.fixture(scope="module")
def fp64(tmp_path_factory):
    """(with remote code, stock), both in fp64."""
    folder = make(tmp_path_factory.mktemp("fp64"), dtype=torch.float64, init_std=0.15)[2]
    return load(folder, dtype=torch.float64), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def fp64_trained(trained):
    return load(trained, dtype=torch.float64), AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float64)


@pytest.mark.parametrize("draft_heads", [0, 1, 2, 3, None])
@pytest.mark.parametrize("batched", [False, True])
def test_greedy_is_transformers_own(fp64, draft_heads, batched):
    model, stock = fp64
    batch = padded(random_tokens(4, 6), [6, 1, 4, 5]) if batched else {"input_ids": random_tokens(1, 6)}
    plain = stock.generate(**batch, max_new_tokens=17)
    assert plain.shape[1] == 6 + 17
    assert torch.equal(model.generate(**batch, max_new_tokens=17, draft_heads=draft_heads), plain)
    # End at tokens that come in the middle, of different rows at different times.
    new = plain[:, 6:]
    eos = sorted({int(new[0, 7]), int(new[-1, 4])})
    for stop in (eos[0], eos):
        options = {"max_new_tokens": 17, "eos_token_id": stop, "pad_token_id": 3}
        wanted = stock.generate(**batch, **options)
        assert (wanted == 3).any() or wanted.shape[1] < 23
        assert torch.equal(model.generate(**batch, **options, draft_heads=draft_heads), wanted)


@pytest.mark.parametrize("draft_heads", [1, 2])
@pytest.mark.parametrize("batched", [False, True])
def test_greedy_where_drafts_are_accepted(fp64_trained, draft_heads, batched):
    model, stock = fp64_trained
    batch = padded(random_tokens(4, 5, vocab=12), [5, 2, 3, 4]) if batched else {"input_ids": random_tokens(1, 5, 12)}
    for new in (1, 2, 3, 30):
        wanted = stock.generate(**batch, max_new_tokens=new)
        assert torch.equal(model.generate(**batch, max_new_tokens=new, draft_heads=draft_heads), wanted)
    for eos in (0, 3, 6, 11):
        options = {"max_new_tokens": 20, "eos_token_id": eos, "pad_token_id": 0}
        wanted = stock.generate(**batch, **options)
        assert torch.equal(model.generate(**batch, **options, draft_heads=draft_heads), wanted)


def count_forwards(model, **kwargs):
    """(tokens, blocks that the trunk computed, as (b, m))."""
    shapes = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[:2])))
    try:
        return model.generate(**kwargs), shapes
    finally:
        hook.remove()


def test_drafts_save_forwards(trained):
    model = load(trained)
    tokens = torch.arange(5)[None]
    plain, without = count_forwards(model, input_ids=tokens, max_new_tokens=24, draft_heads=0)
    drafted, shapes = count_forwards(model, input_ids=tokens, max_new_tokens=24)
    assert torch.equal(plain, drafted) and len(without) == 24
    assert len(shapes) <= 14
    # Only new positions are computed: the prompt once, then the last token and its drafts.
    assert shapes[0] == (1, 5) and set(shapes[1:]) <= {(1, 3), (1, 2), (1, 1)}


def test_each_sequence_accepts_its_own_length(trained):
    """One that accepts everything is not held back by one that accepts little: as many forwards as the slower alone."""
    model = load(trained)
    rows = torch.stack((torch.arange(1, 6), torch.tensor([0, 0, 5, 9, 3]), torch.tensor([7, 4, 4, 4, 0])))
    alone = [len(count_forwards(model, input_ids=row[None], max_new_tokens=24)[1]) for row in rows]
    assert len(count_forwards(model, input_ids=rows, max_new_tokens=24)[1]) == max(alone)


def test_lengths_and_defaults(fp64):
    model, stock = fp64
    tokens = random_tokens(1, 6)
    for options in (
        {"max_length": 9},
        {},
        {"generation_config": GenerationConfig(max_new_tokens=4)},
        {"generation_config": GenerationConfig(max_length=11)},
    ):
        assert torch.equal(model.generate(tokens, **options), stock.generate(tokens, **options))
    long = random_tokens(1, 60)
    assert torch.equal(model.generate(long), stock.generate(long)) and model.generate(long).shape == (1, 64)
    with pytest.raises(ValueError, match="the prompt has 6 tokens"):
        model.generate(tokens, max_length=6)


def test_mask_is_inferred_from_the_pad_token_as_transformers_does(fp64):
    model, stock = fp64
    tokens = random_tokens(3, 6)
    tokens[0, :3] = tokens[1, :1] = 7
    options = {"max_new_tokens": 8, "pad_token_id": 7}
    assert torch.equal(model.generate(tokens, **options), stock.generate(tokens, **options))
    options["eos_token_id"] = 7
    assert torch.equal(model.generate(tokens, **options), stock.generate(tokens, **options))


def test_streamer(fp64):
    class Recorder:
        def __init__(self):
            self.seen, self.ended = [], False

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            self.ended = True

    model, _ = fp64
    recorder, tokens = Recorder(), random_tokens(1, 6)
    output = model.generate(tokens, max_new_tokens=9, streamer=recorder)
    assert recorder.seen == output[0].tolist() and recorder.ended
    with pytest.raises(ValueError, match="streamer for more than one sequence; pass draft_heads=0"):
        model.generate(random_tokens(2, 6), max_new_tokens=9, streamer=recorder)


# --- generation, sampled ---


def exact_distribution(model, prompt, length, eos=None, **options):
    """Sequence -> probability, by head 1's logits and the textbook definitions of the options."""
    vocab = model.config.vocab_size
    sequences = torch.tensor(list(product(range(vocab), repeat=length)))
    with torch.no_grad():
        logits = model(torch.cat((prompt.expand(len(sequences), -1), sequences), 1)).logits.double()
    steps = torch.log_softmax(logits[:, prompt.shape[1] - 1 : -1], -1)
    probabilities = {}
    for sequence, rows in zip(sequences.tolist(), steps.tolist(), strict=True):
        probability = 1.0
        for i, (token, row) in enumerate(zip(sequence, rows, strict=True)):
            probability *= textbook(row, **options)[token]
            if token == eos:
                sequence = sequence[: i + 1] + [0] * (length - i - 1)
                break
        probabilities[tuple(sequence)] = probability
    return probabilities


def textbook(log_probabilities, temperature=1.0, top_k=0, top_p=1.0):
    weights = [2.718281828459045 ** (x / temperature) for x in log_probabilities]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])
    if top_k:
        order = order[:top_k]
    total, kept, mass = sum(weights[i] for i in order), [], 0.0
    for i in order:
        if mass / total < top_p:
            kept.append(i)
            mass += weights[i]
    return [weights[i] / mass if i in kept else 0.0 for i in range(len(weights))]


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """Four tokens, n = 3: heads that neither agree nor exclude one another."""
    folder = tmp_path_factory.mktemp("sampled")
    return load(make(folder, vocab_size=4, vocab_multiple=4, n_layers=4, n_future_tokens=3, init_std=0.2, seed=3)[2])


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 0},
        {"temperature": 0.6, "top_k": 3},
        {"temperature": 1.7, "top_k": 0, "top_p": 0.8},
        {"top_k": 0, "eos_token_id": 2, "pad_token_id": 0},
        {"top_k": 0, "draft_heads": 1},
    ],
    ids=str,
)
def test_samples_have_the_exact_distribution(sampled, options):
    prompt, length, count = torch.tensor([[1, 3, 0]]), 4, 10_000
    exact = {name: options[name] for name in ("temperature", "top_k", "top_p") if name in options}
    wanted = exact_distribution(sampled, prompt, length, options.get("eos_token_id"), **exact)
    assert abs(sum(wanted.values()) - 1) < 1e-6
    torch.manual_seed(0)
    batch = padded(prompt.expand(count, -1), [3] * count)  # the prompt's last token is the pad token, and no padding
    output = sampled.generate(**batch, do_sample=True, max_new_tokens=length, **options)
    assert output.shape == (count, 3 + length)
    check_counts(output[:, 3:], wanted)


def check_counts(samples, wanted):
    """Pearson's statistic, of sequences and of their beginnings, within five standard deviations of its mean.

    Beginnings have two tokens or more. Rare ones are one cell.
    """
    for length in range(2, samples.shape[1] + 1):
        expected, seen = Counter(), Counter(map(tuple, samples[:, :length].tolist()))
        for row, probability in wanted.items():
            expected[row[:length]] += probability * len(samples)
        assert all(expected[row] > 0 for row in seen)
        cells = [(seen[row], number) for row, number in expected.items() if number >= 10]
        rest = len(samples) - sum(number for _, number in cells)
        if rest > 1:
            cells.append((len(samples) - sum(number for number, _ in cells), rest))
        freedom = len(cells) - 1
        statistic = sum((number - mean) ** 2 / mean for number, mean in cells)
        assert freedom >= 5 and statistic < freedom + 5 * (2 * freedom) ** 0.5, (length, statistic, freedom)


def test_the_statistic_tells_distributions_apart(sampled):
    prompt = torch.tensor([[1, 3, 0]])
    wanted = exact_distribution(sampled, prompt, 4, temperature=1.2)
    torch.manual_seed(0)
    output = sampled.generate(prompt.expand(10_000, -1), do_sample=True, max_new_tokens=4, top_k=0)
    with pytest.raises(AssertionError):
        check_counts(output[:, 3:], wanted)


def test_sampling_from_a_padded_batch(sampled):
    """Two prompts of different lengths in one batch: each its own distribution."""
    prompts = [torch.tensor([[2, 1, 0]]), torch.tensor([[3]])]
    tokens = torch.tensor([[2, 1, 0], [0, 0, 3]]).repeat(5_000, 1)
    torch.manual_seed(0)
    batch = padded(tokens, [3, 1] * 5_000)
    output = sampled.generate(**batch, do_sample=True, max_new_tokens=3, top_k=0)[:, 3:]
    for i, prompt in enumerate(prompts):
        check_counts(output[i::2], exact_distribution(sampled, prompt, 3))


def test_heads_that_agree_draft_in_sampling_too(trained):
    model = load(trained)
    torch.manual_seed(0)
    tokens = torch.arange(5)[None]
    _, shapes = count_forwards(model, input_ids=tokens, max_new_tokens=40, do_sample=True, temperature=0.5)
    assert len(shapes) < 32


# --- what is refused ---


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"num_return_sequences": 2, "do_sample": True},
        {"repetition_penalty": 1.2},
        {"min_new_tokens": 2},
        {"min_p": 0.1, "do_sample": True},
        {"stop_strings": ["x"]},
        {"return_dict_in_generate": True},
        {"output_logits": True},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"logits_processor": [lambda ids, scores: scores]},
        {"stopping_criteria": [lambda ids, scores: False]},
        {"prefix_allowed_tokens_fn": lambda b, ids: [1]},
        {"assistant_model": object()},
        {"inputs_embeds": torch.zeros(1, 2, 16)},
        {"position_ids": torch.zeros(1, 6)},
        {"no_such_option": 1},
        {"generation_config": GenerationConfig(no_repeat_ngram_size=2)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_drafting_does_not_know(exported, options):
    name = next(iter(options))
    match = "no_repeat_ngram_size" if name == "generation_config" else name
    with pytest.raises(ValueError, match=f"{match}.*pass draft_heads=0"):
        load(exported).generate(random_tokens(1, 6), **options)


def test_options_of_the_models_own_generation_config_are_refused_too(exported):
    model = load(exported)
    model.generation_config.repetition_penalty = 1.3
    with pytest.raises(ValueError, match="repetition_penalty.*pass draft_heads=0"):
        model.generate(random_tokens(1, 6))


def test_no_drafts_means_all_of_transformers_options(fp64):
    model, stock = fp64
    options = {"num_beams": 3, "max_new_tokens": 6, "repetition_penalty": 1.3}
    tokens = random_tokens(2, 6)
    assert torch.equal(model.generate(tokens, draft_heads=0, **options), stock.generate(tokens, **options))


def test_a_model_of_one_head_generates_plainly(tmp_path):
    model = load(make(tmp_path, n_future_tokens=1)[2])
    assert not (tmp_path / "extra_heads.safetensors").exists()
    tokens = random_tokens(2, 6)
    assert torch.equal(
        model.generate(tokens, max_new_tokens=5, num_beams=2),
        model.generate(tokens, max_new_tokens=5, num_beams=2, draft_heads=0),
    )
    with pytest.raises(ValueError, match="draft_heads is 1; this model has 0"):
        model.generate(tokens, draft_heads=1)


def test_inputs_that_are_refused(exported):
    model = load(exported)
    tokens = random_tokens(2, 6)
    with pytest.raises(ValueError, match="draft_heads is 4; this model has 3"):
        model.generate(tokens, draft_heads=4)
    with pytest.raises(ValueError, match="padded on the left"):
        model.generate(tokens, attention_mask=torch.tensor([[1] * 6, [1] * 4 + [0] * 2]))
    with pytest.raises(ValueError, match=r"attention_mask is \(2, 5\); input_ids are \(2, 6\)"):
        model.generate(tokens, attention_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match="not empty.*draft_heads=0"):
        model.generate(max_new_tokens=3)
    model.hf_device_map = {"model": 0, "extra_heads": 1}
    with pytest.raises(ValueError, match="several devices; pass draft_heads=0"):
        model.generate(tokens)
    del model.hf_device_map
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="model.eval()"):
        model.generate(tokens)
    model.eval().config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='sdpa'.*draft_heads=0"):
        model.generate(tokens)


# --- training and saving ---


def test_forward_is_a_llamas(exported):
    model, stock = load(exported), AutoModelForCausalLM.from_pretrained(exported)
    tokens = random_tokens(2, 7)
    for which in (model, stock):
        which(tokens, labels=tokens).loss.backward()
    for name, parameter in stock.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, atol=1e-6, rtol=1e-5)
    assert all(parameter.grad is None for parameter in model.extra_heads.parameters())
    model.multi_token_logits(tokens).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.extra_heads.parameters())


@pytest.mark.parametrize("shard", ["10KB", "5GB"])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_saved_model_loads_both_ways(exported, tmp_path, shard, in_place):
    folder = tmp_path / "saved"
    shutil.copytree(exported, tmp_path / "source")
    model = load(tmp_path / "source")
    if in_place:
        folder = tmp_path / "source"
        (folder / "model.safetensors").write_bytes(b"left by another save: loaders would read it first")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.save_pretrained(folder, max_shard_size=shard)

    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = {file: load_file(folder / file) for file in set(index["weight_map"].values())}
    assert {name: file for file, state in shards.items() for name in state} == index["weight_map"]
    assert len(shards) == 1 if shard == "5GB" else len(shards) > 1
    assert not any("extra_heads" in name for name in index["weight_map"])
    assert {p.name for p in folder.glob("*.safetensors")} == {*shards, "extra_heads.safetensors"}
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
    assert config["auto_map"] == {"AutoModelForCausalLM": "modeling_megamtp.MultiTokenLlamaForCausalLM"}
    assert (folder / "modeling_megamtp.py").read_bytes() == CODE.read_bytes()

    back, stock = load(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert type(stock) is LlamaForCausalLM
    state = model.state_dict()
    assert set(back.state_dict()) == set(state)
    assert all(torch.equal(value, state[name]) for name, value in back.state_dict().items())
    assert all(torch.equal(value, state[name]) for name, value in stock.state_dict().items())


def test_saving_a_state_dict_that_was_gathered_elsewhere(exported, tmp_path):
    model = load(exported)
    state = {name: value + 1 for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    back = load(tmp_path).state_dict()
    assert set(back) == set(state) and all(torch.equal(back[name], state[name]) for name in state)
    with pytest.raises(ValueError, match="a state_dict that lacks the extra heads"):
        model.save_pretrained(tmp_path, state_dict={"lm_head.weight": state["lm_head.weight"]})


@pytest.mark.parametrize(
    "options", [{"push_to_hub": True}, {"variant": "fp16"}, {"safe_serialization": False}], ids=lambda o: next(iter(o))
)
def test_saving_that_is_refused(exported, tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        load(exported).save_pretrained(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
