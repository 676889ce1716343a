"""The forward passes of ``megamtp.inference.decoder.Decoder``, by the C functions of ``blocks.c``: a CPU, in fp32.

A pass over the whole trunk is one call. A position's result has the same bits whatever is computed beside it: drafts,
trees and batches change no token. Shapes as there.
"""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from megamtp.inference.native.build import library
from megamtp.inference.tree import Tree
from megamtp.model.transformer import ModelConfig
from megamtp.ops.elementwise import rotary_table

WIDE, PANEL = 64, 32  # of weights and of the cache, as in blocks.c


def _structure(name: str, **fields: type) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


_INT, _POINTER = ctypes.c_int, ctypes.c_void_p
_SIZES = ("dim", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size", "n_threads")
_WEIGHTS = ("attention_norm", "wqkv", "wo", "ffn_norm", "w13", "w2", "unembedding")
_Model = _structure(
    "_Model",
    **dict.fromkeys(_SIZES, _INT),
    norm_eps=ctypes.c_float,
    **dict.fromkeys(("blocks", "norm", "cos", "sin"), _POINTER),
)
_Block = _structure("_Block", **dict.fromkeys(_WEIGHTS, _POINTER))
_Cache = _structure("_Cache", keys=_POINTER, values=_POINTER, capacity=_INT)
_Positions = _structure(
    "_Positions",
    **dict.fromkeys(("n_rows", "n_new", "first_row"), _INT),
    **dict.fromkeys(("lengths", "depths", "ancestors"), _POINTER),
)


class NativePositions:
    """New positions of rows of a cache: ``n_new`` behind the ``lengths`` that they hold."""

    def __init__(self, first_row: int, lengths: list[int], n_new: int, tree: Tree | None = None):
        # Kept, since the structure holds their addresses alone.
        self._lengths = (_INT * len(lengths))(*lengths)
        self._depths = self._ancestors = None
        if tree is not None:
            self._depths = (_INT * n_new)(*tree.depth_of)
            self._ancestors = (ctypes.c_uint8 * n_new**2).from_buffer_copy(tree.ancestor_bytes)
        arrays = (array and ctypes.addressof(array) for array in (self._lengths, self._depths, self._ancestors))
        self._structure = _Positions(len(lengths), n_new, first_row, *arrays)
        self.reference = ctypes.byref(self._structure)


class NativeCache:
    """Keys and values as ``blocks.c`` lays them out; what ``KVCache`` says of slots and rows holds here."""

    def __init__(self, config: ModelConfig, n_layers: int, n_rows: int, capacity: int):
        self.n_rows, self.capacity = n_rows, _padded(capacity)
        rows = (n_layers, n_rows, config.kv_heads)
        n_channels = _padded(config.head_dim) // PANEL
        self.keys = torch.zeros(*rows, self.capacity // PANEL, config.head_dim, PANEL)
        self.values = torch.zeros(*rows, n_channels, self.capacity, PANEL)
        self._addresses = [(_POINTER * n_layers)(*(layer.data_ptr() for layer in t)) for t in (self.keys, self.values)]
        self._structure = _Cache(*map(ctypes.addressof, self._addresses), self.capacity)
        self.reference = ctypes.byref(self._structure)

    def move(self, layers: range, row: int, sources: list[int], first: int) -> None:
        """Copy the slots ``sources`` of a row to the slots from ``first`` on."""
        of, to = torch.tensor(sources), torch.arange(first, first + len(sources))
        chosen = slice(layers.start, layers.stop)
        keys, values = self.keys[chosen, row], self.values[chosen, row]
        keys[:, :, to // PANEL, :, to % PANEL] = keys[:, :, of // PANEL, :, of % PANEL]
        values[:, :, :, to] = values[:, :, :, of]

    def move_row(self, source: int, target: int, n_slots: int) -> None:
        """Copy the first ``n_slots`` of a row over another's."""
        self.keys[:, target, :, : _padded(n_slots) // PANEL] = self.keys[:, source, :, : _padded(n_slots) // PANEL]
        self.values[:, target, :, :, :n_slots] = self.values[:, source, :, :, :n_slots]


class NativeDecoder:
    """As ``Decoder``. ``CannotBuild`` where there is no compiler."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, config: ModelConfig, tensor: Callable[[str], Tensor], context: int):
        self._library = library()
        self.config, self.context = config, context
        self.embedding = tensor("tok_embeddings.weight")[: config.vocab_size].float()
        self._norm_weight = tensor("norm.weight").float().contiguous()
        names = [config.unembedding_name(k) for k in range(self.n_heads)]
        unembeddings = {name: _in_panels(tensor(name)[: config.vocab_size]) for name in set(names)}
        trunk = [_block_weights(f"layers.{i}", tensor) for i in range(config.n_trunk_layers)]
        heads = [[*_block_weights(f"heads.{k}", tensor), unembeddings[name]] for k, name in enumerate(names)]
        self._weights = [*trunk, *heads]
        addresses = (_Block(*(weight.data_ptr() for weight in block)) for block in self._weights)
        self._blocks = (_Block * len(self._weights))(*addresses)
        sizes = (config.dim, config.n_heads, config.kv_heads, config.head_dim, config.hidden_dim, config.vocab_size)
        self._model = _Model(*sizes, 1, config.norm_eps, ctypes.addressof(self._blocks), self._norm_weight.data_ptr())
        self._reach(context)

    @property
    def n_heads(self) -> int:
        return self.config.n_future_tokens

    def _reach(self, n_positions: int) -> None:
        table = rotary_table(torch.arange(n_positions), self.config.head_dim, self.config.rope_theta)
        self._cos, self._sin = (half[0, :, 0].contiguous() for half in table)
        self._model.cos, self._model.sin = self._cos.data_ptr(), self._sin.data_ptr()

    def new_cache(self, n_rows: int, capacity: int, n_draft_heads: int) -> NativeCache:
        """For the trunk, head 1 and the next ``n_draft_heads`` heads."""
        if capacity > len(self._cos):  # drafts may reach past the context
            self._reach(capacity)
        return NativeCache(self.config, self.config.n_trunk_layers + 1 + n_draft_heads, n_rows, capacity)

    def prompt_positions(self, row: int, n_tokens: int) -> NativePositions:
        """Positions 0 ... n_tokens - 1 of an empty row."""
        return NativePositions(row, [0], n_tokens)

    def next_positions(self, lengths: list[int], n_new: int, tree: Tree | None = None) -> NativePositions:
        """``n_new`` positions behind each of the first rows of a cache; in a ``tree``, each sees its ancestors."""
        return NativePositions(0, lengths, n_new, tree)

    def path_positions(self, lengths: list[int], counts: list[int]) -> NativePositions:
        """max(counts) positions behind each of the first rows, of which the ``counts[b]``-th alone looks back."""
        return NativePositions(0, lengths, max(counts))

    def trunk(self, tokens: Tensor, at: NativePositions, cache: NativeCache) -> Tensor:
        """tokens (b, t) -> z (b, t, d)."""
        z = F.embedding(tokens, self.embedding)
        self._call(self._library.run_trunk, self.config.n_trunk_layers, cache, at, z)
        return z

    def head_1(self, z: Tensor, at: NativePositions, cache: NativeCache) -> Tensor:
        """z (b, t, d) -> logits of the next token (b, t, V)."""
        return self._heads(0, 1, z, at, cache)[0]

    def head_1_at_end(self, z: Tensor, at: NativePositions, cache: NativeCache) -> Tensor:
        """As ``head_1``, for the last position alone: (b, 1, V)."""
        return self._heads(0, 1, z, at, cache, [z.shape[1]] * len(z)).transpose(0, 1)

    def draft(self, z: Tensor, at: NativePositions, counts: list[int], n_heads: int, cache: NativeCache) -> Tensor:
        """What heads 2 ... n_heads + 1 predict from the ``counts[b]``-th position of z (b, t, d): (b, n_heads, V)."""
        return self._heads(1, n_heads, z, at, cache, counts).transpose(0, 1)

    def all_heads(self, tokens: Tensor) -> Tensor:
        """Logits of every head at every position of tokens (1, t): (n, t, V), without what came before."""
        at, cache = self.prompt_positions(0, tokens.shape[1]), self.new_cache(1, tokens.shape[1], self.n_heads - 1)
        return self._heads(0, self.n_heads, self.trunk(tokens, at, cache), at, cache).squeeze(1)

    def _heads(
        self, first: int, n: int, z: Tensor, at: NativePositions, cache: NativeCache, counts: list[int] | None = None
    ) -> Tensor:
        """Logits of n heads: (n, b, t, V), or (n, b, V) at the ``counts[b]``-th position of each row."""
        shape = z.shape[:2] if counts is None else z.shape[:1]
        logits = torch.empty(n, *shape, self.config.vocab_size)
        only = None if counts is None else (_INT * len(counts))(*(count - 1 for count in counts))
        first += self.config.n_trunk_layers
        self._call(self._library.run_heads, first, n, cache, at, z.contiguous(), only, logits)
        return logits

    def _call(self, function, *arguments) -> None:
        self._model.n_threads = torch.get_num_threads()
        passed = [_POINTER(a.data_ptr()) if isinstance(a, Tensor) else getattr(a, "reference", a) for a in arguments]
        if function(ctypes.byref(self._model), *passed):
            raise MemoryError("no memory for a pass over so many positions")


def _padded(n: int, panel: int = PANEL) -> int:
    return -(-n // panel) * panel


def _in_panels(weight: Tensor) -> Tensor:
    """(outputs, inputs) -> (outputs / 64, inputs, 64), zeros beyond the last output."""
    n_outputs, n_inputs = weight.shape
    whole = F.pad(weight.float(), (0, 0, 0, _padded(n_outputs, WIDE) - n_outputs))
    return whole.view(-1, WIDE, n_inputs).transpose(1, 2).contiguous()


def _block_weights(prefix: str, tensor: Callable[[str], Tensor]) -> list[Tensor]:
    def of(*names: str) -> Tensor:
        return torch.cat([tensor(f"{prefix}.{name}.weight") for name in names])

    return [
        of("attention_norm").float().contiguous(),
        _in_panels(of("attention.wq", "attention.wk", "attention.wv")),
        _in_panels(of("attention.wo")),
        of("ffn_norm").float().contiguous(),
        _in_panels(of("feed_forward.w1", "feed_forward.w3")),
        _in_panels(of("feed_forward.w2")),
    ]
