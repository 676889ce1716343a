"""Split layers in fp64 against the unsplit ones under plain autograd, and their initial values."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megamtp.model.heads import HeadsConfig, MultiTokenHeads
from megamtp.model.model import build_model, sharded_parameters
from megamtp.model.transformer import Block, ModelConfig, RMSNorm, block_inputs
from megamtp.ops.choice import OpsConfig
from megamtp.parallel.groups import ParallelConfig, ProcessGrid
from megamtp.parallel.layers import ColumnParallel, RowParallel, VocabParallelEmbedding, column_parallel
from megamtp.parallel.tensor import WHOLE, TensorParallel
from tests.distributed import run_ranks
from tests.ops.closeness import EXACT, relative_error

SEQ_LEN, IGNORE = 12, -100
WEIGHTS = [1.0, 0.5, 2.0]
# TP ranks and key/value heads: two for each rank, one for each, one for 2, 3 or 4 ranks.
SPLITS = [(2, 4), (2, 1), (3, 3), (3, 1), (4, 2), (4, 1)]


def model_config(kv_heads: int) -> ModelConfig:
    """128 rows of the padded vocabulary do not divide by 3."""
    return ModelConfig(
        vocab_size=101, dim=24, n_layers=5, n_heads=12, n_kv_heads=kv_heads, n_future_tokens=3, ffn_dim=36
    )


class Setting:
    """One split, as a rank sees it, and random tensors that are the same on every rank."""

    def __init__(self, tp: TensorParallel, kv_heads: int, batch: int):
        self.tp, self.config, self.batch = tp, model_config(kv_heads), batch
        self.generator = torch.Generator().manual_seed(batch)
        self.x = self.random(batch, SEQ_LEN, 24)
        self.tokens = torch.randint(0, 101, (batch, SEQ_LEN), generator=self.generator)
        documents = (torch.rand(batch, SEQ_LEN, generator=self.generator) < 0.2).cumsum(1)
        positions = torch.randint(0, 9, (batch, SEQ_LEN), generator=self.generator)
        self.inputs = block_inputs(self.config, OpsConfig(), SEQ_LEN, self.x.device, positions, documents)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def held(self, x: Tensor) -> Tensor:
        """What a rank holds of (b, s, ...) between layers."""
        return x.chunk(self.tp.size, 1)[self.tp.rank] if self.tp.sequence_parallel else x

    def pair(self, build: Callable[[TensorParallel], nn.Module]) -> tuple[nn.Module, nn.Module]:
        """The unsplit module and this rank's part of it, with random weights."""
        whole, split = build(WHOLE).double(), build(self.tp).double()
        with torch.no_grad():
            for (_, weight, _), (_, part, shard) in zip(*map(_parameters, (whole, split)), strict=True):
                weight.copy_(self.random(*weight.shape) * 0.3)
                part.copy_(shard.of(weight))
        return whole, split

    def weight_errors(self, whole: nn.Module, split: nn.Module) -> dict[str, float]:
        """Of every weight's gradient; both modules have been backward."""
        return {
            f"gradient of {name}": relative_error(part.grad, shard.of(weight.grad))
            for (name, weight, _), (_, part, shard) in zip(*map(_parameters, (whole, split)), strict=True)
        }


def _parameters(module: nn.Module):
    return sharded_parameters([("", module)])


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


# --- what runs on the ranks: layer -> largest error of each thing compared


def held_to_held(setting: Setting, build: Callable[[TensorParallel], nn.Module], *arguments) -> dict[str, float]:
    """A layer from what is held between layers to what is held between layers."""
    whole, split = setting.pair(build)
    x, dy = _leaf(setting.x), setting.random(*setting.x.shape)
    x_held = _leaf(setting.held(setting.x))
    y, y_held = whole(x, *arguments), split(x_held, *arguments)
    y.backward(dy)
    y_held.backward(setting.held(dy))
    outside = {
        "output": relative_error(y_held, setting.held(y)),
        "dx": relative_error(x_held.grad, setting.held(x.grad)),
    }
    return outside | setting.weight_errors(whole, split)


def block(setting: Setting, recompute: str) -> dict[str, float]:
    ops = OpsConfig(recompute=recompute)
    return held_to_held(setting, lambda tp: Block(setting.config, ops, tp), setting.inputs)


def rms_norm(setting: Setting) -> dict[str, float]:
    return held_to_held(setting, lambda tp: RMSNorm(setting.config, OpsConfig(), tp))


