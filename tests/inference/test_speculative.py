"""Self-speculation gives what plain decoding gives: the tokens if greedy, the distribution if drawn."""

import pytest
import torch

from megamtp.inference.decoder import Decoder
from megamtp.inference.generate import generate
from megamtp.inference.native.decoder import NativeDecoder
from megamtp.inference.sampling import Sampling
from megamtp.inference.speculative import SpeculativeDecoder
from megamtp.inference.tree import Tree
from tests.inference.models import CONTEXT, decoder_of, encode, held_out_prompts, parameters_of, trained_model
from tests.model.llama import llama, random_model, small_config

N_PROMPTS, NEW = 200, 16
STOP = encode(")")[0]  # common enough that many sequences end early
HOW = [{"draft_heads": k} for k in (1, 2, 3)] + [{"tree": (3, 2, 1)}, {"tree": (2,)}]


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return decoder_of(trained_model())


@pytest.fixture(scope="module")
def plain(decoder):
    """The completions of every prompt by itself."""
    return tokens_of(decoder, batch_size=1, draft_heads=0)


def tokens_of(decoder, prompts=None, **how):
    found = generate(decoder, prompts or held_out_prompts(N_PROMPTS), NEW, stop_tokens=[STOP], **how)
    return [(completion.tokens, completion.finish_reason) for completion in found.completions]


def test_plain_decoding_is_what_transformers_generates(plain):
    model = trained_model()
    theirs = llama(parameters_of(model), model.config, wide=True)
    reasons = set()
    for prompt, (tokens, reason) in list(zip(held_out_prompts(N_PROMPTS), plain, strict=True))[::10]:
        ids = torch.tensor([prompt])
        whole = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=STOP,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert tokens == (whole[:-1] if reason == "stop" else whole)
        reasons.add(reason)
    assert reasons == {"stop", "length"}


QUICK = [(1, HOW[2]), (1, HOW[3]), (4, HOW[0]), (4, HOW[3]), (8, HOW[1]), (8, HOW[4])]
REST = [(batch_size, how) for batch_size in (1, 4, 8) for how in HOW if (batch_size, how) not in QUICK]


@pytest.mark.parametrize(
    ("batch_size", "how"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)], ids=str
)
def test_greedy_drafts_change_nothing_in_fp64(decoder, plain, how, batch_size):
    assert tokens_of(decoder, batch_size=batch_size, **how) == plain


@pytest.mark.parametrize("batch_size", [4, 8])
def test_batches_change_nothing_in_fp64(decoder, plain, batch_size):
    assert tokens_of(decoder, batch_size=batch_size, draft_heads=0) == plain


@pytest.mark.parametrize(
    ("how", "batch_size"), [({"draft_heads": 3}, 1), ({"draft_heads": 2}, 8), ({"tree": (3, 2, 1)}, 4)]
)
def test_greedy_in_fp32_differs_at_ties_only(how, batch_size):
    decoder = decoder_of(trained_model(), torch.float32)
    prompts = held_out_prompts(60)
    alone = tokens_of(decoder, prompts, batch_size=1, draft_heads=0)
    for prompt, (tokens, _), (expected, _) in zip(
        prompts, tokens_of(decoder, prompts, batch_size=batch_size, **how), alone, strict=True
    ):
        if tokens != expected:
            same = next(i for i, (a, b) in enumerate(zip(tokens, expected, strict=False)) if a != b)
            with torch.inference_mode():
                top = decoder.all_heads(torch.tensor([prompt + expected[:same]]))[0, -1].topk(2).values
            assert top[0] - top[1] < 1e-4


def test_drafts_are_accepted_and_save_forward_passes(decoder, plain):
    n_tokens = sum(len(tokens) for tokens, _ in plain)
    found = generate(decoder, held_out_prompts(N_PROMPTS), NEW, stop_tokens=[STOP])
    shares = found.statistics.acceptance
    assert found.statistics.tokens_per_forward > 1.3 and 1 > shares[0] > shares[1] > shares[2] > 0
    assert found.statistics.tokens_per_forward == pytest.approx(1 + sum(shares))
    assert found.statistics.forwards < n_tokens / 1.2
    wide = generate(decoder, held_out_prompts(N_PROMPTS), NEW, stop_tokens=[STOP], tree=(3, 2, 1))
    assert wide.statistics.tokens_per_forward > found.statistics.tokens_per_forward


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype"), [(Decoder, torch.float64), (NativeDecoder, torch.float32)])
def test_heads_with_unembeddings_of_their_own_draft_as_well(kind, dtype):
    decoder = decoder_of(trained_model(replicated=True), dtype, kind=kind)
    plain = tokens_of(decoder, batch_size=1, draft_heads=0)
    for how in (HOW[2], HOW[3]):
        assert tokens_of(decoder, batch_size=8, **how) == plain
    shares = generate(decoder, held_out_prompts(N_PROMPTS), NEW, stop_tokens=[STOP]).statistics.acceptance
    assert 1 > shares[0] > shares[1] > shares[2] > 0.05


