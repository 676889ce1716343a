import itertools
import json
import os
import signal

import numpy as np
import psutil
import pytest
import torch

from megamtp.config import from_dict
from megamtp.data.blend import Blend
from megamtp.data.dataset_writer import IndexedDatasetWriter
from megamtp.data.datasets import DataConfig
from megamtp.data.indexed_dataset import IndexedDataset
from megamtp.data.loader import Batch, Loader, validation_batches
from megamtp.data.samples import Samples
from megamtp.errors import RunFailure, UserError

LENGTHS = [13, 0, 40, 7, 90, 1, 1, 60, 88]  # 300 tokens


@pytest.fixture
def samples(write_dataset):
    return Samples(write_dataset(LENGTHS), seq_len=8, n_future_tokens=3, seed=11)


def rows(batches):
    return [row for batch in batches for row in batch.tokens.tolist()]


def expected_rows(samples, indices):
    return [samples.get(i)[0].tolist() for i in indices]


def global_steps(samples, n_steps, dp_size, micro, global_batch=8, state=None, **options):
    """The rows of each step, ranks joined in order."""
    loaders = [Loader(samples, global_batch, micro, rank, dp_size, **options) for rank in range(dp_size)]
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(json.loads(json.dumps(state)))
    steps = [rows(batch for loader in loaders for batch in loader.next_step()) for _ in range(n_steps)]
    for loader in loaders:
        loader.close()
    return steps, loaders


def all_documents(total):
    """Every way to cut ``total`` tokens into documents, empty ones aside."""
    for cuts in itertools.product([False, True], repeat=total - 1):
        yield np.cumsum([0, *cuts])


def test_targets_exhaustively():
    s, n = 5, 3
    ids = torch.tensor(np.stack(list(all_documents(s + n))), dtype=torch.int32)  # (2^7, s + n)
    tokens = torch.arange(ids.numel()).view(ids.shape)
    batch = Batch(tokens, ids, s)
    free, masked = batch.targets(mask_cross_document=False), batch.targets(mask_cross_document=True)
    assert free.shape == masked.shape == (n, len(ids), s) and free.dtype == masked.dtype == torch.int64
    for row, t, k in itertools.product(range(len(ids)), range(s), range(1, n + 1)):
        truth = int(tokens[row, t + k])
        assert free[k - 1, row, t] == truth
        assert masked[k - 1, row, t] == (truth if ids[row, t + k] == ids[row, t] else -100)


def test_targets_of_real_documents(tmp_path):
    """From files to targets: the k-th next token of the same document, or masked."""
    with IndexedDatasetWriter(tmp_path / "x", "int32") as writer:
        for document, length in enumerate(LENGTHS):
            writer.add_document(1000 * document + np.arange(length))  # token = document and place in it
    samples = Samples(IndexedDataset(tmp_path / "x"), 8, 3, seed=1)
    for index in range(samples.samples_per_epoch):
        tokens, ids = samples.get(index)
        batch = Batch(torch.tensor(tokens)[None], torch.tensor(ids)[None], 8)
        inputs, targets = batch.inputs[0].tolist(), batch.targets(True, ignore_index=-7)[:, 0].tolist()
        for t, k in itertools.product(range(8), (1, 2, 3)):
            document, place = divmod(inputs[t], 1000)
            truth = inputs[t] + k if place + k < LENGTHS[document] else -7
            assert targets[k - 1][t] == truth


def test_padding_is_never_a_target():
    tokens = torch.tensor([[4, 0, 5, -1, -1], [-1] * 5])
    batch = Batch(tokens, torch.zeros_like(tokens, dtype=torch.int32), 3)
    assert batch.inputs.tolist() == [[4, 0, 5], [0, 0, 0]]
    for mask in (False, True):
        assert batch.targets(mask).tolist() == [
            [[0, 5, -100], [-100] * 3],
            [[5, -100, -100], [-100] * 3],
        ]


def test_positions_restart_at_each_document():
    ids = torch.tensor(np.stack(list(all_documents(7))), dtype=torch.int32)
    positions = Batch(torch.zeros(ids.shape, dtype=torch.int64), ids, 5).positions()
    assert positions.shape == (len(ids), 5) and positions.dtype == torch.int64
    for row, row_ids in zip(positions.tolist(), ids.tolist(), strict=True):
        assert row == [t - row_ids.index(row_ids[t]) for t in range(5)]


