"""What a run decides by the device that it finds: backends, the chunk of the cross-entropy, the peak for MFU."""

import os
import statistics
import time
from dataclasses import replace

import torch

from megamtp.ops.choice import Use, choice_table, choose, this_machine
from megamtp.ops.comparison import Shape, check_backends
from megamtp.ops.cross_entropy import chunk_for_memory
from megamtp.parallel.groups import ProcessGrid
from megamtp.parallel.tensor import split_range
from megamtp.planner.devices import device_by_name
from megamtp.planner.stages import Stage
from megamtp.training.run_config import RunConfig

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
USABLE = 0.9  # of a GPU's memory: CUDA, NCCL and the allocator's slack take the rest
CHECKED_TOKENS = 256


def grow_segments() -> None:
    """Let PyTorch's CUDA allocator extend its segments: micro-batches of changing sizes then leave no holes.

    Call before anything is on a GPU; what the user has set stays.
    """
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[1]] = "expandable_segments:True"


def choose_kernels(config: RunConfig) -> tuple[RunConfig, str]:
    """``config`` with the backend of each operation named, and the table that says which and why.

    Raises ``UserError`` for a backend that was asked for and cannot run here.
    """
    machine = this_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    use = Use(
        half=config.training.precision == "bf16",
        documents=config.data.document_attention,
        split_vocabulary=config.parallel.tensor > 1,
        offload_optimizer=config.parallel.offload_optimizer,
    )
    ops, choices = choose(config.ops, machine, use)
    return replace(config, ops=ops), choice_table(machine, choices)


def choose_chunk(config: RunConfig, stages: list[Stage], gpu_bytes: int) -> RunConfig:
    """``config`` with ``heads.chunk_tokens`` by what the estimate leaves free on the rank that holds the heads.

    From estimates, not from what happens to be free: all ranks, and a run that goes on, must come to the same.
    """
    if config.heads.chunk_tokens:
        return config
    memory = stages[-1].rank_memory
    free = max(0.0, USABLE * gpu_bytes - (memory.total - memory.loss_buffers))
    rows = split_range(config.model.padded_vocab_size, config.parallel.tensor, 0)[1]
    tokens = config.training.micro_batch_size * config.data.seq_len
    chunk = chunk_for_memory(free, rows, tokens, itemsize=2 if config.training.precision == "bf16" else 4)
    return replace(config, heads=replace(config.heads, chunk_tokens=chunk))


def check_kernels(config: RunConfig, grid: ProcessGrid) -> None:
    """Hold the chosen backends to their definitions before a GPU trains with them. ``RunFailure`` if one is wrong."""
    if grid.device.type != "cuda":
        return
    model = config.model
    shape = Shape(1, CHECKED_TOKENS, model.n_heads, model.kv_heads, model.head_dim, model.hidden_dim, model.vocab_size)
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    check_backends(config.ops, shape, dtype, grid.device)
    torch.cuda.empty_cache()  # the definitions held whole logits


def device_peak(config: RunConfig, device: torch.device) -> float | None:
    """TFLOP/s that MFU is a share of: the config's, that of a known GPU, or what an unknown GPU does; none on a CPU."""
    return config.training.peak_tflops or known_tflops(device) or measured_tflops(device)


def known_tflops(device: torch.device) -> float | None:
    """Dense bf16 peak of a GPU that the planner's table knows by name; none for others and for CPUs."""
    known = device_by_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return known and known.bf16_tflops


def measured_tflops(device: torch.device, size: int = 8192, rounds: int = 10) -> float | None:
    """Of square bf16 products, median; none on a CPU."""
    if device.type != "cuda":
        return None
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        a @ b
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(times[2:]) / 1e12
