"""One training step here against the straightforward one, time and memory, on this machine's CPU.

    python benchmarks/train_step.py            # about 25 minutes; --quick for a look

The straightforward step: the same blocks from ``transformers``, whole logits, n times ``F.cross_entropy``, one
backward pass. It runs twice: ``user`` as somebody would write it (torch's default AdamW, default malloc) and
``tuned`` with the fused AdamW and the allocator settings that ``pretrain.py`` makes. Each side lives in a process of
its own and they take steps in turn, so that whatever else the machine does hits all of them.

Memory: peak resident size of a process, less its size after the imports, less weights, gradients, optimizer states.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

DIM, LAYERS, HEADS, VOCAB, SEQ, MICRO_BATCH = 512, 8, 8, 32_000, 512, 4
THREADS = 2


class Ours:
    """Our engine, as ``pretrain.py`` runs it on one CPU process."""

    mode = "sequential"

    def __init__(self, n: int, layers: int, dtype: str, micro_batch: int, tuned: bool):
        from megamtp.engine.engine import Engine
        from megamtp.engine.launch import start_processes
        from megamtp.engine.optimizer import OptimizerConfig
        from megamtp.model.heads import HeadsConfig
        from megamtp.model.model import build_model
        from megamtp.model.transformer import ModelConfig
        from megamtp.parallel.groups import ParallelConfig

        self.config = ModelConfig(vocab_size=VOCAB, dim=DIM, n_layers=layers, n_heads=HEADS, n_future_tokens=n)
        self.engine = Engine(
            build_model(self.config, HeadsConfig(mode=self.mode), seed=1),
            grid=start_processes(),
            parallel=ParallelConfig(zero_stage=0 if dtype == "fp32" else 1),
            optimizer=OptimizerConfig(),
            precision=dtype,
            micro_batch_size=micro_batch,
            micro_batches=1,
        )

    def step(self, tokens, targets) -> float:
        inputs = {"tokens": tokens, "targets": targets, "positions": None, "document_ids": None}
        result = self.engine.train_step([inputs], lr=3e-4)
        return float((result.sums / result.counts).sum())

    @staticmethod
    def state_bytes(count: int, dtype: str) -> int:
        # bf16: weights and their gradients in 2 bytes, masters, accumulated gradients and two moments in 4.
        return (16 if dtype == "fp32" else 20) * count


class OursJoint(Ours):
    mode = "joint"


class OursNaive(Ours):
    mode = "naive"


class Straightforward:
    """The same model from ``transformers``' blocks, trained the way a first version of such a script does it."""

    def __init__(self, n: int, layers: int, dtype: str, micro_batch: int, tuned: bool):
        import torch
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=DIM,
            intermediate_size=-(-(8 * DIM // 3) // 256) * 256,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            attn_implementation="sdpa",
        )
        torch.manual_seed(1)
        self.n, self.autocast = n, dtype == "bf16"
        self.embed = torch.nn.Embedding(VOCAB, DIM)
        self.trunk = torch.nn.ModuleList(LlamaDecoderLayer(config, i) for i in range(layers - n))
        self.heads = torch.nn.ModuleList(LlamaDecoderLayer(config, layers - n + k) for k in range(n))
        self.norm = LlamaRMSNorm(DIM, eps=config.rms_norm_eps)
        self.output = torch.nn.Linear(DIM, VOCAB, bias=False)
        self.rotary = LlamaRotaryEmbedding(config)
        modules = [self.embed, self.trunk, self.heads, self.norm, self.output]
        for parameter in (p for module in modules for p in module.parameters() if p.ndim > 1):
            torch.nn.init.normal_(parameter, std=0.02)
        self.parameters = [p for module in modules for p in module.parameters()]
        fused = {"fused": True} if tuned else {}
        self.optimizer = torch.optim.AdamW(self.parameters, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, **fused)

    def step(self, tokens, targets) -> float:
        import torch
        from torch.nn import functional as F

        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            h = self.embed(tokens)
            table = self.rotary(h, torch.arange(tokens.shape[1])[None])
            for layer in self.trunk:
                h = layer(h, position_embeddings=table)
            loss = sum(
                F.cross_entropy(
                    self.output(self.norm(head(h, position_embeddings=table))).flatten(0, 1), targets[k].flatten()
                )
                for k, head in enumerate(self.heads)
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    @staticmethod
    def state_bytes(count: int, dtype: str) -> int:
        return 16 * count  # autocast keeps weights, gradients and moments in fp32


def worker(options: argparse.Namespace) -> None:
    """Answer each line on stdin with one step: a JSON line of seconds and loss; at the end, memory."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401 - both sides start from the same imports

    if options.allocator == "kept":
        from megamtp.host_memory import keep_freed_memory

        keep_freed_memory()
    if options.side.startswith("ours"):
        import deepspeed  # noqa: F401
    torch.set_num_threads(THREADS)
    level = _resident("VmRSS")
    side = {
        "ours": Ours,
        "ours-joint": OursJoint,
        "ours-naive": OursNaive,
        "straightforward": Straightforward,
    }[options.side]
    runner = side(options.n, options.layers, options.dtype, options.micro_batch, options.allocator == "kept")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (options.micro_batch, SEQ + options.n), generator=generator)
    targets = torch.stack([tokens[:, k : k + SEQ] for k in range(1, options.n + 1)])
    for line in sys.stdin:
        if line.strip() == "memory":
            count = _parameter_count(options.n, options.layers)
            activations = _resident("VmHWM") - level - side.state_bytes(count, options.dtype)
            print(json.dumps({"activation_bytes": activations}), flush=True)
            continue
        started = time.perf_counter()
        loss = runner.step(tokens[:, :SEQ], targets)
        print(json.dumps({"seconds": time.perf_counter() - started, "loss": loss}), flush=True)


def _parameter_count(n: int, layers: int) -> int:
    from megamtp.model.cost import parameters
    from megamtp.model.transformer import ModelConfig

    return parameters(ModelConfig(vocab_size=VOCAB, dim=DIM, n_layers=layers, n_heads=HEADS, n_future_tokens=n)).total


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


class Process:
    """A worker, driven over its pipes."""

    def __init__(
        self, side: str, n: int, dtype: str, allocator: str, layers: int = LAYERS, micro_batch: int = MICRO_BATCH
    ):
        arguments = [side, str(n), dtype, allocator, str(layers), str(micro_batch)]
        environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "DS_ACCELERATOR": "cpu"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def ask(self, what: str) -> dict:
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:  # libraries print lines of their own
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"worker ended with exit code {self._process.wait()}: {self._process.args}")

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def measure_times(group: dict[str, Process], rounds: int) -> dict[str, list[float]]:
    """Seconds per step of each process, the processes taking turns; two warm-up rounds are not counted."""
    times: dict[str, list[float]] = {name: [] for name in group}
    for index in range(rounds + 2):
        for name, process in group.items():
            seconds = process.ask("step")["seconds"]
            if index >= 2:
                times[name].append(seconds)
    for process in group.values():
        process.close()
    return times


def measure_memory(steps: int = 3, **process) -> int:
    """Peak bytes of activations and loss in a process of its own."""
    worker = Process(**process)
    for _ in range(steps):
        worker.ask("step")
    result = worker.ask("memory")["activation_bytes"]
    worker.close()
    return result


def gemm_ceiling(dtype: str) -> float:
    """Best median GFLOP/s over some matrix products of the model's and of favourable shapes."""
    import torch

    torch.set_num_threads(THREADS)
    best = 0.0
    shapes = [
        (2048, 512, 1536),
        (2048, 1536, 512),
        (2048, 512, 32000),
        (2048, 32000, 512),
        (2048, 2048, 2048),
        (4096, 4096, 4096),
    ]
    for m, k, n in shapes:
        a, b = torch.randn(m, k), torch.randn(n, k)
        if dtype == "bf16":
            a, b = a.bfloat16(), b.bfloat16()
        out = torch.empty(m, n, dtype=a.dtype)
        seconds = []
        for _ in range(7):
            started = time.perf_counter()
            torch.mm(a, b.t(), out=out)
            seconds.append(time.perf_counter() - started)
        best = max(best, 2 * m * k * n / statistics.median(seconds) / 1e9)
    return best


def spread(times: list[float]) -> str:
    return f"{statistics.median(times):6.2f} s [{min(times):.2f}, {max(times):.2f}]"


def step_flops(n: int) -> float:
    from megamtp.model.cost import train_flops_per_token
    from megamtp.model.transformer import ModelConfig

    config = ModelConfig(vocab_size=VOCAB, dim=DIM, n_layers=LAYERS, n_heads=HEADS, n_future_tokens=n)
    return train_flops_per_token(config, SEQ) * SEQ * MICRO_BATCH


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each side (default: %(default)s)")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--quick", action="store_true", help="3 rounds, n = 1 and 4 only")
    parser.add_argument("--worker", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        side, n, dtype, allocator, layers, micro_batch = options.worker
        return worker(
            argparse.Namespace(
                side=side, n=int(n), dtype=dtype, allocator=allocator, layers=int(layers), micro_batch=int(micro_batch)
            )
        )
    rounds, sizes = (3, (1, 4)) if options.quick else (options.rounds, (1, 2, 4))
    results = {dtype: measure(dtype, rounds, sizes) for dtype in options.dtypes}
    # The worse dtype stands for the claim; the figures of each are beside it.
    summary = {
        key: (min if key in ("speed_ratio_n4", "speed_ratio_n4_tuned", "gemm_share_n4") else max)(
            result[key] for result in results.values()
        )
        for key in next(iter(results.values()))
    }
    print(json.dumps({key: round(value, 3) for key, value in summary.items()} | {"by_dtype": results}))


def measure(dtype: str, rounds: int, sizes: tuple[int, ...]) -> dict[str, float]:
    ceiling = gemm_ceiling(dtype)
    print(f"\n{dtype}: GEMM ceiling {ceiling:.0f} GFLOP/s; {SEQ * MICRO_BATCH} tokens a step, {THREADS} threads")
    ratios: dict[str, float] = {}
    for n in sizes:
        group = {
            "ours": Process("ours", n, dtype, "kept"),
            "user": Process("straightforward", n, dtype, "default"),
            "tuned": Process("straightforward", n, dtype, "kept"),
        }
        if n == 4:
            group["ours n=1"] = Process("ours", 1, dtype, "kept")
        times = measure_times(group, rounds)
        for name, seconds in times.items():
            flops = step_flops(1 if name == "ours n=1" else n)
            rate = flops / statistics.median(seconds) / 1e9
            tokens = SEQ * MICRO_BATCH / statistics.median(seconds)
            print(f"  n={n} {name:9} {spread(seconds)}  {tokens:6.0f} tokens/s  {rate:4.0f} GFLOP/s", flush=True)
        # Paired by round: neighbours in time share the machine's mood.
        for name in ("user", "tuned"):
            key = f"speed_ratio_n{n}" + ("_tuned" if name == "tuned" else "")
            ratios[key] = statistics.median(b / a for a, b in zip(times["ours"], times[name], strict=True))
            print(f"  n={n} {key}: {ratios[key]:.3f}")
        if n == 4:
            slower = statistics.median(a / b for a, b in zip(times["ours"], times["ours n=1"], strict=True))
            ratios["time_over_flops_n4"] = slower / (step_flops(4) / step_flops(1))
            ratios["gemm_share_n4"] = step_flops(4) / statistics.median(times["ours"]) / 1e9 / ceiling
    for micro_batch in (MICRO_BATCH, 2 * MICRO_BATCH):
        ours = measure_memory(side="ours", n=4, dtype=dtype, allocator="kept", micro_batch=micro_batch)
        user = measure_memory(side="straightforward", n=4, dtype=dtype, allocator="default", micro_batch=micro_batch)
        ratios["memory_ratio_n4"] = max(ours / user, ratios.get("memory_ratio_n4", 0))
        print(f"  n=4 micro-batch {micro_batch}: activations {ours / 2**30:.2f} GiB, the other {user / 2**30:.2f} GiB")
    # 16 samples: more than 1 GiB on each side of the comparison.
    by_n = {
        n: measure_memory(side="ours", n=n, dtype=dtype, allocator="kept", layers=4 + n, micro_batch=16) for n in (2, 8)
    }
    ratios["memory_growth_n8_n2"] = by_n[8] / by_n[2]
    print("  4 trunk layers + n heads: " + ", ".join(f"n={n} {size / 2**30:.2f} GiB" for n, size in by_n.items()))
    print("  " + ", ".join(f"{key} {value:.3f}" for key, value in ratios.items()), flush=True)
    return ratios


if __name__ == "__main__":
    main()