def column(setting: Setting) -> dict[str, float]:
    """Three products at once as attention has them: each rank uses the outputs that it shares in its own way."""
    tp, kv_width = setting.tp, setting.config.kv_heads * setting.config.head_dim

    def build(tp):
        kv = [ColumnParallel(24, kv_width, tp, kv=True) for _ in range(2)]
        return nn.ModuleList([ColumnParallel(24, 24, tp), *kv])

    whole, split = setting.pair(build)
    x, x_held = _leaf(setting.x), _leaf(setting.held(setting.x))
    ys, loss, worst = column_parallel(x_held, tp, *split), 0.0, 0.0
    for y, layer, full in zip(ys, split, whole, strict=True):
        y_whole = F.linear(x, full.weight)
        shard, dys = layer.shard, [setting.random(*y.shape) for _ in range(tp.size)]
        for rank, dy in enumerate(dys):
            rows = (rank // shard.copies) * shard.length
            loss = loss + (y_whole[..., rows : rows + shard.length] * dy).sum()
        worst = max(worst, relative_error(y, y_whole[..., shard.start : shard.start + shard.length]))
        layer.dy = dys[tp.rank]
    loss.backward()
    torch.autograd.backward(ys, [layer.dy for layer in split])
    return {"output": worst, "dx": relative_error(x_held.grad, setting.held(x.grad))} | setting.weight_errors(
        whole, split
    )


def row(setting: Setting) -> dict[str, float]:
    whole, split = setting.pair(lambda tp: RowParallel(24, 24, tp))
    x, dy = _leaf(setting.x), setting.random(*setting.x.shape)
    x_split = _leaf(setting.x.chunk(setting.tp.size, -1)[setting.tp.rank])
    y, y_held = whole(x), split(x_split)
    y.backward(dy)
    y_held.backward(setting.held(dy))
    dx = relative_error(x_split.grad, x.grad.chunk(setting.tp.size, -1)[setting.tp.rank])
    return {"output": relative_error(y_held, setting.held(y)), "dx": dx} | setting.weight_errors(whole, split)


def embedding(setting: Setting) -> dict[str, float]:
    whole, split = setting.pair(lambda tp: VocabParallelEmbedding(128, 24, tp))
    y, y_held = whole(setting.tokens), split(setting.tokens)
    dy = setting.random(*y.shape)
    y.backward(dy)
    y_held.backward(setting.held(dy))
    return {"output": relative_error(y_held, setting.held(y))} | setting.weight_errors(whole, split)


def heads(setting: Setting, mode: str) -> dict[str, float]:
    """Against whole logits and plain autograd."""

    def build(tp):
        heads_mode = "naive" if tp.size == 1 else mode
        heads_config = HeadsConfig(mode=heads_mode, loss_weights=WEIGHTS, chunk_tokens=5)
        return MultiTokenHeads(setting.config, heads_config, OpsConfig(), tp)

    whole, split = setting.pair(build)
    targets = torch.randint(0, 101, (3, setting.batch, SEQ_LEN), generator=setting.generator)
    targets[torch.rand(targets.shape, generator=setting.generator) < 0.3] = IGNORE
    z, z_held = _leaf(setting.x), _leaf(setting.held(setting.x))
    expected, losses = (module.loss(x, targets, setting.inputs) for module, x in ((whole, z), (split, z_held)))
    assert torch.equal(losses.counts, expected.counts) and torch.equal(losses.correct, expected.correct)
    with torch.no_grad():
        evaluated = split.loss(z_held, targets, setting.inputs)
        logits = split.logits(z_held, setting.inputs)
    padded = F.pad(whole.logits(z, setting.inputs).detach(), (0, 27))
    shard = split.output.shard
    found = {"loss": relative_error(losses.loss, expected.loss), "sums": relative_error(losses.sums, expected.sums)}
    found["evaluation"] = relative_error(evaluated.sums, expected.sums)
    found["logits"] = relative_error(logits, padded[..., shard.start : shard.start + logits.shape[-1]])
    (expected.loss * 3).backward()
    (losses.loss * 3).backward()
    return found | {"dz": relative_error(z_held.grad, setting.held(z.grad))} | setting.weight_errors(whole, split)


CHECKS = {
    "column": column,
    "row": row,
    "embedding": embedding,
    "norm": rms_norm,
    **{f"block, recompute {how}": functools.partial(block, recompute=how) for how in ("none", "selective", "full")},
    **{f"heads, {mode}": functools.partial(heads, mode=mode) for mode in ("sequential", "joint")},
}


def compare_all(grid, kv_heads: list[int]) -> dict[tuple, dict[str, float]]:
    """(key/value heads, sequence parallel, batch, layer) -> errors on this rank."""
    found = {}
    for kv in kv_heads:
        for sequence in (False, True):
            parallel = ParallelConfig(tensor=grid.world_size, sequence=sequence)
            place = {name: getattr(grid, name) for name in ("rank", "world_size", "local_rank", "device")}
            tp = ProcessGrid.build(parallel, kv, **place).tensor
            for batch in (1, 3):
                for name, check in CHECKS.items():
                    found[kv, sequence, batch, name] = check(Setting(tp, kv, batch))
    return found


@functools.cache
def compared(world: int) -> list[dict[tuple, dict[str, float]]]:
    return run_ranks(world, compare_all, [kv for ranks, kv in SPLITS if ranks == world])


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("sequence", [False, True], ids=["", "sequence"])
@pytest.mark.parametrize(("world", "kv_heads"), SPLITS)
def test_a_split_layer_is_the_whole_one(world, kv_heads, sequence, name):
    for rank, found in enumerate(compared(world)):
        for batch in (1, 3):
            errors = found[kv_heads, sequence, batch, name]
            assert errors and all(error <= EXACT for error in errors.values()), (rank, batch, errors)


@pytest.mark.parametrize(("world", "kv_heads"), SPLITS)
def test_initial_values_are_slices_of_the_whole_bit_for_bit(world, kv_heads):
    config = model_config(kv_heads)
    replicas = max(1, world // kv_heads)
    whole = {name: p for name, p, _ in sharded_parameters(build_model(config, seed=3).named_layers())}
    counted = {name: torch.zeros_like(p) for name, p in whole.items()}
    for rank in range(world):
        model = build_model(config, seed=3, tp=TensorParallel(rank, world, kv_replicas=replicas))
        for name, parameter, shard in sharded_parameters(model.named_layers()):
            assert torch.equal(parameter, shard.of(whole[name])), (rank, name)
            assert shard.shape == whole[name].shape
            shard.of(counted[name]).add_(shard.replica == 0)
    assert all((count == 1).all() for count in counted.values())  # each element is counted on one rank
    matrices = [name for name, p in whole.items() if p.dim() > 1]
    assert len(matrices) == 5 * 7 + 2 and all(whole[name].std() > 0 for name in matrices)
