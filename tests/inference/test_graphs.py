"""Passes that are recorded once and replayed: the buffers, keys and masks of it on a CPU, the graphs on a GPU."""

import gc

import pytest
import torch

from megamtp.inference.decoder import Decoder
from megamtp.inference.generate import generate
from megamtp.inference.graphs import SLOTS, GraphedDecoder, Recording
from megamtp.inference.sampling import Sampling
from tests.inference.models import CONTEXT, decoder_of, held_out_prompts, parameters_of, trained_model


class Recorder:
    """Replays by running the function again, from the buffers of the recording into its output."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, function, inputs):
        self.recorded += 1
        inputs = [x.clone() for x in inputs]
        output = function(*inputs).clone()

        def replay():
            self.replayed += 1
            output.copy_(function(*inputs))

        return Recording(replay, inputs, output)


@pytest.fixture(scope="module")
def decoder():
    return decoder_of(trained_model())


def graphed(record) -> GraphedDecoder:
    parameters = parameters_of(trained_model())
    return GraphedDecoder(trained_model().config, lambda name: parameters[name].clone(), CONTEXT, record)


def tokens(decoder, prompts, n=60, **options):
    return [completion.tokens for completion in generate(decoder, prompts, n, **options).completions]


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("how", [{"draft_heads": 0}, {"draft_heads": 3}, {"tree": (3, 2)}], ids=str)
def test_the_same_tokens(decoder, how, batch_size):
    """Rows of many lengths, of which some end early; several caches one after another."""
    record = Recorder()
    replaying = graphed(record)
    for prompts in (held_out_prompts(6), held_out_prompts(9)[6:]):
        options = how | {"batch_size": batch_size}
        assert tokens(replaying, prompts, **options) == tokens(decoder, prompts, **options)
    assert record.replayed > 5 * record.recorded > 0


def test_sampling(decoder):
    options = {"sampling": Sampling(temperature=0.8), "batch_size": 3}
    draws = [
        tokens(d, held_out_prompts(5), generator=torch.Generator().manual_seed(7), **options)
        for d in (decoder, graphed(Recorder()))
    ]
    assert draws[0] == draws[1]


def test_beyond_a_block_of_slots(decoder):
    """Past 256 positions a pass reads one more block, and is recorded again."""
    context = SLOTS + 60
    parameters = parameters_of(trained_model())
    record = Recorder()
    sides = [
        kind(trained_model().config, lambda name: parameters[name].clone(), context, *rest)
        for kind, rest in ((Decoder, ()), (GraphedDecoder, (record,)))
    ]
    prompt = held_out_prompts(4)[3]
    long = (prompt * 20)[: SLOTS - 20]
    plain, ours = (tokens(side, [long], n=50, draft_heads=0) for side in sides)
    assert plain == ours and record.recorded == 4  # trunk and head 1, of two sizes


def test_a_cache_is_used_again_when_nobody_holds_it(decoder):
    record = Recorder()
    replaying = graphed(record)
    first = tokens(replaying, held_out_prompts(1), draft_heads=0)
    recorded = record.recorded
    gc.collect()
    assert tokens(replaying, held_out_prompts(1), draft_heads=0) == first and record.recorded == recorded
    caches = [replaying.new_cache(1, 100, 0) for _ in range(2)]  # both are held
    assert caches[0].blocks[0].data_ptr() != caches[1].blocks[0].data_ptr()


@pytest.mark.gpu
@pytest.mark.parametrize("how", [{"draft_heads": 0}, {"draft_heads": 3}, {"tree": (3, 2)}], ids=str)
def test_cuda_graphs(how):
    parameters = {name: p.to("cuda", torch.float64) for name, p in parameters_of(trained_model()).items()}
    sides = [kind(trained_model().config, parameters.__getitem__, CONTEXT) for kind in (Decoder, GraphedDecoder)]
    for prompts in (held_out_prompts(6), held_out_prompts(9)[6:]):
        plain, ours = (tokens(side, prompts, batch_size=4, **how) for side in sides)
        assert plain == ours
