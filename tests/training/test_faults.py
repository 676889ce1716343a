"""Signals and non-finite gradients, in the training loop itself."""

import math
import os
import signal
import time

import pytest

from megamtp.training import faults
from megamtp.training.faults import STOP_SIGNALS, StopRequest
from tests.distributed import run_rank, run_ranks, start_ranks
from tests.training.tiny import events, exact, newest, run_config, run_training, step_lines

CHANGES = {"training.steps": 8, "parallel.zero_stage": 1}
STRIKE = 3  # the step during which it happens


@pytest.fixture(scope="module")
def unbroken(corpus, tmp_path_factory):
    """Exact lines of the run that nothing disturbs, by the number of ranks."""
    folders = {}
    for world_size in (1, 2):
        folder = tmp_path_factory.mktemp("unbroken")
        run_ranks(world_size, run_training, run_config(folder, corpus, CHANGES))
        folders[world_size] = [exact(line) for line in step_lines(folder)]
    return folders


# --- signals


def run_signalled(grid, config, number: int, step: int) -> int:
    """The last rank gets the signal while it reads the batches of ``step``."""
    from megamtp.data.loader import Loader
    from megamtp.training import loop

    next_untouched = Loader.next_step

    def next_step(self):
        if grid.rank == grid.world_size - 1 and self.consumed_samples == (step - 1) * self.global_batch_size:
            os.kill(os.getpid(), number)
        return next_untouched(self)

    Loader.next_step = next_step
    return loop.train(config, grid)


@pytest.mark.parametrize(
    ("world_size", "number"),
    [(1, signal.SIGTERM), (1, signal.SIGINT), (1, signal.SIGUSR1), (2, signal.SIGTERM)],
)
def test_a_signal_ends_the_run_after_the_step_and_it_goes_on_exactly(corpus, tmp_path, unbroken, world_size, number):
    config = run_config(tmp_path, corpus, CHANGES)
    assert run_ranks(world_size, run_signalled, config, int(number), STRIKE) == [128 + number] * world_size
    assert [line["step"] for line in step_lines(tmp_path)] == list(range(1, STRIKE + 1))
    assert newest(tmp_path).manifest["step"] == STRIKE
    run_ranks(world_size, run_training, config)
    assert [exact(line) for line in step_lines(tmp_path)] == unbroken[world_size]


def run_signalled_with_workers(grid, config, number: int, step: int) -> tuple[int, list[int]]:
    """All processes of each rank get the signal, its data workers included, as from a scheduler. (code, left over)."""
    import psutil

    from megamtp.data.loader import Loader
    from megamtp.training import loop

    next_untouched, workers = Loader.next_step, []

    def next_step(self):
        batches = next_untouched(self)
        if self.consumed_samples == step * self.global_batch_size:
            workers.extend(psutil.Process().children())
            for process in (*workers, psutil.Process()):
                process.send_signal(number)
            time.sleep(0.5)
        return batches

    Loader.next_step = next_step
    code = loop.train(config, grid)
    assert len(workers) == 2
    return code, [worker.pid for worker in psutil.wait_procs(workers, timeout=10)[1]]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_data_workers_leave_a_stop_to_their_rank(corpus, tmp_path, unbroken, number):
    config = run_config(tmp_path, corpus, CHANGES | {"data.workers": 2})
    assert run_ranks(2, run_signalled_with_workers, config, int(number), STRIKE) == [(128 + number, [])] * 2
    assert newest(tmp_path).manifest["step"] == STRIKE
    run_ranks(2, run_training, config)
    assert [exact(line) for line in step_lines(tmp_path)] == unbroken[2]


def run_failing_with_workers(grid, config) -> list[int]:
    """An error in the middle of a step: which data workers are left when it has come out of ``train``."""
    import psutil

    from megamtp.engine.engine import Engine
    from megamtp.training import loop

    train_untouched, workers = Engine.train_step, []

    def train_step(self, batches, lr):
        workers.extend(psutil.Process().children())
        raise ArithmeticError("in the step")

    Engine.train_step = train_step
    try:
        loop.train(config, grid)
    except ArithmeticError:
        return [len(workers), *(worker.pid for worker in psutil.wait_procs(workers, timeout=10)[1])]
    finally:
        Engine.train_step = train_untouched


