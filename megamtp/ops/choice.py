"""Which backend computes what: chosen once, at start, from what is installed and what the device can do.

Nothing optional is imported to find out. A config can name each backend; one that cannot run here is refused with the
reason, and never replaced in silence.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch

from megamtp.config import config_dataclass, option
from megamtp.errors import UserError
from megamtp.ops.attention import AttentionName
from megamtp.ops.cross_entropy import CrossEntropyBackend
from megamtp.ops.elementwise import ElementwiseName
from megamtp.ops.norm import NormName

AdamWName = Literal["torch", "apex", "deepspeed"]


@config_dataclass
class OpsConfig:
    """Which backend computes what, and what is computed again. null = chosen at start; the table there says why."""

    attention: AttentionName | None = option(
        None, "flash4, flash3, flash2: flash-attn; sdpa: PyTorch's; cudnn: the same by cuDNN; flex: FlexAttention"
    )
    norm: NormName | None = option(None, "RMSNorm: torch; compiled, by torch.compile; apex; reference, the definition")
    elementwise: ElementwiseName | None = option(None, "rotary positions and SwiGLU: triton; compiled, as above; torch")
    cross_entropy: CrossEntropyBackend | None = option(
        None, "a chunk of logits into its gradient: triton, one kernel; torch; liger; apex"
    )
    adamw: AdamWName | None = option(None, "the update: torch, apex or deepspeed, each fused")
    compile: bool = option(
        False, "compile each block with torch.compile; for parallel.tensor 1, not under ZeRO-3; takes a minute at start"
    )
    recompute: Literal["none", "selective", "full"] = option(
        "none", "what a backward pass computes again: none; selective: attention, q to output; full: the whole block"
    )


# What runs anywhere, and what a backend left at null stands for where nobody has chosen.
PORTABLE = {"attention": "sdpa", "norm": "torch", "elementwise": "torch", "cross_entropy": "torch", "adamw": "torch"}


def backend(ops: OpsConfig, operation: str) -> str:
    """The name of an operation's backend."""
    return getattr(ops, operation) or PORTABLE[operation]


@dataclass(frozen=True)
class Machine:
    """What a choice depends on."""

    device: str  # "cuda" or "cpu"
    name: str
    capability: tuple[int, int]  # CUDA's; (0, 0) without
    installed: frozenset[str]  # of ``PACKAGES``


@dataclass(frozen=True)
class Use:
    """What the run asks of its kernels."""

    half: bool  # bf16
    documents: bool  # attention stays inside of documents
    split_vocabulary: bool
    offload_optimizer: bool = False


class Choice(NamedTuple):
    """A line of the table."""

    operation: str
    backend: str
    was_asked_for: bool
    missing: list[str]  # what would be gained, a line each


# Found without an import: by a module that only this package has (the `apex` of PyPI is another project), or by the
# name of the distribution.
_MODULES = {
    "triton": "triton",
    "flash-attn 2": "flash_attn_2_cuda",
    "flash-attn 3": "flash_attn_interface",
    "liger-kernel": "liger_kernel",
    "apex": "amp_C",
    "apex xentropy": "xentropy_cuda",
}
_DISTRIBUTIONS = {"flash-attn 4": "flash-attn-4"}
_PROGRAMS = {"nvcc": ["nvcc"], "a C++ compiler": ["c++", "g++", "clang++"]}
PACKAGES = (*_MODULES, *_DISTRIBUTIONS, *_PROGRAMS)


def this_machine(device: torch.device) -> Machine:
    """What is here."""
    on_gpu = device.type == "cuda"
    found = {package for package, module in _MODULES.items() if find_spec(module)}
    found |= {package for package, name in _DISTRIBUTIONS.items() if _is_distributed(name)}
    found |= {program for program, names in _PROGRAMS.items() if any(map(shutil.which, names))}
    found |= {"a C++ compiler"} if shutil.which(os.environ.get("CXX", "")) else set()
    name = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    capability = torch.cuda.get_device_capability(device) if on_gpu else (0, 0)
    return Machine(device.type, name, capability, frozenset(found))


def _is_distributed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


Obstacle = Callable[[Machine, Use, OpsConfig], str | None]  # why a backend cannot run, or None


def _on_gpu(package: str | None = None, half: bool = False, capability: int = 0, up_to: int = 10**6) -> Obstacle:
    """``capability`` to ``up_to``: major numbers of the compute capability."""

    def obstacle(machine: Machine, use: Use, _: OpsConfig) -> str | None:
        if machine.device != "cuda":
            return "needs a GPU"
        if package and package not in machine.installed:
            return f"{package} is not installed"
        if not capability <= machine.capability[0] <= up_to:
            return f"is not for {machine.name}, whose compute capability is {'.'.join(map(str, machine.capability))}"
        if half and not use.half:
            return "computes in bf16 alone, and training.precision is fp32"
        return None

    return obstacle


def _all(*obstacles: Obstacle) -> Obstacle:
    return lambda *what: next((reason for obstacle in obstacles if (reason := obstacle(*what))), None)


def _never(*_) -> None:
    return None


def _whole_vocabulary(_: Machine, use: Use, __: OpsConfig) -> str | None:
    return "needs the whole vocabulary on each rank, so parallel.tensor 1" if use.split_vocabulary else None


def _not_offloaded(_: Machine, use: Use, __: OpsConfig) -> str | None:
    return "updates on the GPU, where parallel.offload_optimizer has no states" if use.offload_optimizer else None


