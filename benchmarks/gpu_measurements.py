"""The measurements of ``gpu.py``, by name. Times are medians of runs between which the device is waited for."""

import inspect
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from gpu_timing import Timing, spread

from megamtp.engine.build import build_engine
from megamtp.engine.launch import start_processes
from megamtp.engine.optimizer import OptimizerConfig
from megamtp.inference.decoder import Decoder
from megamtp.inference.graphs import GraphedDecoder
from megamtp.inference.sampling import Sampling
from megamtp.inference.speculative import SpeculativeDecoder
from megamtp.inference.tree import Tree
from megamtp.model.cost import train_flops_per_token
from megamtp.model.heads import HeadsConfig
from megamtp.model.model import build_model, logical_parameters
from megamtp.model.transformer import ModelConfig, block_inputs
from megamtp.ops.choice import OpsConfig, Use, choose, runnable, this_machine
from megamtp.ops.comparison import Comparison, Shape, comparisons, forward_and_backward
from megamtp.ops.cross_entropy import chunk_for_memory, linear_cross_entropy_with_grads
from megamtp.parallel.groups import ParallelConfig
from megamtp.planner.memory import estimate_memory
from megamtp.training.device import known_tflops

Result = dict[str, Any]
MICRO_BATCHES = 4  # a step; a real one has hundreds, which hide the update


@dataclass(frozen=True)
class Size:
    """A row of the paper's table, and how it is measured."""

    dim: int
    n_layers: int
    n_heads: int
    micro_batch: int
    heads: tuple[int, ...] = (1, 4)  # n


SIZES = {
    "0.3b": Size(1024, 18, 16, 8),
    "1.3b": Size(2048, 24, 16, 4, heads=(1, 2, 4, 8)),
    "3b": Size(2560, 36, 20, 2),
    "6.7b": Size(4096, 32, 32, 1),
}
TINY = {"0.3b": Size(32, 8, 2, 2), "1.3b": Size(48, 12, 2, 1, heads=(1, 2, 4, 8)), "3b": Size(64, 8, 2, 1)}


