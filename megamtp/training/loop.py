"""The training run, plain code from top to bottom: data, model, engine, resume, steps, evaluation, checkpoints."""

import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from megamtp.config import dump
from megamtp.data.datasets import ALL, Data, DataConfig, Share, describe_data, open_data
from megamtp.data.loader import Batch, Loader, dead_workers_told, validation_batches, validation_rounds
from megamtp.engine.build import build_engine
from megamtp.engine.engine import Engine, ModelInputs
from megamtp.engine.launch import TIMEOUT, set_timeouts
from megamtp.errors import RunFailure, UserError
from megamtp.files import write_atomic
from megamtp.parallel.groups import ProcessGrid
from megamtp.training.faults import LONG, StopRequest, fail_together, from_main
from megamtp.training.metrics import HeadMetrics, peak_memory, reduce_heads, reduce_step
from megamtp.training.recovery import newest_whole
from megamtp.training.run_config import RunConfig
from megamtp.training.run_log import RunLog, StepTimes
from megamtp.training.run_state import RunState
from megamtp.training.saver import Saver
from megamtp.training.schedule import learning_rate
from megamtp.training.watchdog import SAVE_PATIENCE, Watchdog

T = TypeVar("T")


def open_run_data(config: RunConfig, share: Share | None = ALL) -> Data:
    """The data sets of a run, checked. ``UserError`` for data that does not fit."""
    return open_data(
        config.data,
        vocab_size=config.model.vocab_size,
        n_future_tokens=config.model.n_future_tokens,
        seed=config.training.seed,
        share=share,
    )


def open_loader(config: RunConfig, grid: ProcessGrid) -> tuple[Loader, Data]:
    """What this rank reads, for the ranks that read. Those of the first stage share what takes reading all of it."""
    checks = grid.pp_rank == grid.tensor.rank == 0
    data = open_run_data(config, Share(grid.dp_rank, grid.dp_size) if checks else None)
    on_gpu = grid.device.type == "cuda"
    workers = config.data.workers
    loader = Loader(
        data.train,
        config.training.global_batch_size,
        config.training.micro_batch_size,
        grid.dp_rank,
        grid.dp_size,
        transform=partial(model_inputs, data=config.data),
        workers=(2 if on_gpu else 0) if workers is None else workers,
        prefetch=config.data.prefetch,
        pin_memory=on_gpu,
    )
    return loader, data


def model_inputs(batch: Batch, data: DataConfig) -> ModelInputs:
    """A micro-batch as the model's keyword arguments."""
    by_document = data.document_attention
    return {
        "tokens": batch.inputs,
        "targets": batch.targets(data.mask_cross_document_targets),
        "positions": batch.positions() if by_document else None,
        "document_ids": batch.document_ids[:, : batch.seq_len] if by_document else None,
    }


def engine_of_run(config: RunConfig, grid: ProcessGrid, seed: int | None) -> Engine:
    """This rank's engine; ``seed=None`` leaves the weights for a checkpoint to fill."""
    return build_engine(
        config.model,
        config.heads_of_layout,
        config.ops,
        grid=grid,
        parallel=config.parallel,
        optimizer=config.optimizer,
        precision=config.training.precision,
        micro_batch_size=config.training.micro_batch_size,
        micro_batches=config.micro_batches(grid.world_size),
        seq_len=config.data.seq_len,
        seed=seed,
    )


def evaluate_sets(
    config: RunConfig,
    grid: ProcessGrid,
    engine: Engine,
    data: Data | None,
    validation_samples: dict[str, int],
    moved: Callable[[], None] = lambda: None,
) -> tuple[dict[str, HeadMetrics], HeadMetrics]:
    """Metrics of each validation set and of all together. Every rank calls it; those without ``data`` read nothing.

    ``validation_samples``: how many samples each set has. ``moved`` is called at each micro-batch.
    """
    micro_batch_size, limit = config.training.micro_batch_size, config.training.eval_samples
    sets, totals = {}, torch.zeros(3, config.model.n_future_tokens, dtype=torch.float64, device=grid.device)
    for name, n_samples in validation_samples.items():
        n_samples = min(n_samples, limit or n_samples)
        if data:
            rows = validation_batches(data.validation[name], micro_batch_size, grid.dp_rank, grid.dp_size, n_samples)
            batches = (model_inputs(batch, config.data) for batch in rows)
        else:
            batches = [None] * validation_rounds(n_samples, micro_batch_size, grid.dp_size)
        sums = engine.evaluate(_told(batches, moved))
        sets[name] = reduce_heads(*sums, grid)
        totals += torch.stack([x.double() for x in sums])
    return sets, reduce_heads(*totals, grid)


def _told(batches: Iterable[T], moved: Callable[[], None]) -> Iterator[T]:
    for batch in batches:
        moved()
        yield batch


