"""Two ranks against one: tokens/s by form of parallelism, the bytes that each sends, and what of that is exposed.

    python benchmarks/scaling.py     # about 15 minutes on 2 quiet cores and 16 GiB; --quick for a look

Every layout trains the same model on the same global batch, one thread a rank; one rank with two threads is the fair
opponent of two ranks. Each layout lives in processes of its own, and they take steps in turn, round by round. The
losses of all of them must agree, or the run ends.

Bytes are counted where every message passes, at the methods of ``torch.distributed.ProcessGroup`` below both
``torch.distributed`` and DeepSpeed, as what a ring sends of them, and compared with ``megamtp.planner.traffic``.
*Wire* is what the kernel says that the process has sent over TCP in the same step: the backend's own algorithms and
headers included.

Exposed: (with - without) / with, where *without* is the same step with each message replaced by a copy in local
memory (a receive repeats what was received last). The slowest rank counts; for a pipeline the difference is its
bubble and its transfers. The learning rate is 0, so that a step with such data changes no weight.
"""

import argparse
import json
import math
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from wire import Wire, tcp_bytes_sent

from megamtp.model.heads import HeadsConfig
from megamtp.model.transformer import ModelConfig
from megamtp.ops.choice import OpsConfig
from megamtp.parallel.groups import ParallelConfig


class Size(NamedTuple):
    """One training step: ``global_batch`` samples of ``seq_len`` tokens, ``micro_batch`` at a time."""

    model: dict[str, int]
    seq_len: int
    micro_batch: int
    global_batch: int


FULL = Size(
    dict(vocab_size=8192, dim=512, n_layers=8, n_heads=8, n_future_tokens=2), seq_len=512, micro_batch=1, global_batch=8
)
QUICK = Size(
    dict(vocab_size=1024, dim=128, n_layers=6, n_heads=4, n_future_tokens=2), seq_len=128, micro_batch=1, global_batch=8
)


class Layout(NamedTuple):
    parallel: ParallelConfig
    ranks: int = 2
    threads: int = 1


ONE, FAIR = "1 rank", "1 rank, 2 threads"
LAYOUTS = {
    ONE: Layout(ParallelConfig(zero_stage=0), ranks=1),
    FAIR: Layout(ParallelConfig(zero_stage=0), ranks=1, threads=2),
    "DP 2": Layout(ParallelConfig(zero_stage=0)),
    "DP 2, ZeRO-1": Layout(ParallelConfig(zero_stage=1)),
    "TP 2": Layout(ParallelConfig(tensor=2, sequence=False, zero_stage=0)),
    "TP 2, sequence": Layout(ParallelConfig(tensor=2, sequence=True, zero_stage=0)),
    "PP 2, 1f1b": Layout(ParallelConfig(pipeline=2, zero_stage=0)),
    "PP 2, dualpipev": Layout(ParallelConfig(pipeline=2, schedule="dualpipev", zero_stage=0)),
}


