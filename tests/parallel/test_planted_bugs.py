"""The matrix can fail: five bugs of the kind that it is there for, planted one at a time, each turn a case red."""

from contextlib import contextmanager
from unittest import mock

import pytest

from megamtp.model.heads import MultiTokenHeads
from megamtp.parallel.tensor import Shard, TensorParallel, split_range
from tests.distributed import run_ranks
from tests.parallel.cases import IGNORE, Case
from tests.parallel.matrix import errors, reference, run_cases, too_large

TP2 = Case(2, tensor=2, sequence=True, zero=1)
DP2 = Case(2, zero=0, mode="joint")
PP2 = Case(2, pipeline=2, zero=1)
TP4 = Case(4, tensor=4, zero=0, mode="joint")


def norm_gradients_not_reduced():
    """Under sequence parallelism each rank's gradient of a norm is that of its own slice."""
    return mock.patch.object(TensorParallel, "replicated_weight", lambda self, weight: weight)


def replicas_counted_twice():
    """In the gradient norm every rank counts what all tensor-parallel ranks hold."""
    import megamtp.engine.engine as engine

    build = engine.build_optimizer

    def build_counting_all(*args):
        adamw = build(*args)
        for group in adamw.param_groups:
            group["counts_in_norm"] = True
        return adamw

    return mock.patch.object(engine, "build_optimizer", build_counting_all)


def head_gradient_dropped():
    """The third head's loss is reported and not learnt from."""
    return weighted_loss(lambda k, weight, targets: weight * (k != 2))


def mean_of_means():
    """Each micro-batch's loss is a mean over its valid targets."""

    def new_weight(k, weight, targets):
        return weight * targets[k].numel() / max(1, (targets[k] != IGNORE).sum().item())

    return weighted_loss(new_weight)


def wrong_key_value_group():
    """Under replication, ranks 0, 2 and 1, 3 share a key/value head; the query heads of 0, 1 and 2, 3 want one."""

    def kv_shard(self, shape):
        copies, groups = self.kv_replicas, self.size // self.kv_replicas
        rows = split_range(shape[0], groups, self.rank % groups)
        return Shard(tuple(shape), 0, *rows, copies=copies, replica=self.rank // groups)

    return mock.patch.object(TensorParallel, "kv_shard", kv_shard)


@contextmanager
def weighted_loss(new_weight):
    """Other loss weights, by head, weight and targets, for the gradient of each micro-batch."""
    loss = MultiTokenHeads.loss

    def planted(self, z, targets, inputs):
        kept = self.loss_weights
        self.loss_weights = tuple(new_weight(k, weight, targets) for k, weight in enumerate(kept))
        try:
            return loss(self, z, targets, inputs)
        finally:
            self.loss_weights = kept

    with mock.patch.object(MultiTokenHeads, "loss", planted):
        yield


# (bug, a case that it turns red, what shows it)
PLANTED = [
    (norm_gradients_not_reduced, TP2, {"grad_norm", "parameters", "replicas"}),
    (replicas_counted_twice, TP2, {"grad_norm"}),
    (head_gradient_dropped, PP2, {"loss", "grad_norm", "parameters", "evaluation"}),
    (mean_of_means, DP2, {"loss", "grad_norm", "parameters", "evaluation"}),
    (wrong_key_value_group, TP4, {"loss", "grad_norm", "parameters", "evaluation", "replicas"}),
]


def train_with_bugs(grid, pairs):
    """All on one group of ranks: each case with its bug, then without."""
    trainings = [(run_cases(grid, [case], bug), run_cases(grid, [case])) for bug, case in pairs]
    return [(planted[0], clean[0]) for planted, clean in trainings] if grid.rank == 0 else None


@pytest.fixture(scope="module")
def trainings():
    found = {}
    for world in (2, 4):
        pairs = [(bug, case) for bug, case, _ in PLANTED if case.world == world]
        results = run_ranks(world, train_with_bugs, pairs, timeout=240)[0]
        found |= {bug: both for (bug, _), both in zip(pairs, results, strict=True)}
    return found


@pytest.mark.parametrize(("bug", "case", "shown_by"), PLANTED, ids=[bug.__name__ for bug, _, _ in PLANTED])
def test_a_planted_bug_turns_its_case_red(trainings, bug, case, shown_by):
    planted, clean = trainings[bug]
    expected = reference(case.n_trunk_layers, case.clip)
    assert too_large(errors(clean, expected)) == []
    red = errors(planted, expected)
    assert shown_by <= set(too_large(red)), red
