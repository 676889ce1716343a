"""Decoding by CUDA graphs: a pass over few positions is hundreds of kernels so small that launching them takes longer.

A pass is recorded once for each shape and replayed with new values in the same buffers. So that shapes repeat, a pass
looks at whole blocks of slots, and a mask hides those that do not count.
"""

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from megamtp.inference.cache import KVCache
from megamtp.inference.decoder import Decoder, Positions
from megamtp.model.transformer import ModelConfig

SLOTS = 256  # the cache is read in multiples of this
WARM_UP = 3  # runs before a capture, in which libraries make their plans and buffers


class Recording(NamedTuple):
    """``replay()`` computes again what was recorded, from ``inputs`` into ``output``."""

    replay: Callable[[], None]
    inputs: list[Tensor]
    output: Tensor


Record = Callable[[Callable[..., Tensor], list[Tensor]], Recording]


def record_cuda_graph(function: Callable[..., Tensor], inputs: list[Tensor]) -> Recording:
    """Record ``function(*inputs)``, which must not look at values from the host."""
    inputs = [x.clone() for x in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            function(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function(*inputs)
    return Recording(graph.replay, inputs, output)


class _Store(NamedTuple):
    cache: KVCache
    recordings: dict[tuple, Recording]


class _LentCache(KVCache):
    """The memory of a store, as long as somebody holds this."""

    def __init__(self, store: _Store):
        self.store, own = store, store.cache
        self.blocks, self.n_rows, self.capacity, self.n_kv_heads = own.blocks, own.n_rows, own.capacity, own.n_kv_heads


class GraphedDecoder(Decoder):
    """As ``Decoder``, on a GPU. What a pass returns is overwritten by the next pass of the same shape."""

    always_masks = True

    def __init__(
        self,
        config: ModelConfig,
        tensor: Callable[[str], Tensor],
        context: int,
        record: Record = record_cuda_graph,
    ):
        super().__init__(config, tensor, context)
        self._record = record
        self._unused: dict[tuple[int, int, int], list[_Store]] = {}

    def new_cache(self, n_rows: int, capacity: int, n_draft_heads: int) -> KVCache:
        """As ``Decoder.new_cache``; memory and recordings of a cache that nobody holds any more are used again."""
        capacity = self._slots_to_read(capacity)
        unused = self._unused.setdefault((n_rows, capacity, n_draft_heads), [])
        store = unused.pop() if unused else _Store(super().new_cache(n_rows, capacity, n_draft_heads), {})
        cache = _LentCache(store)
        weakref.finalize(cache, unused.append, store)
        return cache

    def trunk(self, tokens: Tensor, at: Positions, cache: KVCache) -> Tensor:
        if at.is_prompt:
            return super().trunk(tokens, at, cache)
        return self._replayed("trunk", super().trunk, tokens, at, cache)

    def head_1(self, z: Tensor, at: Positions, cache: KVCache) -> Tensor:
        return self._replayed("head_1", super().head_1, z, at, cache)

    def _drafts(self, z: Tensor, at: Positions, last: Tensor, n_heads: int, cache: KVCache) -> Tensor:
        if at.is_prompt:
            return super()._drafts(z, at, last, n_heads, cache)
        return self._replayed("drafts", super()._drafts, z, at, cache, last, n_heads)

    def _slots_to_read(self, n_slots: int) -> int:
        return -(-n_slots // SLOTS) * SLOTS

    def _replayed(
        self,
        name: str,
        function: Callable[..., Tensor],
        x: Tensor,
        at: Positions,
        cache: KVCache,
        last: Tensor | None = None,
        n_heads: int = 0,
    ) -> Tensor:
        tensors = {"rows": at.rows, "slots": at.slots, "rotary": at.rotary, "mask": at.mask, "last": last}
        given = {key: value for key, value in tensors.items() if value is not None}
        inputs = [x, *given.values()]
        key = (name, n_heads, at.n_slots, *given, *(value.shape for value in inputs))
        recording = cache.store.recordings.get(key)
        if recording is None:
            own = cache.store.cache  # what is recorded must not keep the lent one

            def again(x: Tensor, *values: Tensor) -> Tensor:
                new = dict(zip(given, values, strict=True))
                rest = (new.pop("last"), n_heads) if last is not None else ()
                return function(x, replace(at, **new), *rest, own)

            recording = cache.store.recordings[key] = self._record(again, inputs)
        for buffer, value in zip(recording.inputs, inputs, strict=True):
            buffer.copy_(value)
        recording.replay()
        return recording.output