def test_an_error_ends_the_data_workers(corpus, tmp_path):
    assert run_rank(run_failing_with_workers, run_config(tmp_path, corpus, CHANGES | {"data.workers": 2})) == [2]


def run_with_a_killed_worker(grid, config) -> str:
    import psutil

    from megamtp.engine.engine import Engine
    from megamtp.errors import RunFailure
    from megamtp.training import loop

    def train_step(self, batches, lr):
        psutil.Process().children()[0].kill()
        time.sleep(30)  # torch tells it here

    Engine.train_step = train_step
    with pytest.raises(RunFailure) as error:
        loop.train(config, grid)
    return str(error.value)


def test_a_data_worker_that_dies_between_batches_is_one_line(corpus, tmp_path):
    message = run_rank(run_with_a_killed_worker, run_config(tmp_path, corpus, CHANGES | {"data.workers": 2}))
    assert message.startswith("data: DataLoader worker") and "out of memory?" in message and "\n" not in message


def test_a_signal_during_the_last_step_is_an_ordinary_end(corpus, tmp_path, unbroken):
    assert run_rank(run_signalled, run_config(tmp_path, corpus, CHANGES), int(signal.SIGTERM), 8) == 0
    assert [exact(line) for line in step_lines(tmp_path)] == unbroken[1]
    assert newest(tmp_path).manifest["step"] == 8


def test_the_signal_is_remembered_and_handlers_are_put_back():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopRequest() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.signal == signal.SIGUSR1
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


@pytest.fixture
def clock(monkeypatch):
    """``clock.now`` is the time that ``StopRequest`` sees."""

    class Clock:
        now = 100.0

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(faults, "time", clock)
    return clock


def test_an_interrupt_that_arrives_twice_is_one(clock):
    """torchrun passes on the Ctrl-C that the terminal has sent to all processes already."""
    with StopRequest() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            clock.now += 0.5
        assert stop.signal == signal.SIGINT


def test_a_second_interrupt_seconds_later_stops_at_once(clock):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        clock.now += 10
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


# --- non-finite gradients


def run_poisoned(grid, config, step: int) -> int:
    """The last rank's gradient of one matrix is not finite in ``step``."""
    from megamtp.engine.engine import Engine
    from megamtp.training import loop

    init_untouched, step_untouched = Engine.__init__, Engine.train_step
    done = []

    def init(self, model, **options):
        init_untouched(self, model, **options)
        strikes = grid.rank == grid.world_size - 1
        self.module.layers[0].feed_forward.w1.weight.register_hook(
            lambda grad: grad * (math.inf if strikes and len(done) == step - 1 else 1.0)
        )

    def train_step(self, batches, lr):
        result = step_untouched(self, batches, lr)
        done.append(lr)
        return result

    Engine.__init__, Engine.train_step = init, train_step
    return loop.train(config, grid)


@pytest.mark.parametrize(("precision", "zero_stage"), [("fp32", 0), ("fp32", 1), ("bf16", 1)])
def test_a_non_finite_step_is_skipped_counted_and_training_goes_on(corpus, tmp_path, precision, zero_stage):
    changes = CHANGES | {"parallel.zero_stage": zero_stage, "training.precision": precision}
    outcomes = start_ranks(2, _poisoned_main, run_config(tmp_path, corpus, changes), STRIKE)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].error or outcomes[1].error
    lines = step_lines(tmp_path)
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert [line["grad_norm"] is not None for line in lines] == [step != STRIKE for step in range(1, 9)]
    assert all(math.isfinite(line["loss"]) for line in lines)
    manifest = newest(tmp_path).manifest
    assert manifest["state"]["counters"]["skipped_steps"] == 1
    assert (manifest["step"], manifest["optimizer_steps"]) == (8, 7)
    assert f"step {STRIKE}: non-finite (loss " in outcomes[0].stdout + outcomes[0].stderr
    [event] = events(tmp_path, "skipped")
    assert (event["step"], event["reason"], event["grad_norm"]) == (STRIKE, "non-finite", None)


def _poisoned_main(config, step: int) -> int:
    from megamtp.engine.launch import start_processes

    return run_poisoned(start_processes(), config, step)
