"""What a run decides by its device; the GPUs are imagined."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megamtp.ops.cross_entropy import chunk_for_memory
from megamtp.planner.stages import plan_stages
from megamtp.training import device
from megamtp.training.device import choose_chunk, choose_kernels, device_peak, grow_segments
from tests.training.tiny import run_config

GIB = 2**30


@pytest.mark.parametrize(
    ("free", "tokens", "expected"),
    [
        (50 * GIB, 4096, 4096),
        (50 * GIB, 100_000, 16_384),
        (50 * GIB, 100, 256),
        (50 * GIB, 5000, 8192),  # the whole micro-batch in one
        (5 * GIB, 100_000, 8192),  # 8192 x 32000 x 2 bytes are 0.49 GiB
        (4 * GIB, 100_000, 4096),
        (0, 100_000, 256),
    ],
)
def test_chunk_by_memory(free, tokens, expected):
    assert chunk_for_memory(free, n_rows=32_000, n_tokens=tokens, itemsize=2) == expected


def config_and_stages(tmp_path, changes):
    config = run_config(tmp_path, tmp_path, changes)
    stages = plan_stages(
        config.model,
        config.heads,
        config.parallel,
        seq_len=config.data.seq_len,
        micro_batch_size=config.training.micro_batch_size,
        micro_batches=4,
        precision=config.training.precision,
        dp_size=1,
    )
    return config, stages


def test_the_chunk_is_what_the_heads_stage_has_room_for(tmp_path):
    changes = {"model.vocab_size": 32_000, "data.seq_len": 4096, "training.micro_batch_size": 2}
    config, stages = config_and_stages(tmp_path, changes)
    memory = stages[-1].rank_memory
    rest = memory.total - memory.loss_buffers
    assert choose_chunk(config, stages, 80 * GIB).heads.chunk_tokens == 8192
    just_enough = (rest + 10 * 1024 * 32_000 * 4) / 0.9
    assert choose_chunk(config, stages, int(just_enough) + 100).heads.chunk_tokens == 1024
    assert choose_chunk(config, stages, int(just_enough) - 100_000).heads.chunk_tokens == 512
    asked = replace(config, heads=replace(config.heads, chunk_tokens=99))
    assert choose_chunk(asked, stages, 80 * GIB).heads.chunk_tokens == 99


def test_tensor_parallel_ranks_hold_fewer_logits(tmp_path):
    changes = {"model.vocab_size": 32_000, "data.seq_len": 4096, "parallel.tensor": 2}
    config, stages = config_and_stages(tmp_path, changes)
    memory = stages[-1].rank_memory
    gpu = (memory.total - memory.loss_buffers + 10 * 1024 * 16_000 * 4) / 0.9
    assert choose_chunk(config, stages, int(gpu) + 100).heads.chunk_tokens == 1024


def test_kernels_of_this_machine(tmp_path):
    config, table = choose_kernels(run_config(tmp_path, tmp_path))
    assert config.ops.attention and config.ops.cross_entropy and config.ops.adamw
    assert table.startswith("kernels on ") and config.ops.attention in table


def test_peak(tmp_path):
    config = run_config(tmp_path, tmp_path)
    cpu = torch.device("cpu")
    assert device_peak(config, cpu) is None
    asked = replace(config, training=replace(config.training, peak_tflops=12.5))
    assert device_peak(asked, cpu) == 12.5


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:128"}, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:128"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": ""}, {"PYTORCH_CUDA_ALLOC_CONF": ""}),
    ],
)
def test_the_allocator_is_told_unless_the_user_has(before, after, monkeypatch):
    monkeypatch.setattr(device, "os", SimpleNamespace(environ=before))
    grow_segments()
    assert before == after
