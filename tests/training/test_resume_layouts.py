"""A run that changes its layout at every stop goes on as the run that never stopped."""

import shutil
from typing import Any

import pytest
import torch

from megamtp.engine.launch import start_processes
from megamtp.training.checkpoint import Checkpoint, save_checkpoint
from megamtp.training.loop import engine_of_run
from tests.distributed import run_ranks
from tests.training.tiny import newest, relative_error, run_config, run_training, step_lines, tensors, validation_lines

Layout = tuple[int, dict[str, Any]]

TP2_PP2: Layout = 4, {"parallel.tensor": 2, "parallel.pipeline": 2}
DP2_ZERO3: Layout = 2, {"parallel.zero_stage": 3}
TP4: Layout = 4, {"parallel.tensor": 4, "parallel.zero_stage": 0}
PP2_DUALPIPEV: Layout = 2, {"parallel.pipeline": 2, "parallel.schedule": "dualpipev", "parallel.zero_stage": 1}
LEGS = [TP2_PP2, DP2_ZERO3, TP4, PP2_DUALPIPEV, TP2_PP2]
LEG = 4
SAME = {
    "training.steps": LEG * len(LEGS),
    "training.eval_every": LEG,
    "data.document_attention": True,
    "training.micro_batch_size": 2,
}


def test_a_run_that_changes_its_layout_at_every_stop_is_the_unbroken_run(corpus, tmp_path):
    run_ranks(1, run_training, run_config(tmp_path / "unbroken", corpus, SAME))
    moved = tmp_path / "moved"
    for index, (world_size, layout) in enumerate(LEGS):
        stop = {"training.stop_after": LEG * (index + 1)}
        run_ranks(world_size, run_training, run_config(moved, corpus, SAME | layout | stop))
    assert [line["step"] for line in step_lines(moved)] == list(range(1, LEG * len(LEGS) + 1))
    for ours, theirs in zip(step_lines(moved), step_lines(tmp_path / "unbroken"), strict=True):
        assert ours["loss_per_head"] == pytest.approx(theirs["loss_per_head"], rel=5e-6), ours["step"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-5), ours["step"]
        assert [ours[key] for key in ("tokens", "lr", "epoch")] == [theirs[key] for key in ("tokens", "lr", "epoch")]
    for ours, theirs in zip(validation_lines(moved), validation_lines(tmp_path / "unbroken"), strict=True):
        assert ours["validation_loss_per_head"] == pytest.approx(theirs["validation_loss_per_head"], rel=5e-6)
    for kind, tolerance in (("weight", 1e-4), ("exp_avg", 1e-3), ("exp_avg_sq", 1e-3)):
        expected = tensors(newest(tmp_path / "unbroken"), kind)
        for name, tensor in tensors(newest(moved), kind).items():
            assert relative_error(tensor, expected[name]) < tolerance, f"{kind} of {name}"


# --- loading and saving again changes no bit, whatever the layouts

ON_FOUR_RANKS: dict[str, dict[str, Any]] = {
    "TP 2, PP 2, ZeRO-1": {"parallel.tensor": 2, "parallel.pipeline": 2, "parallel.zero_stage": 1},
    "TP 4 with KV heads in two copies": {"parallel.tensor": 4, "parallel.sequence": False},
    "PP 4": {"parallel.pipeline": 4},
    "PP 2, DP 2, DualPipeV, ZeRO-1": {
        "parallel.pipeline": 2,
        "parallel.schedule": "dualpipev",
        "parallel.zero_stage": 1,
        "training.micro_batch_size": 1,
    },
    "TP 2, DP 2, ZeRO-3": {"parallel.tensor": 2, "parallel.zero_stage": 3},
    "DP 4, ZeRO-2, bf16": {"parallel.zero_stage": 2, "training.precision": "bf16"},
    "DP 4, ZeRO-3, bf16": {"parallel.zero_stage": 3, "training.precision": "bf16"},
    "TP 2, PP 2, ZeRO-1, bf16": {
        "parallel.tensor": 2,
        "parallel.pipeline": 2,
        "parallel.zero_stage": 1,
        "training.precision": "bf16",
    },
    "DP 4, ZeRO-1, offloaded": {"parallel.zero_stage": 1, "parallel.offload_optimizer": True},
    "DP 4, ZeRO-3, offloaded": {"parallel.zero_stage": 3, "parallel.offload_optimizer": True},
}


def load_and_save_in_turn(_, configs, first: str, folder: str) -> list[tuple[str, int]]:
    """In each config's layout: load the last one's checkpoint, save it. (path, parameters held by the model)."""
    saved = [(first, 0)]
    for index, config in enumerate(configs):
        grid = start_processes(config.parallel, config.model.kv_heads)
        engine = engine_of_run(config, grid, seed=index)
        Checkpoint.open(saved[-1][0]).load_into(engine)
        path = save_checkpoint(folder / str(index), engine, step=1, model_config={}, state={}, keep=1)
        saved.append((path, sum(p.numel() for p in engine.module.parameters())))
    return saved[1:]


def test_loading_and_saving_in_any_layout_changes_no_bit(corpus, tmp_path):
    source = run_config(tmp_path / "run", corpus, {"training.steps": 2})
    run_ranks(1, run_training, source)
    configs = [run_config(tmp_path / "unused", corpus, changes) for changes in ON_FOUR_RANKS.values()]
    start = newest(tmp_path / "run")
    [saved, *_] = run_ranks(4, load_and_save_in_turn, configs, start.path, tmp_path)
    for (path, _), layout in zip(saved, ON_FOUR_RANKS, strict=True):
        again = Checkpoint.open(path)
        assert again.manifest["optimizer_steps"] == 2, layout
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            expected = tensors(start, kind)
            ours = tensors(again, kind)
            assert ours.keys() == expected.keys(), layout
            for name, tensor in expected.items():
                assert torch.equal(ours[name], tensor), f"{layout}: {kind} of {name}"
        files = [path / name for name in again.manifest["files"]]
        held = sum(piece["stop"] - piece["start"] for t in again.manifest["tensors"].values() for piece in t["pieces"])
        assert held == sum(tensor.numel() for tensor in expected.values()), f"{layout}: something is saved twice"
        assert len(files) == 4, layout
        shutil.rmtree(path)
