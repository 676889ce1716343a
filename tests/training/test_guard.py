"""Which steps are skipped, and what becomes of a run after several in a row."""

import math

import pytest

from megamtp.training.guard import Guard, GuardConfig
from tests.distributed import start_ranks
from tests.training.tiny import events, lines, newest, run_config, step_lines

CHANGES = {"training.steps": 10, "training.checkpoint_every": 2, "guard.max_skipped": 2}


def test_what_is_not_finite_is_skipped():
    guard = Guard(GuardConfig(max_skipped=2))
    assert guard.judge(1.0, 1.0) is None
    assert guard.judge(math.nan, 1.0) == guard.judge(1.0, math.inf) == "non-finite"
    assert guard.gives_up
    assert guard.judge(1e9, 1e9) is None and not guard.gives_up  # spikes are judged where it is asked for


def test_spikes_of_loss_and_norm():
    guard = Guard(GuardConfig(spike_sigmas=6, spike_window=8))
    for step in range(4):
        assert guard.judge(4 + 0.1 * (-1) ** step, 1.0) is None  # mean 4, deviation 0.1
    assert guard.judge(4.55, 1.0) is None and guard.judge(6.0, 1.0) == "spike" and guard.judge(4.0, 1.2) == "spike"
    assert guard.judge(4.0, 1.1) is None  # a constant is taken to vary by 2 %
    other = Guard(GuardConfig(spike_sigmas=6, spike_window=8))
    other.load_state_dict(guard.state_dict())
    assert other.state_dict() == guard.state_dict() and other.judge(6.5, 1.0) == "spike"
    few = Guard(GuardConfig(spike_sigmas=6, spike_window=8))
    assert [few.judge(value, 1.0) for value in (1.0, 1.0, 1.0, 100.0)] == [None] * 4  # too few to tell


def run_bad(config, first: int, last: int, factor: float) -> int:
    """The gradients of the samples of steps ``first`` to ``last`` are multiplied, on the last rank."""
    from megamtp.data.loader import Loader
    from megamtp.engine.engine import Engine
    from megamtp.engine.launch import start_processes
    from megamtp.training import loop

    grid = start_processes(config.parallel, config.model.kv_heads)
    init_untouched, next_untouched, place = Engine.__init__, Loader.next_step, [0]

    def next_step(self):
        place[0] = self.consumed_samples // self.global_batch_size + 1
        return next_untouched(self)

    def init(self, model, **options):
        init_untouched(self, model, **options)
        for prefix, layer in self.layers:  # sequential heads hand no gradients to autograd
            for parameter in layer.parameters() if prefix.startswith("layers.") else ():
                if grid.rank == grid.world_size - 1:
                    parameter.register_hook(lambda grad: grad * (factor if first <= place[0] <= last else 1.0))

    Loader.next_step, Engine.__init__ = next_step, init
    return loop.train(config, grid)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_spike_is_skipped_on_all_ranks(corpus, tmp_path, zero_stage):
    changes = CHANGES | {"guard.spike_sigmas": 50.0, "guard.spike_window": 4, "parallel.zero_stage": zero_stage}
    outcomes = start_ranks(2, run_bad, run_config(tmp_path, corpus, changes), 5, 5, 1e6)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].error or outcomes[1].error
    [event] = events(tmp_path, "skipped")
    assert (event["step"], event["reason"]) == (5, "spike") and event["grad_norm"] > 1e4
    manifest = newest(tmp_path).manifest
    assert (manifest["step"], manifest["optimizer_steps"]) == (10, 9)


def test_after_several_in_a_row_it_goes_back_past_their_samples(corpus, tmp_path):
    """Steps 5 and 6 are bad: back to step 4, on with the samples of step 7, to the same step in the end."""
    changes = CHANGES | {"parallel.zero_stage": 1}
    outcomes = start_ranks(2, run_bad, run_config(tmp_path, corpus, changes), 5, 6, math.inf)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].error or outcomes[1].error
    assert [line["step"] for line in step_lines(tmp_path)] == list(range(1, 11))
    [event] = events(tmp_path, "rolled_back")
    assert (event["from_step"], event["to_step"], event["skipped_samples"]) == (6, 4, 16)
    manifest = newest(tmp_path).manifest
    assert (manifest["step"], manifest["optimizer_steps"]) == (10, 10)
    assert manifest["state"]["counters"]["rollbacks"] == 1 and manifest["state"]["counters"]["skipped_steps"] == 2
    assert manifest["state"]["loader"]["consumed_samples"] == 12 * 8
    assert not [line for line in lines(tmp_path) if line.get("event") == "damaged"]


def test_it_gives_up_when_going_back_does_not_help(corpus, tmp_path):
    changes = CHANGES | {"parallel.zero_stage": 1, "guard.max_rollbacks": 2}
    outcomes = start_ranks(2, run_bad, run_config(tmp_path, corpus, changes), 5, 10**6, math.inf)
    for outcome in outcomes:
        assert "2 steps in a row were skipped, and going back to step 4 has not helped 2 times" in outcome.error
    assert len(events(tmp_path, "rolled_back")) == 2


def test_before_the_first_checkpoint_there_is_nowhere_to_go_back_to(corpus, tmp_path):
    outcomes = start_ranks(1, run_bad, run_config(tmp_path, corpus, CHANGES), 1, 10, math.nan)
    assert "RunFailure: 2 steps in a row were skipped before the first checkpoint" in outcomes[0].error
