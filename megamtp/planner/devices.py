"""What one device can do: a table of GPUs, and a user's own by a YAML file or by figures.

Without torch: a wrong name or figure is told at once.
"""

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from megamtp.config import config_dataclass, option
from megamtp.errors import UserError


@config_dataclass
class Assumptions:
    """What no data sheet says; a measured run tells better figures. Raises ``UserError`` for impossible ones."""

    matmul_share: float = option(0.65, "of the peak that matrix products reach")
    attention_share: float = option(0.40, "of the peak that fused attention reaches")
    memory_share: float = option(0.80, "of the memory's bandwidth that is reached")
    network_share: float = option(0.75, "of the links' bandwidth that is reached")
    overlap: float = option(0.70, "of the messages that may travel behind computing, the share that does")
    host_gbs: float = option(20.0, "10^9 bytes/s at which a rank's offloaded optimizer states are updated")
    libraries_gb: float = option(2.0, "device memory of the driver's context, NCCL and cuBLAS")
    slack: float = option(0.05, "of activations and buffers: memory that the allocator cannot use")

    def __post_init__(self):
        for name, value in vars(self).items():
            may_be_zero = name in ("overlap", "libraries_gb", "slack")
            limit = 1 if "share" in name or name == "overlap" else float("inf")
            if not (0 < value <= limit or value == 0 and may_be_zero):
                span = f"{'from 0' if may_be_zero else 'above 0'}{', at most 1' if limit == 1 else ''}"
                raise UserError(f"--{name.replace('_', '-')} must be {span}, got {value}")