def train(config: RunConfig, grid: ProcessGrid) -> int:
    """Run or resume ``config`` to its end. Returns 0, or 128 + the signal that asked for a stop after a save.

    Every rank calls it. Raises ``UserError`` for input that does not fit, before anything is computed, and
    ``RunFailure`` where the last save could not be written or going back has not helped.
    """
    run_dir, training = Path(config.run_dir), config.training
    # A rank that is still on its way must not lose its neighbours; checksums and packing may take it hours.
    is_long = config.data.verify == "checksum" or config.data.packing != "stream"
    with fail_together(grid, UserError, OSError, patience=LONG if is_long else None):
        loader, data = open_loader(config, grid) if config.parallel.reads_data(grid.pp_rank) else (None, None)
    validation_samples = from_main(grid, lambda: {name: s.samples_per_epoch for name, s in data.validation.items()})
    checkpoint, damaged = newest_whole(run_dir / "checkpoints", grid)
    with fail_together(grid):
        if checkpoint:
            checkpoint.require_model(asdict(config.model))
            # Weights that were imported come without a place in the data.
            if loader and checkpoint.manifest["state"]["loader"] is not None:
                loader.load_state_dict(checkpoint.manifest["state"]["loader"])
    if grid.is_main:
        print(describe_data(data, training.steps * training.global_batch_size), flush=True)

    bytes_before = peak_memory(grid.device)
    engine = engine_of_run(config, grid, seed=None if checkpoint else training.seed)
    state = RunState(config, engine)
    if checkpoint:
        checkpoint.load_into(engine, verified=True)
        state.load(checkpoint)
    last_step = min(training.steps, training.stop_after or training.steps)
    # Before the run begins to leave its files: who sees them may want to stop it.
    with StopRequest() as stop:
        log, stop_signal, stalled = None, None, 0.0
        with fail_together(grid, UserError, OSError):
            watchdog = Watchdog(run_dir, grid, training.hang_timeout)
            if grid.is_main:
                write_atomic(run_dir / "config.yaml", dump(config).encode())
                log = RunLog(run_dir, config, grid, state.step, bytes_before)
        if log:
            log.started(checkpoint, damaged, is_over=state.step >= last_step)
        engine.timer.on_part = watchdog.moved
        saver = Saver(
            run_dir / "checkpoints",
            engine,
            keep=training.keep_checkpoints,
            keep_every=training.keep_every,
            background=training.background_save,
        )
        micro_batches = config.micro_batches(grid.world_size)

        def save() -> None:
            nonlocal stalled
            started = time.perf_counter()
            watchdog.mark(state.step, "checkpoint", SAVE_PATIENCE)
            position = loader and loader.state_dict()  # that of the main rank is written
            before = saver.save(
                step=state.step, model_config=asdict(config.model), state={"loader": position, **state.state_dict()}
            )
            if log:
                log.saved(before)
            stalled += time.perf_counter() - started

        def evaluate() -> None:
            watchdog.mark(state.step, "evaluation")
            sets, heads = evaluate_sets(config, grid, engine, data, validation_samples, watchdog.moved)
            if log and sets:
                log.evaluated(state.step, sets, heads)

        ending = closing(loader) if loader else nullcontext()
        set_timeouts(watchdog.longest)
        with log or nullcontext(), ending, dead_workers_told(), watchdog:
            while state.step < last_step and stop_signal is None:
                started = time.perf_counter()
                watchdog.mark(state.step, "data")
                batches = loader.next_step() if loader else [None] * micro_batches
                waited = time.perf_counter() - started
                watchdog.mark(state.step, "training")
                lr = learning_rate(state.step, training.steps, config.optimizer.lr, config.schedule)
                result = engine.train_step(batches, lr)
                own = waited + engine.timer.seconds("forward")["forward"]
                heads, of_ranks = reduce_step(result.sums, result.counts, result.correct, own, grid)
                parts = {"data": waited, **engine.timer.seconds()} | ({"checkpoint": stalled} if stalled else {})
                times = StepTimes(time.perf_counter() - started, parts, of_ranks)
                stalled = 0.0
                state.count(result.skipped)
                if log:
                    log.trained(state, heads, result, lr, times, loader.epochs)
                    log.saved(saver.finished())
                if state.guard.gives_up:
                    watchdog.mark(state.step, "rollback", SAVE_PATIENCE)
                    go_back(config, grid, engine, saver, state, log)
                    save()
                    continue
                stop_signal = stop.agreed(grid)
                at_end = state.step == last_step
                is_due = bool(training.eval_every) and state.step % training.eval_every == 0
                if at_end or is_due and not stop_signal:
                    evaluate()
                if training.checkpoint_every and state.step % training.checkpoint_every == 0 or at_end or stop_signal:
                    save()
            watchdog.mark(state.step, "checkpoint", SAVE_PATIENCE)
            saved = saver.wait()
            if log:
                log.saved(saved)
                log.stopped(state.step, stop_signal)
    set_timeouts(TIMEOUT)
    if saved and saved.error:
        raise RunFailure(
            f"the last checkpoint was not written: {saved.error}; mend that, and run the same command again"
        )
    if stop_signal and state.step < training.steps:
        if grid.is_main:
            name = signal.Signals(stop_signal).name
            print(f"stopped by {name} after step {state.step}, checkpoint saved; the same command goes on from here")
        return 128 + stop_signal
    return 0


def go_back(
    config: RunConfig, grid: ProcessGrid, engine: Engine, saver: Saver, state: RunState, log: RunLog | None
) -> None:
    """Weights, moments and step of the last whole checkpoint; the data stays where it is, behind what went wrong.

    Raises ``RunFailure`` where there is no checkpoint, or it has gone back to this one too often already.
    """
    saved = saver.wait()
    if log:
        log.saved(saved)
    checkpoint, damaged = newest_whole(Path(config.run_dir) / "checkpoints", grid)
    skipped = state.guard.skipped_in_a_row
    if checkpoint is None:
        raise RunFailure(
            f"{skipped} steps in a row were skipped before the first checkpoint; lower optimizer.lr, lengthen "
            "schedule.warmup_steps, or look at the data"
        )
    before = state.step
    checkpoint.load_into(engine, verified=True)
    state.go_back(checkpoint)
    if state.counters["rollbacks_to_this_step"] > config.guard.max_rollbacks:
        raise RunFailure(
            f"{skipped} steps in a row were skipped, and going back to step {state.step} has not helped "
            f"{config.guard.max_rollbacks} times; lower optimizer.lr, or look at the data"
        )
    if log:
        log.rolled_back(before, state.step, skipped, damaged)
