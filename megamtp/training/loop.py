"""The training run, plain code from top to bottom: data, model, engine, resume, steps, evaluation, checkpoints."""

import math
import signal
import time
from contextlib import closing, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from megamtp.config import dump
from megamtp.data.datasets import ALL, Data, DataConfig, Share, describe_data, open_data
from megamtp.data.loader import Batch, Loader, dead_workers_told, validation_batches, validation_rounds
from megamtp.engine.build import build_engine
from megamtp.engine.engine import Engine, ModelInputs
from megamtp.errors import UserError
from megamtp.files import write_atomic
from megamtp.model.cost import train_flops_per_token
from megamtp.parallel.groups import ProcessGrid
from megamtp.training.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from megamtp.training.device import device_peak
from megamtp.training.faults import LONG, StopRequest, fail_together, from_main
from megamtp.training.metrics import HeadMetrics, MetricsWriter, peak_memory_gib, reduce_heads
from megamtp.training.run_config import RunConfig
from megamtp.training.schedule import learning_rate


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
    config: RunConfig, grid: ProcessGrid, engine: Engine, data: Data | None, validation_samples: dict[str, int]
) -> tuple[dict[str, HeadMetrics], HeadMetrics]:
    """Metrics of each validation set and of all together. Every rank calls it; those without ``data`` read nothing.

    ``validation_samples``: how many samples each set has.
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
        sums = engine.evaluate(batches)
        sets[name] = reduce_heads(*sums, grid)
        totals += torch.stack([x.double() for x in sums])
    return sets, reduce_heads(*totals, grid)


def train(config: RunConfig, grid: ProcessGrid) -> int:
    """Run or resume ``config`` to its end. Returns 0, or 128 + the signal that asked for a stop after a save.

    Every rank calls it. Raises ``UserError`` for input that does not fit, before anything is computed.
    """
    run_dir, training = Path(config.run_dir), config.training
    # A rank that is still on its way must not lose its neighbours; checksums and packing may take it hours.
    is_long = config.data.verify == "checksum" or config.data.packing != "stream"
    with fail_together(grid, UserError, OSError, patience=LONG if is_long else None):
        loader, data = open_loader(config, grid) if config.parallel.reads_data(grid.pp_rank) else (None, None)
    validation_samples = from_main(grid, lambda: {name: s.samples_per_epoch for name, s in data.validation.items()})
    latest = from_main(grid, lambda: latest_checkpoint(run_dir / "checkpoints"))
    with fail_together(grid):
        checkpoint = Checkpoint.open(latest) if latest else None
        if checkpoint:
            checkpoint.require_model(asdict(config.model))
            # Weights that were imported come without a place in the data.
            if loader and checkpoint.manifest["state"]["loader"] is not None:
                loader.load_state_dict(checkpoint.manifest["state"]["loader"])
    if grid.is_main:
        print(describe_data(data, training.steps * training.global_batch_size), flush=True)

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
    micro_batches = config.micro_batches(grid.world_size)
    tokens_per_step = training.global_batch_size * config.data.seq_len
    flops_per_step = tokens_per_step * train_flops_per_token(config.model, config.data.seq_len)
    peak = device_peak(config, grid.device)

    def save() -> None:
        state = {"loader": loader and loader.state_dict(), "counters": counters}  # that of the main rank is written
        save_checkpoint(
            run_dir / "checkpoints",
            engine,
            step=step,
            model_config=asdict(config.model),
            state=state,
            keep=training.keep_checkpoints,
        )

    def evaluate() -> None:
        sets, heads = evaluate_sets(config, grid, engine, data, validation_samples)
        if metrics and sets:
            of_sets = {name: of_set._asdict() for name, of_set in sets.items()}
            metrics.write(
                {
                    "step": step,
                    "validation_loss_per_head": heads.losses,
                    "validation_accuracy_per_head": heads.accuracies,
                    "validation_targets": heads.targets,
                    **({"validation_sets": of_sets} if len(sets) > 1 else {}),
                }
            )
            bar.write(f"step {step}: validation loss per head {_numbers(heads.losses)}")
            for name, of_set in sets.items() if len(sets) > 1 else ():
                bar.write(f"  {name}: {_numbers(of_set.losses)}")

    bar = tqdm(total=training.steps, initial=step, unit="step", disable=not grid.is_main, dynamic_ncols=True)
    stop_signal = None
    ending = closing(loader) if loader else nullcontext()
    with StopRequest() as stop, bar, ending, dead_workers_told():
        while step < last_step and stop_signal is None:
            started = time.perf_counter()
            batches = loader.next_step() if loader else [None] * micro_batches
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
                        "mfu": tflops / (peak * grid.world_size) if peak else None,
                        "memory_gib": peak_memory_gib(grid.device),
                        "epoch": max(loader.epochs.values()),
                        **({"epoch_per_source": loader.epochs} if len(loader.epochs) > 1 else {}),
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
