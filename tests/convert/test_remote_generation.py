"""Drafted generation of the exported folder against transformers' own, and what it refuses."""

from collections import Counter
from itertools import product

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.convert.remote import load, make, padded, random_tokens


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


def test_greedy_with_unembeddings_of_their_own(tmp_path):
    """Drafts change no token, and each head's come from its own matrix."""
    _, config, folder = make(tmp_path, dtype=torch.float64, init_std=0.15, replicated_unembedding=True)
    model, stock = load(folder, dtype=torch.float64), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    batch = padded(random_tokens(4, 6), [6, 1, 4, 5])
    plain = stock.generate(**batch, max_new_tokens=17)
    for draft_heads in range(config.n_future_tokens):
        assert torch.equal(model.generate(**batch, max_new_tokens=17, draft_heads=draft_heads), plain)
    hidden = torch.randn(2, 3, config.dim, dtype=torch.float64)
    drafts = model._draft_logits(hidden)
    for j, output in enumerate(model.extra_lm_heads):
        torch.testing.assert_close(drafts[:, j], model.model.norm(hidden[:, j]) @ output.weight.T, rtol=1e-12, atol=0)


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