class Bench(Timing):
    """``measurements``: name -> function. What has been measured before is in ``results``."""

    def __init__(self, device: torch.device, tiny: bool, results: dict[str, Result]):
        super().__init__(device, rounds=3 if tiny else 10)
        self.tiny, self.results = tiny, results
        self.vocab, self.seq_len = (300, 64) if tiny else (32_000, 4096)
        self.sizes = TINY if tiny else SIZES
        self.machine = this_machine(device)
        self.use = Use(half=True, documents=False, split_vocabulary=False)
        self._grid = None
        self.measurements: dict[str, Callable[[], Result]] = {"ceilings gemm": self.gemm, "ceilings copy": self.copy}
        for operation, backend in runnable(OpsConfig(), self.machine, replace(self.use, documents=True)):
            if operation != "adamw":
                self.measurements[f"kernels {operation} {backend}"] = partial(self.kernel, operation, backend)
        self.measurements["loss cross-entropy"] = self.cross_entropy
        for name, size in self.sizes.items():
            for n in size.heads:
                for mode in ("sequential", "joint") if n > 1 else ("sequential",):
                    self.measurements[f"train {name} n{n} {mode}"] = partial(self.train, name, n, mode)
        self.measurements["train 1.3b n4 sequential, not compiled"] = partial(self.train, "1.3b", 4, compile=False)
        for mode in ("sequential", "joint", "naive"):
            self.measurements[f"heads {mode}"] = partial(self.heads, mode)
        for precision in ("fp32", "bf16"):
            self.measurements[f"precision {precision}"] = partial(self.loss_curve, precision)
        self.measurements["decode plain"] = partial(self.decode, Decoder)
        if device.type == "cuda":
            self.measurements["decode graphs"] = partial(self.decode, GraphedDecoder)
            if find_spec("megatron"):
                self.measurements["train 1.3b n4 megatron-core"] = self.megatron

    # --- ceilings

    def gemm(self) -> Result:
        n = 256 if self.tiny else 8192
        a, b = torch.randn(2, n, n, device=self.device, dtype=torch.bfloat16)
        seconds = self.time(lambda: a @ b)
        return {"tflops": 2 * n**3 / statistics.median(seconds) / 1e12, "spread_s": spread(seconds)}

    def copy(self) -> Result:
        a = torch.zeros(2**20 if self.tiny else 2**30, dtype=torch.uint8, device=self.device)
        b = torch.empty_like(a)
        seconds = self.time(lambda: b.copy_(a))
        return {"gb_per_s": 2 * a.numel() / statistics.median(seconds) / 1e9, "spread_s": spread(seconds)}

    # --- kernels

    def kernel(self, operation: str, backend: str) -> Result:
        """Error, and forward with backward against the portable backend, by turns."""
        size = self.sizes["1.3b"]
        head_dim = size.dim // size.n_heads
        shape = Shape(
            1, self.seq_len, size.n_heads, size.n_heads, head_dim, self.model("1.3b", 1).hidden_dim, self.vocab
        )
        result: Result = {}
        fast = self._parts(OpsConfig(**{operation: backend}), shape, operation)
        portable = self._parts(OpsConfig(), shape, operation)
        for ours, theirs in zip(fast, portable, strict=True):
            upstream = torch.randn_like(ours.fast(*ours.inputs))
            ours_s, theirs_s = [], []
            for _ in range(self.rounds):
                for side, seconds in ((ours, ours_s), (theirs, theirs_s)):
                    seconds += self.time(partial(forward_and_backward, side.fast, side.inputs, upstream), 1)
            ratio = statistics.median(a / b for a, b in zip(ours_s, theirs_s, strict=True))
            times = {"ms": 1e3 * statistics.median(ours_s), "over_portable": ratio}
            result |= {f"{ours.part} {key}": value for key, value in ({"error": ours.error()} | times).items()}
            self.free()
        return result

    def _parts(self, ops: OpsConfig, shape: Shape, operation: str) -> list[Comparison]:
        found = comparisons(ops, shape, torch.bfloat16, self.device)
        return [comparison for comparison in found if comparison.operation == operation]

    def cross_entropy(self) -> Result:
        """The chunked loss with its gradients against the three bare products of its chunks, by turns."""
        dim, t = self.sizes["1.3b"].dim, 4 * self.seq_len
        chunk = chunk_for_memory(32e9, self.vocab, t, itemsize=2)
        hidden = torch.randn(t, dim, device=self.device, dtype=torch.bfloat16)
        weight = torch.randn(self.vocab, dim, device=self.device, dtype=torch.bfloat16) * dim**-0.5
        targets = torch.randint(self.vocab, (t,), device=self.device)
        dweight = torch.zeros(self.vocab, dim, device=self.device)
        backend = self.ops().cross_entropy
        loss = partial(linear_cross_entropy_with_grads, hidden, weight, targets, dweight=dweight)
        logits = torch.empty(chunk, self.vocab, device=self.device, dtype=torch.bfloat16)

        def products():
            for part in hidden.split(chunk):
                out = logits[: len(part)]
                torch.mm(part, weight.t(), out=out)
                torch.mm(out, weight)
                torch.mm(out.t(), part)

        bare, whole = [], []
        for _ in range(self.rounds):
            bare += self.time(products, 1)
            whole += self.time(lambda: loss(chunk_tokens=chunk, backend=backend), 1)
        return {
            "share": statistics.median(a / b for a, b in zip(bare, whole, strict=True)),
            "ms": 1e3 * statistics.median(whole),
            "spread_s": spread(whole),
            "chunk": chunk,
            "backend": backend,
            "tflops": 6 * t * dim * self.vocab / statistics.median(whole) / 1e12,
        }

    # --- training steps

    def model(self, name: str, n: int, n_layers: int | None = None) -> ModelConfig:
        size = self.sizes[name]
        return ModelConfig(
            vocab_size=self.vocab,
            dim=size.dim,
            n_layers=n_layers or size.n_layers,
            n_heads=size.n_heads,
            n_future_tokens=n,
        )

    def ops(self, **asked: Any) -> OpsConfig:
        return choose(OpsConfig(**asked), self.machine, self.use)[0]

    def layers_that_fit(self, name: str) -> int:
        """The same for every n and mode of a size: the most that all of them have memory for."""
        size = self.sizes[name]
        if self.device.type != "cuda":
            return size.n_layers
        allowed = 0.85 * torch.cuda.get_device_properties(self.device).total_memory
        for n_layers in range(size.n_layers, max(size.heads) + 1, -1):
            estimates = (
                estimate_memory(
                    self.model(name, n, n_layers),
                    HeadsConfig(mode=mode, chunk_tokens=self.chunk(name)),
                    seq_len=self.seq_len,
                    micro_batch_size=size.micro_batch,
                    precision="bf16",
                    zero_stage=1,
                    dp_size=1,
                    micro_batches=MICRO_BATCHES,
                )
                for n in size.heads
                for mode in ("sequential", "joint")
            )
            if max(estimate.total for estimate in estimates) <= allowed:
                return n_layers
        raise RuntimeError(f"{name} does not fit into this device at any depth")

    def chunk(self, name: str) -> int:
        return chunk_for_memory(32e9, self.vocab, self.sizes[name].micro_batch * self.seq_len, itemsize=2)

    def train(self, name: str, n: int, mode: str = "sequential", compile: bool = True) -> Result:
        size = self.sizes[name]
        config = self.model(name, n, self.layers_that_fit(name))
        engine = self.engine(
            config,
            HeadsConfig(mode=mode, chunk_tokens=self.chunk(name)),
            self.ops(compile=compile and self.device.type == "cuda"),
            size.micro_batch,
        )
        batches = [self.batch(config, size.micro_batch, seed) for seed in range(MICRO_BATCHES)]
        for _ in range(3):
            engine.train_step(batches, lr=1e-4)
        self.reset_peak()
        seconds = self.time(partial(engine.train_step, batches, lr=1e-4), 5)
        peak_gib = self.peak_gib()
        tokens = MICRO_BATCHES * size.micro_batch * self.seq_len
        flops = tokens * train_flops_per_token(config, self.seq_len)
        tflops, peak, gemm = flops / statistics.median(seconds) / 1e12, known_tflops(self.device), self.results
        del engine
        self.free()
        torch._dynamo.reset()
        return {
            "seconds": statistics.median(seconds),
            "spread_s": spread(seconds),
            "tokens_per_s": tokens / statistics.median(seconds),
            "tflops": tflops,
            "mfu": tflops / peak if peak else None,
            "of_gemm": tflops / gemm["ceilings gemm"]["tflops"] if "ceilings gemm" in gemm else None,
            "peak_gib": peak_gib,
            "layers": config.n_layers,
            "of_layers": size.n_layers,
            "flops": flops,
        }

    def megatron(self) -> Result:
        """megatron-core's own multi-token prediction at the same layers, without the update, in tokens/s."""
        from gpu_megatron import megatron_step

        self._grid = self._grid or start_processes()
        size, config = self.sizes["1.3b"], self.model("1.3b", 4, self.layers_that_fit("1.3b"))
        step, layers_of = megatron_step(
            dim=config.dim,
            n_trunk_layers=config.n_trunk_layers,
            n_heads=config.n_heads,
            ffn_dim=config.hidden_dim,
            vocab=self.vocab,
            seq_len=self.seq_len,
            n_future_tokens=4,
            micro_batch=size.micro_batch,
            micro_batches=MICRO_BATCHES,
            device=self.device,
        )
        step()
        self.reset_peak()
        seconds = self.time(step, 5)
        return {
            "seconds": statistics.median(seconds),
            "spread_s": spread(seconds),
            "tokens_per_s": MICRO_BATCHES * size.micro_batch * self.seq_len / statistics.median(seconds),
            "peak_gib": self.peak_gib(),
            "layers": config.n_layers,
            "layers_of": layers_of,
        }

    def engine(self, config: ModelConfig, heads: HeadsConfig, ops: OpsConfig, micro_batch: int, precision="bf16"):
        self._grid = self._grid or start_processes()
        return build_engine(
            config,
            heads,
            ops,
            grid=self._grid,
            parallel=ParallelConfig(zero_stage=1),
            optimizer=OptimizerConfig(),
            precision=precision,
            micro_batch_size=micro_batch,
            micro_batches=MICRO_BATCHES,
            seq_len=self.seq_len,
            seed=0,
        )

    def batch(self, config: ModelConfig, rows: int, seed: int) -> dict[str, torch.Tensor | None]:
        generator = torch.Generator().manual_seed(seed)
        n = config.n_future_tokens
        window = torch.randint(self.vocab, (rows, self.seq_len + n), generator=generator).to(self.device)
        return micro_batch(window, n)

    # --- the heads alone

    def heads(self, mode: str) -> Result:
        """Four heads of the 1.3B shape over one micro-batch, forward and backward: time, peak above what is held."""
        size = self.sizes["1.3b"]
        config, rows = self.model("1.3b", 4, n_layers=5), size.micro_batch
        ops = self.ops()
        heads = HeadsConfig(mode=mode, chunk_tokens=self.chunk("1.3b"))
        model = build_model(config, heads, ops, seed=0, dtype=torch.bfloat16, device=self.device).output_heads
        z = torch.randn(rows, self.seq_len, config.dim, device=self.device, dtype=torch.bfloat16, requires_grad=True)
        targets = torch.randint(self.vocab, (4, rows, self.seq_len), device=self.device)
        inputs = block_inputs(config, ops, self.seq_len, self.device)

        def step():
            model.zero_grad()
            z.grad = None
            model(z, targets, inputs).loss.backward()

        step()
        held = self.reset_peak()
        step()
        peak = self.peak_gib()
        seconds = self.time(step)
        return {
            "ms": 1e3 * statistics.median(seconds),
            "spread_s": spread(seconds),
            "peak_gib": peak and peak - held / 2**30,
        }

    # --- precision

    def loss_curve(self, precision: str) -> Result:
        """200 steps on the bytes of PyTorch's own Python sources; bf16 is compared with fp32 over the last 20."""
        steps = 4 if self.tiny else 200
        config = ModelConfig(vocab_size=256, dim=64 if self.tiny else 512, n_layers=8, n_heads=8, n_future_tokens=4)
        rows, seq_len = 4, 64 if self.tiny else 512
        text = bytearray()
        for file in sorted(Path(inspect.getfile(torch)).parent.glob("*.py")):
            text += file.read_bytes()
        data = torch.tensor(text, dtype=torch.long)
        engine = self.engine(config, HeadsConfig(), self.ops_of(precision), rows, precision)
        generator, losses = torch.Generator().manual_seed(0), []
        for step in range(steps):
            starts = torch.randint(len(data) - seq_len - 4, (MICRO_BATCHES, rows), generator=generator)
            windows = data[starts.unsqueeze(-1) + torch.arange(seq_len + 4)].to(self.device)
            result = engine.train_step(
                [micro_batch(window, 4) for window in windows], lr=3e-4 * min(1, (step + 1) / 20)
            )
            losses.append((result.sums / result.counts).mean().item())
        del engine
        self.free()
        last = statistics.mean(losses[-20:])
        before = self.results.get("precision fp32")
        return {"first": losses[0], "last": last, "over_fp32": last / before["last"] if before else None}

    def ops_of(self, precision: str) -> OpsConfig:
        return choose(OpsConfig(), self.machine, replace(self.use, half=precision == "bf16"))[0]

    # --- decoding

    def decode(self, kind: type[Decoder]) -> Result:
        """Seconds a pass with and without three drafts, one row, random weights of the 1.3B shape, after 512 tokens.

        Random weights accept no drafts: what drafts gain is the tokens a pass of a trained model over the cost.
        """
        config = self.model("1.3b", 4)
        model = build_model(config, seed=0, dtype=torch.bfloat16, device=self.device)
        parameters = {name: parameter.detach() for name, parameter in logical_parameters(model)}
        length, passes = (40, 5) if self.tiny else (512, 100)
        decoder = kind(config, parameters.__getitem__, length + 5 * passes)
        seconds = {}
        for drafts in (0, 3):
            tree = Tree((1,) * drafts, self.device)
            decoding = SpeculativeDecoder(decoder, tree, Sampling(), 1, length + 5 * passes)
            decoding.start(0, torch.randint(self.vocab, (length,)))
            for _ in range(3):
                decoding.step()
            seconds[drafts] = self.time(decoding.step, passes)
        del model, parameters, decoder, decoding
        self.free()
        plain, drafting = (statistics.median(seconds[drafts]) for drafts in (0, 3))
        return {
            "tokens_per_s": 1 / plain,
            "ms_a_pass": 1e3 * plain,
            "spread_s": spread(seconds[0]),
            "ms_with_3_drafts": 1e3 * drafting,
            "cost_of_a_pass": drafting / plain,
            "gain_at_3.5_tokens_a_pass": 3.5 * plain / drafting,  # what the paper counts on code
        }


def micro_batch(window: torch.Tensor, n: int) -> dict[str, torch.Tensor | None]:
    """(rows, s + n) tokens -> a model's inputs: targets of head k are k tokens ahead."""
    s = window.shape[1] - n
    targets = torch.stack([window[:, k : k + s] for k in range(1, n + 1)])
    return {"tokens": window[:, :s], "targets": targets, "positions": None, "document_ids": None}