@pytest.mark.parametrize("dp_size, micro", [(1, 8), (1, 1), (1, 4), (2, 4), (2, 1), (4, 1), (4, 2)])
def test_union_over_ranks_is_the_global_sequence(samples, dp_size, micro):
    n_steps = samples.samples_per_epoch // 4  # through two epochs
    steps, loaders = global_steps(samples, n_steps, dp_size, micro)
    for step, found in enumerate(steps):
        assert found == expected_rows(samples, range(step * 8, step * 8 + 8))
    assert all(loader.state_dict() == loaders[0].state_dict() for loader in loaders)
    assert loaders[0].epochs == {str(samples.dataset.prefix): n_steps * 8 / samples.samples_per_epoch}


def test_shapes_and_iteration(samples):
    loader = Loader(samples, global_batch_size=12, micro_batch_size=2, dp_rank=1, dp_size=3)
    for step in itertools.islice(loader, 3):
        assert len(step) == 2
        for batch in step:
            assert batch.tokens.shape == batch.document_ids.shape == (2, 11)
            assert batch.tokens.dtype == torch.int64 and batch.document_ids.dtype == torch.int32
    assert loader.consumed_samples == 36


@pytest.fixture
def blend(write_dataset):
    """Three sources in the ratio 5:3:2, from sample 50 on the third alone with a little of the first."""
    lengths = [LENGTHS, [50] * 9, [200, 0, 30]]
    sources = [Samples(write_dataset(of_source), 8, 3, seed=i) for i, of_source in enumerate(lengths)]
    return Blend(sources, [(0, [0.5, 0.3, 0.2]), (50, [1, 0, 9])])


def blend_rows(blend, first, last):
    """Rows of the samples [first, last) of the blend, one by one."""
    cursor = blend.cursor()
    pairs = [cursor.take(1) for _ in range(last)]
    return [blend.sources[int(source[0])].get(int(index[0]))[0].tolist() for source, index in pairs[first:]]


@pytest.mark.parametrize(
    "dp_size, micro, global_batch, workers", [(1, 1, 8, 0), (4, 2, 8, 0), (2, 2, 12, 2), (1, 4, 8, 3)]
)
@pytest.mark.parametrize("stopped_after", [0, 3, 6])
def test_resume_on_another_layout(blend, dp_size, micro, global_batch, workers, stopped_after):
    """Saved at DP 2 by loaders whose workers have read ahead; other ranks, micro-batch, global batch, workers go on."""
    before, loaders = global_steps(blend, stopped_after, dp_size=2, micro=4, workers=1, prefetch=2)
    state = loaders[1].state_dict()
    assert state == loaders[0].state_dict() and state["consumed_samples"] == 8 * stopped_after
    after, _ = global_steps(blend, 4, dp_size, micro, global_batch, state, workers=workers)
    read = [row for step in before + after for row in step]
    assert read == blend_rows(blend, 0, 8 * stopped_after + 4 * global_batch)


@pytest.mark.parametrize("workers, prefetch", [(1, 1), (2, 4), (3, 2)])
def test_workers_give_what_reading_in_place_gives(blend, workers, prefetch):
    here, _ = global_steps(blend, 12, dp_size=2, micro=2)
    there, _ = global_steps(blend, 12, dp_size=2, micro=2, workers=workers, prefetch=prefetch)
    assert there == here


def test_workers_read_in_other_processes_and_transform_there(blend):
    loader = Loader(blend, 8, 4, 0, 1, workers=2, transform=lambda batch: (os.getpid(), batch.inputs))
    pids = {pid for pid, _ in loader.next_step() + loader.next_step()}
    assert len(pids) == 2 and os.getpid() not in pids
    loader.close()
    for pid in pids:
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_dead_worker_is_told(blend):
    loader = Loader(blend, 8, 4, 0, 1, workers=2, prefetch=1, transform=lambda batch: os.getpid())
    pid = loader.next_step()[0]
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RunFailure, match=f"DataLoader worker .*{pid}.* exited unexpectedly") as error:
        for _ in range(10):
            loader.next_step()
    assert "\n" not in str(error.value)
    loader.close()


