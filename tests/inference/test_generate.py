import pytest
import torch

from megamtp.errors import UserError
from megamtp.inference.generate import generate, load_run
from megamtp.model.model import logical_parameters
from tests.distributed import run_rank
from tests.model.llama import llama, random_model, small_config
from tests.training.tiny import run_config, run_training, tensors, write_corpus

PROMPT = torch.tensor([3, 1, 4, 1, 5])


@pytest.fixture(scope="module")
def models():
    """A 4-head model in fp64, and its trunk and head 1 as a Llama of transformers."""
    config = small_config(n_layers=6, n_future_tokens=4)
    model = random_model(config, seed=0, dtype=torch.float64)
    return model, llama(dict(logical_parameters(model)), config)


def test_greedy_is_what_transformers_generates(models):
    model, reference = models
    expected = reference.generate(PROMPT[None], max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert generate(model, PROMPT, 12, context=64).tolist() == expected[0, len(PROMPT) :].tolist()


def test_the_stop_token_ends_the_text_and_is_not_part_of_it(models):
    whole = generate(models[0], PROMPT, 12, context=64).tolist()
    stop = whole[5]
    assert generate(models[0], PROMPT, 12, context=64, stop_token=stop).tolist() == whole[: whole.index(stop)]


def test_only_the_context_is_seen(models):
    first, second = torch.tensor([7, 9, *PROMPT]), torch.tensor([11, 13, *PROMPT])
    short = [generate(models[0], prompt, 1, context=len(PROMPT)).tolist() for prompt in (first, second, PROMPT)]
    assert short[0] == short[1] == short[2]


def test_samples_follow_the_softmax(models):
    model, reference = models
    generator = torch.Generator().manual_seed(0)
    drawn = [generate(model, PROMPT, 1, context=64, temperature=0.7, generator=generator).item() for _ in range(3000)]
    counts = torch.bincount(torch.tensor(drawn), minlength=50)
    with torch.no_grad():
        expected = (reference(PROMPT[None]).logits[0, -1].double() / 0.7).softmax(-1)
    # Four standard deviations of a binomial count, a little more for the rare tokens.
    assert ((counts - 3000 * expected).abs() <= 4 * (3000 * expected).sqrt() + 3).all()


def test_an_empty_prompt_is_refused(models):
    with pytest.raises(ValueError, match="empty"):
        generate(models[0], PROMPT[:0], 1, context=4)


def test_a_run_is_loaded_from_its_newest_checkpoint(tmp_path):
    corpus = tmp_path / "corpus"
    write_corpus(corpus / "train", n_documents=120, seed=0)
    write_corpus(corpus / "validation", n_documents=15, seed=1)
    with pytest.raises(UserError, match="no config.yaml"):
        load_run(tmp_path / "run")
    config = run_config(tmp_path / "run", corpus, {"training.steps": 2})
    run_rank(run_training, config)
    run = load_run(tmp_path / "run")
    assert run.config == config
    saved = tensors(run.checkpoint)
    assert {name: True for name, _ in logical_parameters(run.model)} == {
        name: torch.equal(saved[name], parameter) for name, parameter in logical_parameters(run.model)
    }
    (tmp_path / "run" / "checkpoints" / "latest").unlink()
    with pytest.raises(UserError, match="no checkpoint yet"):
        load_run(tmp_path / "run")