@dataclass(frozen=True)
class Device:
    """Figures of a data sheet, in its units: 10^9 bytes, 10^12 FLOP/s (dense), 10^9 bytes/s in one direction."""

    memory_gb: float
    bf16_tflops: float
    fp32_tflops: float  # of torch's default, which is not TF32
    bandwidth_gbs: float  # of the memory
    intra_gbs: float = 0.0  # between two devices of a node
    inter_gbs: float = 0.0  # between nodes, of one device
    per_node: int = 1
    source: str = ""
    is_gpu: bool = True

    def flops(self, precision: str) -> float:
        """Peak FLOP/s of matrix products."""
        return 1e12 * (self.bf16_tflops if precision == "bf16" else self.fp32_tflops)

    def ring(self, stride: int, size: int, world_size: int) -> float:
        """Bytes/s that each rank of a group can send around the group's ring.

        The group is ``size`` ranks, ``stride`` apart. Inside a node they use the links of the node. Across nodes the
        members on a node use their network adapters together.
        """
        if self._in_a_node(stride, size, world_size):
            return 1e9 * self.intra_gbs
        on_a_node = min(size, max(1, self.per_node // stride))
        return 1e9 * min(self.intra_gbs, on_a_node * self.inter_gbs)

    def pair(self, stride: int, size: int, world_size: int) -> float:
        """Bytes/s from each of ``size`` ranks, ``stride`` apart, to the next: those of the slowest pair."""
        return 1e9 * (self.intra_gbs if self._in_a_node(stride, size, world_size) else self.inter_gbs)

    def _in_a_node(self, stride: int, size: int, world_size: int) -> bool:
        return world_size <= self.per_node or self.per_node % (stride * size) == 0


# NVIDIA's data sheets of the SXM parts, and of the DGX systems for what is between devices: half of the stated NVLink
# bandwidth (which adds both directions), and the network adapters' share of one device.
DEVICES = {
    "a100-40gb": Device(40, 312, 19.5, 1555, 300, 25, 8, "NVIDIA A100, DGX A100 (8 x HDR 200 Gb/s)"),
    "a100-80gb": Device(80, 312, 19.5, 2039, 300, 25, 8, "NVIDIA A100, DGX A100 (8 x HDR 200 Gb/s)"),
    "h100-80gb": Device(80, 989, 67, 3350, 450, 50, 8, "NVIDIA H100 SXM, DGX H100 (8 x NDR 400 Gb/s)"),
    "h200": Device(141, 989, 67, 4800, 450, 50, 8, "NVIDIA H200 SXM, DGX H200 (8 x NDR 400 Gb/s)"),
    "b200": Device(180, 2250, 75, 8000, 900, 50, 8, "NVIDIA DGX B200 (8 x NDR 400 Gb/s)"),
    "l40s": Device(48, 362, 91.6, 864, 32, 12.5, 8, "NVIDIA L40S (PCIe 4.0 x16); 100 Gb/s each assumed"),
    # There is no data sheet for "a CPU": memory_gb, fp32_tflops (or bf16_tflops) and bandwidth_gbs must be given.
    "cpu": Device(0, 0, 0, 0, source="given by options", is_gpu=False),
}
FIGURES = [field.name for field in fields(Device) if field.name not in ("source", "is_gpu")]


def find_device(name: str, figures: dict[str, float] | None = None, file: Path | None = None) -> Device:
    """The device of that name, from ``file`` or the table, with ``figures`` in place of its own.

    ``file`` is YAML: a name, and below it the figures. Raises ``UserError`` for an unknown name, key or figure.
    """
    known = DEVICES | (_read(file) if file else {})
    if name.lower() not in known:
        raise UserError(f"--gpu {name}: not known; use one of {', '.join(known)}, or describe it with --gpu-file")
    device = replace(known[name.lower()], **(figures or {}))
    for figure in FIGURES:
        if not 0 <= getattr(device, figure) < math.inf:
            raise UserError(f"--gpu {name}: {figure} must be a number from 0, got {getattr(device, figure)}")
    if device.per_node < 1:
        raise UserError(f"--gpu {name}: per_node must be 1 or more")
    return device


def device_by_name(name: str) -> Device | None:
    """Of a name as the driver gives it, such as "NVIDIA H100 80GB HBM3"; None where the table has no such GPU.

    Of GPUs that come with several sizes of memory it is the largest that the name does not contradict.
    """
    words = name.lower().replace("-", " ").split()
    if {"pcie", "nvl", "mig"} & set(words):  # slower parts of the same name
        return None
    for known in sorted((name for name, device in DEVICES.items() if device.memory_gb), reverse=True):
        model, _, size = known.partition("-")
        sizes = [word for word in words if word.endswith("gb") and word[:-2].isdigit()]
        if model in words and (not size or not sizes or size in sizes):
            return DEVICES[known]
    return None


def check_complete(name: str, device: Device, precision: str, n_devices: int) -> None:
    """Raise ``UserError`` where a figure that the estimate divides by is missing."""
    needed = ["memory_gb", f"{precision}_tflops", "bandwidth_gbs"]
    if n_devices > 1:
        needed.append("intra_gbs")
    if n_devices > device.per_node:
        needed.append("inter_gbs")
    missing = [f"--{figure.replace('_', '-')}" for figure in needed if not getattr(device, figure)]
    if missing:
        raise UserError(f"--gpu {name}: give {', '.join(missing)} as well: the table has no such figure for it")


def _read(file: Path) -> dict[str, Device]:
    try:
        values = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--gpu-file {file}: cannot read it: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"--gpu-file {file}: expected a mapping of names to figures")
    return {str(name).lower(): _device(f"--gpu-file {file}: {name}", entry) for name, entry in values.items()}


def _device(where: str, entry: Any) -> Device:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected figures, one a line: {', '.join(FIGURES)}")
    source = str(entry.pop("source", ""))
    for key, value in entry.items():
        if key not in FIGURES:
            raise UserError(f"{where}: unknown figure {key}; known are {', '.join(FIGURES)}, source")
        if isinstance(value, bool) or not isinstance(value, int | float) or (key == "per_node" and value != int(value)):
            raise UserError(f"{where}: {key} must be a {'whole ' if key == 'per_node' else ''}number, got {value!r}")
    missing = [figure for figure in ("memory_gb", "bandwidth_gbs") if figure not in entry]
    if missing:
        raise UserError(f"{where}: {', '.join(missing)} missing")
    return Device(**{"bf16_tflops": 0, "fp32_tflops": 0} | entry, source=source)
