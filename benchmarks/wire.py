"""Every message of this process, seen, counted and on demand left out, at the methods of its process groups."""

import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

CONTROL_VALUES = 16  # messages of no more values are norms, losses and flags


class Message(NamedTuple):
    """One call of a process group. ``bytes``: the whole tensor that is reduced, gathered, scattered or sent."""

    kind: str  # "all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce", "send"
    bytes: int
    values: int
    ranks: int

    @property
    def sent(self) -> float:
        """Bytes that a rank sends of it in a ring."""
        share = (self.ranks - 1) / self.ranks
        factors = {"all_reduce": 2 * share, "all_gather": share, "reduce_scatter": share, "reduce": share}
        return self.bytes * factors.get(self.kind, 1)


class Wire:
    """Every message of this process, seen at its process groups; ``messages`` since it was last cleared.

    ``local`` replaces them by copies in local memory.
    """

    def __init__(self):
        self.local = False
        self.messages: list[Message] = []
        self._received: dict[tuple, torch.Tensor] = {}
        for name, kind in _METHODS.items():
            if hasattr(dist.ProcessGroup, name):
                setattr(dist.ProcessGroup, name, self._wrapped(getattr(dist.ProcessGroup, name), kind))

    def sent(self) -> tuple[float, float]:
        """Bytes since ``messages`` was cleared: (payload, control messages)."""
        payload = sum(m.sent for m in self.messages if m.values > CONTROL_VALUES)
        return payload, sum(m.sent for m in self.messages) - payload

    def _wrapped(self, method: Callable, kind: str) -> Callable:
        def call(group, *args, **kwargs):
            first = _tensors(args[0]) if args else []
            whole = _tensors(args[1]) if kind == "reduce_scatter" else first
            if kind not in ("recv", "barrier"):
                values = sum(x.numel() for x in whole)
                size = sum(x.numel() * x.element_size() for x in whole)
                self.messages.append(Message(kind, size, values, group.size()))
            if not self.local:
                work = method(group, *args, **kwargs)
                return _Received(work, first, self._received) if kind == "recv" else work
            with torch.no_grad():
                self._copy(kind, group, args, first)
            return _Done()

        return call

    def _copy(self, kind: str, group: dist.ProcessGroup, args: tuple, first: list[torch.Tensor]) -> None:
        if kind == "recv":
            for x in first:
                x.copy_(self._received[x.shape, x.dtype])
        elif kind == "all_gather":
            parts = _tensors(args[1])
            for out, x in zip(first, parts * (len(first) // len(parts)), strict=True):
                if out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
                    continue  # gathered in place, as ZeRO does weights: the others' are there, of the last real step
                out.view(-1, x.numel()).copy_(x.reshape(1, -1).expand(out.numel() // x.numel(), -1))
        elif kind == "reduce_scatter":
            parts = _tensors(args[1])
            if len(parts) == len(first):
                parts = [x.view(group.size(), -1)[group.rank()] for x in parts]
            for out, x in zip(first, parts, strict=False):
                out.view(-1).copy_(x.reshape(-1))


_METHODS = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "allgather": "all_gather",
    "all_gather_single": "all_gather",
    "_allgather_base": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "send": "send",
    "recv": "recv",
    "barrier": "barrier",
}


class _Done:
    """The handle of a message that is not sent."""

    def wait(self, *_):
        return True

    def is_completed(self) -> bool:
        return True


class _Received:
    """Keeps a copy of the first tensor of each shape that arrives."""

    def __init__(self, work, tensors: list[torch.Tensor], kept: dict[tuple, torch.Tensor]):
        self._work, self._tensors, self._kept = work, tensors, kept

    def wait(self, *timeout):
        result = self._work.wait(*timeout)
        for x in self._tensors:
            if (x.shape, x.dtype) not in self._kept:
                self._kept[x.shape, x.dtype] = x.detach().clone()
        return result

    def is_completed(self) -> bool:
        return self._work.is_completed()


def _tensors(value) -> list[torch.Tensor]:
    """All tensors in nested lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [x for item in value for x in _tensors(item)] if isinstance(value, (list, tuple)) else []


def tcp_bytes_sent() -> int:
    """Bytes of all TCP connections of this process that their other ends have acknowledged (Linux)."""
    total = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            if not os.readlink(descriptor).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(descriptor.name))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # closed meanwhile, or not TCP
            continue
        total += struct.unpack_from("Q", info, 120)[0]  # tcp_info.tcpi_bytes_acked
    return total
