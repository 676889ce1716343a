"""The planner's seconds against measured ones: training steps of one rank and one thread, on this machine's CPU.

    python benchmarks/plan.py     # about 2 minutes on a quiet core

The planner is given the CPU as a device whose figures are measured in the same run, between the steps: FLOP/s of
products of the model's shapes, FLOP/s of fused causal attention, bytes/s of adding two tensors that no cache holds.
All shares are 1 then, and what is left is what the time model counts and what it does not. It says nothing of GPUs,
messages or schedules.

Seconds are the process's CPU time: one thread that never waits, so that a machine's other work hardly counts.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from scaling import Ranks, Run, Size, process_context, report
from torch.nn import functional as F

from megamtp.config import from_dict
from megamtp.parallel.groups import ParallelConfig
from megamtp.planner.devices import Assumptions, Device
from megamtp.planner.estimate import estimate_on
from megamtp.training.run_config import RunConfig

BASE = dict(vocab_size=4096, dim=384, n_layers=6, n_heads=6, n_future_tokens=1)
SEQ_LEN, MICRO_BATCH, GLOBAL_BATCH = 256, 1, 2


class Case(NamedTuple):
    model: dict[str, int] = {}
    recompute: str = "none"
    seq_len: int = SEQ_LEN
    precision: str = "fp32"
    ranks: int = 1  # what ``Ranks`` asks


CASES = {
    "n = 1": Case(),
    "n = 4": Case({"n_future_tokens": 4}),
    "n = 4, vocabulary 16k": Case({"n_future_tokens": 4, "vocab_size": 16_384}),
    "n = 4, full recompute": Case({"n_future_tokens": 4}, recompute="full"),
    "n = 4, selective": Case({"n_future_tokens": 4}, recompute="selective"),
    "n = 4, 1024 tokens": Case({"n_future_tokens": 4}, seq_len=1024),
    "n = 4, 192 wide": Case({"n_future_tokens": 4, "dim": 192}),
}


def config_of(case: Case) -> RunConfig:
    values = {
        "run_dir": "run",
        "model": BASE | case.model,
        "ops": {"recompute": case.recompute},
        "data": {"train": "data", "seq_len": case.seq_len},
        "parallel": {"zero_stage": 0},
        "training": {
            "steps": 1,
            "global_batch_size": GLOBAL_BATCH,
            "micro_batch_size": MICRO_BATCH,
            "precision": case.precision,
        },
    }
    return from_dict(RunConfig, values, "benchmark")


def cpu_seconds(run: Callable) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


class Figures:
    """What this CPU does in a second, in the shapes of a case."""

    def __init__(self, config: RunConfig):
        model, tokens = config.model, config.data.seq_len * MICRO_BATCH
        self.x, self.w = torch.randn(tokens, model.dim), torch.randn(model.hidden_dim, model.dim)
        shape = MICRO_BATCH, model.n_heads, config.data.seq_len, model.head_dim
        self.q, self.k, self.v = (torch.randn(shape) for _ in range(3))
        self.large, self.other = (torch.randn(32 << 20) for _ in range(2))

    def measure(self) -> tuple[float, float, float]:
        """(TFLOP/s of products, TFLOP/s of attention, GB/s)."""
        products = 2 * self.x.numel() * self.w.shape[0] / cpu_seconds(lambda: F.linear(self.x, self.w))
        b, h, s, hd = self.q.shape
        flops = 4 * b * h * hd * s * (s + 1) / 2
        attention = flops / cpu_seconds(lambda: F.scaled_dot_product_attention(self.q, self.k, self.v, is_causal=True))
        moved = 3 * 4 * self.large.numel() / cpu_seconds(lambda: torch.add(self.large, self.other, out=self.large))
        return products / 1e12, attention / 1e12, moved / 1e9


def worker(pipe, size: Size, case: Case, variables: dict[str, str]) -> None:
    """Answer each question with (seconds of a step, figures)."""
    os.environ.update(variables)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)  # DeepSpeed prints
    from megamtp.host_memory import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(1)
    run = Run(size, ParallelConfig(zero_stage=0), precision=case.precision, recompute=case.recompute)
    figures = Figures(config_of(case))
    while pipe.recv() != "end":
        pipe.send((cpu_seconds(run.step), figures.measure()))


def estimated(case: Case, figures: tuple[float, float, float]) -> dict[str, float]:
    """Seconds by part."""
    products, attention, bandwidth = figures
    device = Device(1000, products, products, bandwidth, is_gpu=False)
    shares = Assumptions(matmul_share=1, attention_share=attention / products, memory_share=1, network_share=1)
    return vars(estimate_on(config_of(case), 1, device, shares).step.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each case (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    context, groups = process_context(), {}
    for name, case in CASES.items():
        size = Size(BASE | case.model, case.seq_len, MICRO_BATCH, GLOBAL_BATCH)
        groups[name] = Ranks(context, size, case, worker)
    answers = {name: [] for name in CASES}
    for index in range(options.rounds + 2):
        for name, ranks in groups.items():
            (answer,) = ranks.ask("step")
            if index >= 2:
                answers[name].append(answer)
    for ranks in groups.values():
        ranks.close()

    rows = {}
    print(f"{'seconds of a step':24}{'measured':>9} [ least,   most]{'estimated':>10}{'/ measured':>11}", end="")
    print(f"{'products':>10}{'attention':>10}{'memory':>8}{'TFLOP/s':>9}{'GB/s':>6}")
    for name, each in answers.items():
        seconds = [answer[0] for answer in each]
        figures = tuple(statistics.median(answer[1][i] for answer in each) for i in range(3))
        parts, measured = estimated(CASES[name], figures), statistics.median(seconds)
        total = sum(parts.values())
        rows[name] = {
            "seconds": [measured, min(seconds), max(seconds)],
            "estimated": total,
            "estimated_over_measured": total / measured,
            "parts": parts,
            "tflops": figures[0],
            "attention_tflops": figures[1],
            "bandwidth_gbs": figures[2],
        }
        print(f"{name:24}{measured:9.3f} [{min(seconds):6.3f}, {max(seconds):6.3f}]{total:10.3f}", end="")
        print(
            f"{total / measured:11.2f}{parts['matmul']:10.3f}{parts['attention']:10.3f}{parts['memory']:8.3f}", end=""
        )
        print(f"{figures[0]:9.4f}{figures[2]:6.1f}")
    ratios = [row["estimated_over_measured"] for row in rows.values()]
    report({"lowest": min(ratios), "highest": max(ratios), "rounds": options.rounds, "cases": rows}, options.output)


if __name__ == "__main__":
    main()