def _compiler(machine: Machine, _: Use, __: OpsConfig) -> str | None:
    needed = "triton" if machine.device == "cuda" else "a C++ compiler"
    return None if needed in machine.installed else f"is torch.compile's work, which needs {needed}"


def _not_compiled(_: Machine, __: Use, ops: OpsConfig) -> str | None:
    return "cannot be traced by torch.compile; leave ops.compile out" if ops.compile else None


class _Backend(NamedTuple):
    name: str
    obstacle: Obstacle
    when: Callable[[Use, OpsConfig], bool] | None  # chosen by itself; None = only by name
    package: str | None = None
    gain: str = ""


def _always(*_) -> bool:
    return True


def _documents(use: Use, _: OpsConfig) -> bool:
    return use.documents


_FLASH = "documents as sequences of their own, and the fastest attention"
# Best first. What is chosen by itself runs in PyTorch, in kernels of our own, or in flash-attn where it is installed.
_BACKENDS = {
    "attention": [
        _Backend("flash3", _on_gpu("flash-attn 3", half=True, capability=9, up_to=9), _always, "flash-attn 3", _FLASH),
        _Backend(
            "flash4",
            _all(_on_gpu("flash-attn 4", half=True, capability=9), _not_compiled),
            _always,
            "flash-attn 4",
            _FLASH,
        ),
        _Backend("flash2", _on_gpu("flash-attn 2", half=True, capability=8), _always, "flash-attn 2", _FLASH),
        _Backend("flex", _on_gpu("triton"), _documents, "triton", "document masks whose empty blocks are skipped"),
        _Backend("cudnn", _on_gpu(half=True, capability=8), None),
        _Backend("sdpa", _never, _always),
        _Backend("reference", _never, None),
    ],
    "norm": [
        _Backend("apex", _on_gpu("apex"), None),
        _Backend("compiled", _compiler, None),
        _Backend("torch", _never, _always),
        _Backend("reference", _never, None),
    ],
    "elementwise": [
        # A compiled block fuses them with what is around them.
        _Backend(
            "triton",
            _on_gpu("triton"),
            lambda _, ops: not ops.compile,
            "triton",
            "rotary and SwiGLU in one pass each, less memory",
        ),
        _Backend("compiled", _compiler, None),
        _Backend("torch", _never, _always),
    ],
    "cross_entropy": [
        _Backend("triton", _on_gpu("triton"), _always, "triton", "loss and gradient of the logits in one kernel"),
        _Backend("liger", _all(_on_gpu("liger-kernel"), _whole_vocabulary), None),
        _Backend("apex", _all(_on_gpu("apex xentropy"), _whole_vocabulary), None),
        _Backend("torch", _never, _always),
    ],
    "adamw": [
        _Backend("apex", _all(_on_gpu("apex"), _not_offloaded), None),
        _Backend("deepspeed", _all(_on_gpu("nvcc"), _not_offloaded), None),
        _Backend("torch", _never, _always),
    ],
}


def choose(ops: OpsConfig, machine: Machine, use: Use) -> tuple[OpsConfig, list[Choice]]:
    """``ops`` with every backend named, and the table. ``UserError`` for one asked for by name that cannot run here."""
    if ops.compile and (reason := _compiler(machine, use, ops)):
        raise UserError(f"ops.compile: {reason}; install it, or leave it out")
    choices = []
    for operation, backends in _BACKENDS.items():
        asked = getattr(ops, operation)
        obstacles = {backend.name: backend.obstacle(machine, use, ops) for backend in backends}
        if asked:
            if reason := obstacles[asked]:
                able = " or ".join(name for name, obstacle in obstacles.items() if not obstacle)
                raise UserError(f"ops.{operation} is {asked}: {reason}; use {able}, or leave it out")
            choices.append(Choice(operation, asked, True, []))
            continue
        missing: dict[str, str] = {}  # by what it would gain, told once
        for backend in backends:
            if backend.when is None or not backend.when(use, ops):
                continue
            if not obstacles[backend.name]:
                choices.append(Choice(operation, backend.name, False, list(missing.values())))
                break
            if backend.gain and machine.device == "cuda" and backend.package not in machine.installed:
                with_it = replace(machine, installed=machine.installed | {backend.package})
                if not backend.obstacle(with_it, use, ops):
                    missing.setdefault(backend.gain, f"{backend.package} is not installed: {backend.gain}")
    return replace(ops, **{choice.operation: choice.backend for choice in choices}), choices


def runnable(ops: OpsConfig, machine: Machine, use: Use) -> list[tuple[str, str]]:
    """(operation, backend) of all that can run, best first."""
    return [
        (operation, backend.name)
        for operation, backends in _BACKENDS.items()
        for backend in backends
        if not backend.obstacle(machine, use, ops)
    ]


def choice_table(machine: Machine, choices: list[Choice]) -> str:
    """What ``pretrain.py`` prints: a line an operation, and below it what an installation would gain."""
    width = max(len(choice.operation) for choice in choices)
    lines = [f"kernels on {machine.name}:"]
    for choice in choices:
        lines.append(f"  {choice.operation:<{width}}  {choice.backend}{' (asked for)' if choice.was_asked_for else ''}")
        lines += [f"  {'':<{width}}    {line}" for line in choice.missing]
    return "\n".join(lines)