def test_an_error_in_a_worker_keeps_its_traceback(blend):
    def fail(batch):
        raise ArithmeticError("in the transform")

    loader = Loader(blend, 8, 4, 0, 1, workers=1, transform=fail)
    with pytest.raises(ArithmeticError, match="in the transform"):
        loader.next_step()
    loader.close()


def test_weights_may_change_from_the_present_on(blend):
    _, [loader] = global_steps(blend, 5, dp_size=1, micro=8)
    later = Blend(blend.sources, [(0, [0.5, 0.3, 0.2]), (40, [0, 1, 0])])
    resumed = Loader(later, 8, 8, 0, 1)
    resumed.load_state_dict(loader.state_dict())
    expected = [blend.sources[1].get(12 + i)[0].tolist() for i in range(8)]  # 0.3 x 40 are consumed
    assert rows(resumed.next_step()) == expected
    with pytest.raises(UserError, match="stages before sample 40 differ"):
        Loader(Blend(blend.sources, [(0, [0.6, 0.2, 0.2])]), 8, 8, 0, 1).load_state_dict(loader.state_dict())
    with pytest.raises(UserError, match="made with 3 data sources, now there are 2"):
        Loader(Blend(blend.sources[:2], [(0, [0.5, 0.5])]), 8, 8, 0, 1).load_state_dict(loader.state_dict())


def test_state_of_other_data_is_refused(samples, write_dataset, tmp_path):
    _, [loader] = global_steps(samples, 2, dp_size=1, micro=2)
    state = loader.state_dict()
    with IndexedDatasetWriter(tmp_path / "same_size", "int32") as writer:
        writer.add_document(np.arange(300)[::-1])
    others = {
        "seed": Samples(samples.dataset, 8, 3, seed=12),
        "shuffle": Samples(samples.dataset, 8, 3, seed=11, shuffle=False),
        "seq_len": Samples(samples.dataset, 9, 3, seed=11),
        "n_future_tokens": Samples(samples.dataset, 8, 4, seed=11),
        "n_tokens": Samples(write_dataset([301]), 8, 3, seed=11),
        "sampled_tokens_crc32": Samples(IndexedDataset(tmp_path / "same_size"), 8, 3, seed=11),
    }
    for key, other in others.items():
        loader = Loader(other, 8, 2, 0, 1)
        with pytest.raises(UserError, match=f"other data: {key} was") as error:
            loader.load_state_dict(state)
        assert "\n" not in str(error.value)
        assert loader.consumed_samples == 0


@pytest.mark.parametrize("size, use", [(10, "8 or 12"), (3, "4"), (0, "4")])
def test_indivisible_global_batch(samples, size, use):
    with pytest.raises(UserError, match=f"global_batch_size {size} does not divide .* 2 on 2 .*; use {use}$"):
        Loader(samples, size, 2, 0, 2)


@pytest.mark.parametrize("dp_size, micro", [(1, 1), (1, 5), (2, 3), (4, 2), (4, 16)])
@pytest.mark.parametrize("max_samples", [None, 1, 13, 10_000])
def test_validation_sees_each_sample_once(write_dataset, dp_size, micro, max_samples):
    samples = Samples(write_dataset(LENGTHS), 8, 3, seed=0, shuffle=False)
    ranks = [list(validation_batches(samples, micro, rank, dp_size, max_samples)) for rank in range(dp_size)]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(batch.tokens.shape == (micro, 11) for batches in ranks for batch in batches)
    found = [row for batches in ranks for row in rows(batches) if row != [-1] * 11]
    total = min(samples.samples_per_epoch, max_samples or samples.samples_per_epoch)
    assert sorted(found) == expected_rows(samples, range(total))
    assert len(ranks[0]) == -(-total // (micro * dp_size))


def test_config():
    config = from_dict(DataConfig, {"train": "data/x"}, "test")
    assert (config.seq_len, config.validation, config.mask_cross_document_targets) == (1024, None, True)
    for values in ({}, {"train": "x", "seq_len": 0}, {"train": "x", "seqlen": 8}):
        with pytest.raises(UserError):
            from_dict(DataConfig, values, "test")