class Run:
    """One rank's engine and its micro-batches, which are the same in every step."""

    def __init__(
        self,
        size: Size,
        parallel: ParallelConfig,
        *,
        precision: str = "fp32",
        recompute: str = "none",
        documents: bool = False,
        heads: HeadsConfig | None = None,
    ):
        from megamtp.engine.build import build_engine
        from megamtp.engine.launch import start_processes
        from megamtp.engine.optimizer import OptimizerConfig
        from megamtp.planner.traffic import step_traffic

        config = ModelConfig(**size.model)
        grid = start_processes(parallel, config.kv_heads)
        heads = heads or HeadsConfig()
        heads = replace(heads, mode=heads.mode_under(parallel.zero_stage))
        micro_batches = size.global_batch // size.micro_batch // grid.dp_size
        step = dict(
            micro_batch_size=size.micro_batch, micro_batches=micro_batches, seq_len=size.seq_len, precision=precision
        )
        expected = step_traffic(
            config, heads, parallel, dp_size=grid.dp_size, recompute=recompute, documents=documents, **step
        )
        self.expected = expected[grid.pp_rank].total  # bytes that this rank sends in a step
        self.engine = build_engine(
            config,
            heads,
            OpsConfig(recompute=recompute),
            grid=grid,
            parallel=parallel,
            optimizer=OptimizerConfig(),
            seed=1,
            **step,
        )
        shape = size.global_batch, size.seq_len + config.n_future_tokens
        tokens = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
        first = grid.dp_rank * micro_batches * size.micro_batch
        mine = tokens[first : first + micro_batches * size.micro_batch].split(size.micro_batch)
        ids = torch.arange(size.seq_len).expand(size.micro_batch, -1) // 7 if documents else None
        self.batches = [
            {
                "tokens": part[:, : size.seq_len],
                "targets": torch.stack([part[:, k : k + size.seq_len] for k in range(1, config.n_future_tokens + 1)]),
                "positions": None,
                "document_ids": ids,
            }
            for part in mine
        ]

    def step(self) -> float:
        """Summed loss of this rank's heads."""
        return self.engine.train_step(self.batches, lr=0.0).sums.sum().item()


def worker(pipe, size: Size, layout: Layout, variables: dict[str, str]) -> None:
    """Answer "with" and "without" with (seconds, loss), "bytes" with (counted, control, formula, wire)."""
    os.environ.update(variables)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)  # DeepSpeed prints
    from megamtp.host_memory import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(layout.threads)
    run, wire = Run(size, layout.parallel), Wire()
    while (what := pipe.recv()) != "end":
        wire.local = what == "without"
        wire.messages.clear()
        before = tcp_bytes_sent() if what == "bytes" else 0
        started = time.perf_counter()
        loss = run.step()
        seconds = time.perf_counter() - started
        if what == "bytes":
            time.sleep(0.3)  # the last acknowledgements
            pipe.send((*wire.sent(), run.expected, tcp_bytes_sent() - before))
        else:
            pipe.send((seconds, loss))


def process_context():
    """One server imports torch and deepspeed once, and every rank is forked from it."""
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megamtp.engine.launch", "megamtp.host_memory", "deepspeed"])
    return context


