"""The training run, plain code from top to bottom: data, model, engine, resume, steps, evaluation, checkpoints."""

import math
import signal
import time
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from megamtp.config import dump
from megamtp.data.indexed_dataset import IndexedDataset
from megamtp.data.loader import Batch, DataConfig, Loader, validation_batches
from megamtp.data.samples import Samples
from megamtp.engine.build import build_engine
from megamtp.engine.engine import Engine, ModelInputs
from megamtp.errors import UserError
from megamtp.files import write_atomic
from megamtp.model.cost import train_flops_per_token
from megamtp.parallel.groups import ProcessGrid
from megamtp.training.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from megamtp.training.faults import StopRequest, fail_together, from_main
from megamtp.training.metrics import MetricsWriter, peak_memory_gib, peak_tflops, reduce_heads
from megamtp.training.run_config import RunConfig
from megamtp.training.schedule import learning_rate


def open_samples(config: RunConfig) -> tuple[Samples, Samples | None]:
    """Training samples, shuffled, and validation samples, in order. ``UserError`` for data that does not fit."""
    n, data = config.model.n_future_tokens, config.data
    train = IndexedDataset(data.train)
    validation = IndexedDataset(data.validation) if data.validation else None
    for dataset in filter(None, (train, validation)):
        largest = dataset.max_token()
        if largest >= config.model.vocab_size:
            raise UserError(
                f"{dataset.prefix}: holds token {largest}, but model.vocab_size is {config.model.vocab_size}; "
                "use the tokenizer's vocabulary size"
            )
    return (
        Samples(train, data.seq_len, n, config.training.seed),
        Samples(validation, data.seq_len, n, config.training.seed, shuffle=False) if validation else None,
    )


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


def train(config: RunConfig, grid: ProcessGrid) -> int:
    """Run or resume ``config`` to its end. Returns 0, or 128 + the signal that asked for a stop after a save.

    Every rank calls it. Raises ``UserError`` for input that does not fit, before anything is computed.
    """
    run_dir, training = Path(config.run_dir), config.training
    with fail_together(grid):  # a rank that is still on its way must not lose its neighbours
        train_samples, validation_samples = open_samples(config)
        loader = Loader(
            train_samples, training.global_batch_size, training.micro_batch_size, grid.dp_rank, grid.dp_size
        )
    latest = from_main(grid, lambda: latest_checkpoint(run_dir / "checkpoints"))
    with fail_together(grid):
        checkpoint = Checkpoint.open(latest) if latest else None
        if checkpoint:
            checkpoint.require_model(asdict(config.model))
            loader.load_state_dict(checkpoint.manifest["state"]["loader"])

    engine = engine_of_run(config, grid, seed=None if checkpoint else training.seed)
    step, counters = 0, {"tokens": 0, "skipped_steps": 0}
    if checkpoint:
        checkpoint.load_into(engine)
        step, counters = checkpoint.manifest["step"], checkpoint.manifest["state"]["counters"]

    metrics = None
    with fail_together(grid, UserError, OSError):
        if grid.is_main:
            write_atomic(run_dir / "config.yaml", dump(config).encode())
            metrics = MetricsWriter(run_dir, step)
    if grid.is_main and checkpoint:
        print(f"going on from {checkpoint.path} (step {step} of {training.steps})", flush=True)
    last_step = min(training.steps, training.stop_after or training.steps)
    tokens_per_step = training.global_batch_size * config.data.seq_len
    flops_per_step = tokens_per_step * train_flops_per_token(config.model, config.data.seq_len)
    device_peak = training.peak_tflops or peak_tflops(grid.device)

    def save() -> None:
        state = {"loader": loader.state_dict(), "counters": counters}
        save_checkpoint(
            run_dir / "checkpoints",
            engine,
            step=step,
            model_config=asdict(config.model),
            state=state,
            keep=training.keep_checkpoints,
        )

    def evaluate() -> None:
        if validation_samples is None:
            return
        batches = validation_batches(
            validation_samples, training.micro_batch_size, grid.dp_rank, grid.dp_size, training.eval_samples
        )
        heads = reduce_heads(*engine.evaluate(model_inputs(batch, config.data) for batch in batches), grid)
        if metrics:
            metrics.write(
                {
                    "step": step,
                    "validation_loss_per_head": heads.losses,
                    "validation_accuracy_per_head": heads.accuracies,
                    "validation_targets": heads.targets,
                }
            )
            bar.write(f"step {step}: validation loss per head {_numbers(heads.losses)}")

    bar = tqdm(total=training.steps, initial=step, unit="step", disable=not grid.is_main, dynamic_ncols=True)
    stop_signal = None
    with StopRequest() as stop, bar:
        while step < last_step and stop_signal is None:
            started = time.perf_counter()
            batches = [model_inputs(batch, config.data) for batch in loader.next_step()]
            lr = learning_rate(step, training.steps, config.optimizer.lr, config.schedule)
            result = engine.train_step(batches, lr)
            heads = reduce_heads(result.sums, result.counts, result.correct, grid)
            seconds = time.perf_counter() - started
            step += 1
            counters["tokens"] += tokens_per_step
            counters["skipped_steps"] += result.skipped
            weights = config.heads.loss_weights or [1.0] * len(heads.losses)
            loss = sum(weight * head for weight, head in zip(weights, heads.losses, strict=True))
            if metrics:
                tflops = flops_per_step / seconds / 1e12
                metrics.write(
                    {
                        "step": step,
                        "tokens": counters["tokens"],
                        "loss": loss,
                        "loss_per_head": heads.losses,
                        "accuracy_per_head": heads.accuracies,
                        "lr": lr,
                        "grad_norm": result.grad_norm,
                        "skipped_steps": counters["skipped_steps"],
                        "tokens_per_s": tokens_per_step / seconds,
                        "tflops": tflops,
                        "mfu": tflops / (device_peak * grid.world_size) if device_peak else None,
                        "memory_gib": peak_memory_gib(grid.device),
                        "epoch": loader.epoch,
                    }
                )
                bar.set_postfix_str(f"loss {_numbers(heads.losses)}, {tokens_per_step / seconds:,.0f} tokens/s")
                if result.skipped:
                    bar.write(f"step {step}: gradient norm {result.grad_norm}: step skipped on all ranks")
            bar.update()
            stop_signal = stop.agreed(grid)
            at_end = step == last_step
            is_due = bool(training.eval_every) and step % training.eval_every == 0
            if at_end or is_due and not stop_signal:
                evaluate()
            if training.checkpoint_every and step % training.checkpoint_every == 0 or at_end or stop_signal:
                save()
    if metrics:
        metrics.close()
    if stop_signal and step < training.steps:
        if grid.is_main:
            name = signal.Signals(stop_signal).name
            print(f"stopped by {name} after step {step}, checkpoint saved; the same command goes on from here")
        return 128 + stop_signal
    return 0


def _numbers(values: list[float]) -> str:
    return " ".join("  -  " if math.isnan(value) else f"{value:.3f}" for value in values)