def exact_distribution(model, prompt, n_tokens, sampling):
    """P(sequence) of every sequence of ``n_tokens``, by the training model: (V, ..., V)."""
    v = model.config.vocab_size
    p = torch.ones(())
    with torch.no_grad():
        for i in range(n_tokens):
            beginnings = torch.cartesian_prod(*[torch.arange(v)] * i).view(v**i, i) if i else torch.empty(1, 0).long()
            sequences = torch.cat([torch.tensor(prompt).expand(len(beginnings), -1), beginnings], 1)
            following = reference_probabilities(model(sequences)[0, :, -1], sampling)
            p = (p.flatten()[:, None] * following).view([v] * (i + 1))
    return p


def reference_probabilities(logits, sampling):
    """Softmax at a temperature, cut token by token as the definitions say."""
    p = (logits.double() / sampling.temperature).softmax(-1)
    for row in p:
        order = sorted(range(len(row)), key=lambda i: -row[i].item())
        kept = order if sampling.top_k is None else order[: sampling.top_k]
        total, nucleus = 0.0, []
        mass = sum(row[i].item() for i in kept)
        for i in kept:
            nucleus.append(i)
            total += row[i].item() / mass
            if total >= sampling.top_p:
                break
        row[[i for i in range(len(row)) if i not in nucleus]] = 0
        row /= row.sum()
    return p


@pytest.mark.parametrize(
    ("widths", "sampling"),
    [
        ((), Sampling(1.0)),
        ((1,), Sampling(0.7, top_k=4)),
        ((1, 1, 1), Sampling(1.0)),
        ((1, 1, 1), Sampling(1.3, top_p=0.8)),
        ((2, 2), Sampling(1.0)),
    ],
    ids=str,
)
def test_samples_have_the_distribution_of_ordinary_sampling(widths, sampling):
    """4 tokens of a 7-token vocabulary, 4,000 times, against the training model's own probabilities."""
    config = small_config(vocab_size=7, n_layers=6, n_future_tokens=4, n_kv_heads=2, init_std=0.35)
    model = random_model(config, seed=2, dtype=torch.float64)
    prompt, rows, rounds, n = [3, 1, 4], 100, 40, 4
    generator = torch.Generator().manual_seed(5)
    speculative = SpeculativeDecoder(decoder_of(model), Tree(widths), sampling, rows, 16, generator)
    counts = torch.zeros([7] * n, dtype=torch.float64)
    for _ in range(rounds):
        drawn = [[speculative.start(row, torch.tensor(prompt))] for row in range(rows)]
        while min(map(len, drawn)) < n:
            for tokens, new in zip(drawn, speculative.step(), strict=True):
                tokens += new
        for tokens in drawn:
            counts[tuple(tokens[:n])] += 1
    expected = exact_distribution(model, prompt, n, sampling) * rows * rounds
    assert counts[expected == 0].sum() == 0
    # Pearson's statistic over cells with 5 or more expected, the rest as one; its mean is the number of cells - 1.
    large = expected >= 5
    observed = torch.cat([counts[large], counts[~large].sum()[None]])
    wanted = torch.cat([expected[large], expected[~large].sum()[None]])
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    statistic = ((observed - wanted) ** 2 / wanted).sum().item()
    assert freedom > 10 and statistic < freedom + 4 * (2 * freedom) ** 0.5
    if widths:
        assert speculative.statistics.tokens_per_forward > 1.1


def test_a_wrong_rule_would_be_noticed():
    """The statistic above, of samples whose temperature is 15 % off."""
    config = small_config(vocab_size=7, n_layers=6, n_future_tokens=4, n_kv_heads=2, init_std=0.35)
    model = random_model(config, seed=2, dtype=torch.float64)
    right = exact_distribution(model, [3, 1, 4], 4, Sampling(1.0)).flatten() * 4000
    wrong = exact_distribution(model, [3, 1, 4], 4, Sampling(1.15)).flatten() * 4000
    large = right >= 5
    freedom = int(large.sum())
    assert ((wrong - right) ** 2 / right)[large].sum() > 4 * (2 * freedom) ** 0.5


def test_a_row_that_ends_gives_its_place_to_another(decoder):
    """Ends at different times, in rows in the middle, and more prompts than rows: each completion is its own."""
    prompts = held_out_prompts(30)
    alone = [generate(decoder, [prompt], 3 + i % 9).completions[0].tokens for i, prompt in enumerate(prompts)]
    for limit in (3, 7, 11):
        together = generate(decoder, prompts, limit, batch_size=4).completions
        for i, (completion, expected) in enumerate(zip(together, alone, strict=True)):
            n = min(limit, 3 + i % 9)
            assert completion.tokens[:n] == expected[:n]


def test_the_context_is_filled_to_its_end(decoder):
    prompt = (held_out_prompts(1)[0] * 40)[: CONTEXT - 5]
    plain = generate(decoder, [prompt], 50, draft_heads=0).completions[0]
    assert len(plain.tokens) == 6 and plain.finish_reason == "context"
    for how in HOW:
        assert generate(decoder, [prompt], 50, **how).completions[0] == plain