class Ranks:
    """The processes of one layout; each runs ``target(pipe, size, layout, variables)``."""

    def __init__(self, context, size: Size, layout: Any, target: Callable = worker):
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        self._pipes, self._processes = [], []
        for rank in range(layout.ranks):
            variables = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=layout.ranks, MASTER_PORT=port)
            variables = {name: str(value) for name, value in variables.items()} | {"MASTER_ADDR": "127.0.0.1"}
            ours, theirs = context.Pipe()
            process = context.Process(target=target, args=(theirs, size, layout, variables), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def ask(self, what: str) -> list[tuple]:
        """The answers of all ranks."""
        for pipe in self._pipes:
            pipe.send(what)
        return [pipe.recv() for pipe in self._pipes]

    def step(self, what: str) -> tuple[float, float]:
        """(seconds of the slowest rank, loss)."""
        seconds, losses = zip(*self.ask(what), strict=True)
        return max(seconds), sum(losses)

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send("end")
        for process in self._processes:
            process.join(10)
            process.kill()


def measure(groups: dict[str, Ranks], rounds: int, warm_up: int = 2) -> dict[str, dict[str, list[float]]]:
    """Seconds per step with and without messages, round by round. ``RuntimeError`` where two layouts' losses differ."""
    times = {name: {"with": [], "without": []} for name in groups}
    for index in range(warm_up + rounds):
        losses = {}
        for name, ranks in groups.items():
            seconds, losses[name] = ranks.step("with")
            if index >= warm_up:
                times[name]["with"].append(seconds)
            if LAYOUTS[name].ranks > 1 and index >= warm_up - 1:
                seconds, _ = ranks.step("without")
                if index >= warm_up:
                    times[name]["without"].append(seconds)
        if any(not math.isclose(loss, losses[ONE], rel_tol=1e-5) for loss in losses.values()):
            raise RuntimeError(f"the layouts' losses differ: {losses}")
    return times


def summary(times: dict[str, dict[str, list[float]]], counted: dict[str, list[tuple]], tokens: int) -> dict[str, Any]:
    """Per layout; ratios are medians of paired rounds, bytes those of the rank that sends most."""
    result = {}
    for name, seconds in times.items():
        steps, alone = seconds["with"], seconds["without"]
        row = {
            "tokens_per_s": tokens / statistics.median(steps),
            "seconds": [statistics.median(steps), min(steps), max(steps)],
        }
        for opponent, key in ((ONE, "speedup"), (FAIR, "speedup_over_2_threads")):
            pairs = zip(times[opponent]["with"], steps, strict=True)
            row[key] = statistics.median(theirs / ours for theirs, ours in pairs)
        if alone:
            row["exposed"] = statistics.median((a - b) / a for a, b in zip(steps, alone, strict=True))
            payload, control, formula, wire = max(counted[name])
            row["bytes"] = dict(
                counted=payload,
                formula=formula,
                ratio=payload / formula,
                error=max(abs(rank[0] / rank[2] - 1) for rank in counted[name]),
                control=control,
                wire_over_counted=wire / payload,
            )
        result[name] = row
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each layout (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, 3 rounds; its times say nothing")
    parser.add_argument("--output", type=Path, help="also write the JSON here, e.g. benchmarks/results/scaling.json")
    options = parser.parse_args()
    size, rounds = (QUICK, 3) if options.quick else (FULL, options.rounds)

    context = process_context()
    groups = {name: Ranks(context, size, layout) for name, layout in LAYOUTS.items()}
    times = measure(groups, rounds)
    counted = {name: ranks.ask("bytes") for name, ranks in groups.items() if LAYOUTS[name].ranks > 1}
    for ranks in groups.values():
        ranks.close()

    tokens = size.global_batch * size.seq_len
    rows = summary(times, counted, tokens)
    print(f"{tokens} tokens a step, {size}, {rounds} rounds, torch {torch.__version__}")
    print(f"{'':18}{'tokens/s':>9}{'seconds':>8} [ least,   most]{'/ 1 rank':>10}{'/ 2 threads':>13}", end="")
    print(f"{'exposed':>9}{'MB sent a rank':>16}{'/ formula':>11}{'control':>9}{'wire / MB':>11}")
    for name, row in rows.items():
        median, least, most = row["seconds"]
        print(f"{name:18}{row['tokens_per_s']:9.0f}{median:8.3f} [{least:6.3f}, {most:6.3f}]", end="")
        print(f"{row['speedup']:10.2f}{row['speedup_over_2_threads']:13.2f}", end="")
        if sent := row.get("bytes"):
            print(f"{row['exposed']:9.1%}{sent['counted'] / 1e6:16.2f}{sent['ratio']:11.5f}", end="")
            print(f"{sent['control']:7.0f} B{sent['wire_over_counted']:11.3f}", end="")
        print()
    result = {
        "traffic_error_max": max(row["bytes"]["error"] for row in rows.values() if "bytes" in row),
        "best_speedup_over_2_threads": max(
            row["speedup_over_2_threads"] for name, row in rows.items() if LAYOUTS[name].ranks > 1
        ),
        "size": size._asdict(),
        "rounds": rounds,
        "layouts": rows,
    }
    report(result, options.output)


def report(result: dict[str, Any], output: Path | None) -> None:
    """Print the JSON line, and write it to ``output`` where there is one."""
    line = json.dumps(rounded(result))
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(line + "\n")
    print(line)


def rounded(value: Any) -> Any:
    """Nested plain values with 4 digits after the point."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
