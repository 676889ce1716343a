"""What is in a checkpoint, what is refused, and what a crash leaves behind."""

import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megamtp.errors import UserError
from megamtp.model.model import build_model, logical_parameters
from megamtp.training import checkpoint as checkpoint_module
from megamtp.training import pieces as pieces_module
from megamtp.training.checkpoint import Checkpoint, latest_checkpoint
from tests.distributed import RankError, run_rank, run_ranks, start_ranks
from tests.training.tiny import events, exact, newest, run_config, run_training, step_lines

KINDS = ("weight", "exp_avg", "exp_avg_sq")
CHANGES = {"training.steps": 2, "parallel.zero_stage": 1}


def train_and_keep_weights(grid, config) -> dict[str, torch.Tensor]:
    """The weights that the model computes with at the end of the run."""
    from megamtp.engine.engine import Engine
    from megamtp.training import loop

    engines = []
    init_untouched = Engine.__init__

    def init(self, *args, **options):
        init_untouched(self, *args, **options)
        engines.append(self)

    Engine.__init__ = init
    loop.train(config, grid)
    return {name: p.detach().clone() for name, p in logical_parameters(engines[0].module)}


@pytest.fixture(scope="module", params=[(1, 0), (1, 1), (2, 0), (2, 1)], ids=str)
def saved(request, corpus, tmp_path_factory):
    """(checkpoint, the weights of the model that wrote it), of every layout."""
    world_size, zero_stage = request.param
    folder = tmp_path_factory.mktemp("saved")
    config = run_config(folder, corpus, CHANGES | {"parallel.zero_stage": zero_stage})
    weights = run_ranks(world_size, train_and_keep_weights, config)[0]
    return newest(folder), weights


@pytest.fixture(scope="module")
def two_ranks(corpus, tmp_path_factory) -> Path:
    """The run directory of two ranks with ZeRO 1, whose checkpoint has the most borders. Copy it before use."""
    folder = tmp_path_factory.mktemp("two_ranks")
    run_ranks(2, run_training, run_config(folder, corpus, CHANGES))
    return folder


@pytest.fixture
def damaged(two_ranks, tmp_path) -> Path:
    """A run directory to break."""
    return Path(shutil.copytree(two_ranks, tmp_path / "damaged"))


# --- contents


def key_of(kind: str, name: str, piece: dict) -> str:
    return f"{kind}/{name}/{piece['columns'][0]}-{piece['columns'][1]}/{piece['start']}"


def test_every_parameter_is_there_once_with_both_moments(saved, corpus, tmp_path):
    checkpoint, _ = saved
    model = build_model(run_config(tmp_path, corpus).model, seed=0)
    shapes = {name: list(p.shape) for name, p in logical_parameters(model)}
    manifest = checkpoint.manifest["tensors"]
    assert {name: tensor["shape"] for name, tensor in manifest.items()} == shapes

    keys: dict[str, int] = {}  # of all rank files, with their numbers of elements
    for file in checkpoint.path.glob("*.safetensors"):
        for key, tensor in load_file(file).items():
            assert key not in keys, f"{key} is in two files"
            assert tensor.dtype == torch.float32
            keys[key] = tensor.numel()
    expected = {}
    for name, tensor in manifest.items():
        end = 0
        for piece in sorted(tensor["pieces"], key=lambda piece: piece["start"]):
            assert piece["columns"] == [0, tensor["shape"][-1]], f"{name}: no tensor parallelism here"
            assert piece["start"] == end, f"{name}: a hole or an overlap at {end}"
            end = piece["stop"]
            expected |= {key_of(kind, name, piece): piece["stop"] - piece["start"] for kind in KINDS}
        assert end == torch.Size(tensor["shape"]).numel(), name
    assert keys == expected


def test_weights_are_those_of_the_model(saved):
    checkpoint, weights = saved
    for name, weight in weights.items():
        assert torch.equal(checkpoint.tensor(name), weight), name
    assert checkpoint.manifest["optimizer_steps"] == 2
    # Moments of real gradients: neither empty nor the same tensor twice.
    squares = checkpoint.tensor("layers.0.attention.wq.weight", "exp_avg_sq")
    assert (squares > 0).all()
    assert not torch.equal(squares, checkpoint.tensor("layers.0.attention.wq.weight", "exp_avg"))


def test_any_range_reads_across_the_borders_of_pieces(two_ranks):
    checkpoint = newest(two_ranks)
    cut = {name: t for name, t in checkpoint.manifest["tensors"].items() if len(t["pieces"]) > 1}
    assert cut  # the border between the two ranks
    files = {file.name: load_file(file) for file in checkpoint.path.glob("*.safetensors")}
    draw = random.Random(0)
    for name, tensor in cut.items():
        pieces = sorted(tensor["pieces"], key=lambda piece: piece["start"])
        for kind in KINDS:
            whole = torch.cat([files[p["file"]][key_of(kind, name, p)] for p in pieces])
            border, size = pieces[0]["stop"], len(whole)
            ranges = [(0, size), (border - 1, border + 1), (border, size), (0, border), (border, border)]
            ranges += [tuple(sorted(draw.choices(range(size + 1), k=2))) for _ in range(20)]
            for start, stop in ranges:
                assert torch.equal(checkpoint.read(name, kind, start, stop), whole[start:stop]), (name, start, stop)


def test_a_range_that_is_not_covered_is_refused(two_ranks):
    checkpoint = newest(two_ranks)
    name, tensor = next((n, t) for n, t in checkpoint.manifest["tensors"].items() if len(t["pieces"]) > 1)
    border = tensor["pieces"][0]["stop"]
    end = torch.Size(tensor["shape"]).numel()
    with pytest.raises(UserError, match="not wholly there"):
        checkpoint.read(name, "weight", end - 1, end + 1)
    del tensor["pieces"][1]
    assert len(checkpoint.read(name, "weight", 0, border)) == border
    with pytest.raises(UserError, match="not wholly there"):
        checkpoint.read(name, "weight", 0, border + 1)


# --- refusals


def refusal(action) -> str:
    """The one line that ``action`` is refused with."""
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


def open_newest(run_dir: Path) -> Checkpoint:
    return Checkpoint.open(latest_checkpoint(run_dir / "checkpoints"))


def checkpoint_folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "step-00000002"


def test_a_truncated_file_is_refused(damaged):
    file = checkpoint_folder(damaged) / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    message = refusal(lambda: open_newest(damaged))
    assert str(file) in message
    assert "use an earlier checkpoint" in message


def test_a_missing_file_is_refused(damaged):
    (checkpoint_folder(damaged) / "rank-00000.safetensors").unlink()
    assert "rank-00000.safetensors: is missing" in refusal(lambda: open_newest(damaged))


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 0x10
    file.write_bytes(data)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_flipped_bit_is_refused(damaged, corpus, rank):
    file = checkpoint_folder(damaged) / f"rank-0000{rank}.safetensors"
    flip_a_bit(file)
    checkpoint = open_newest(damaged)  # sizes are right
    assert f"{file}: damaged" in refusal(checkpoint.verify)
    assert refusal(lambda: checkpoint.verify([file.name]))
    checkpoint.verify([f"rank-0000{1 - rank}.safetensors"])
    config = run_config(damaged, corpus, CHANGES | {"training.steps": 4})
    with pytest.raises(RankError, match=rf"none of the 1 checkpoints is whole.*rank-0000{rank}.safetensors: damaged"):
        run_rank(run_training, config)


def test_two_ranks_refuse_a_flipped_bit_that_one_of_them_reads(damaged, corpus):
    """Rank 0 needs only its own file; it must not wait for the other for ever."""
    flip_a_bit(checkpoint_folder(damaged) / "rank-00001.safetensors")
    config = run_config(damaged, corpus, CHANGES | {"training.steps": 4})
    with pytest.raises(RankError, match="UserError: .*rank-00001.safetensors: damaged"):
        run_ranks(2, run_training, config)
    assert step_lines(damaged)[-1]["step"] == 2


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ('{"format": "another", "version": 1}', "format 'another' version 1"),
        ('{"format": "megamtp-checkpoint", "version": 1}', "version 1; this program reads"),
        ("{}", "format None"),
        ('{"format": "megamtp-ch', "cannot be read"),
        ("", "cannot be read"),
        ("[]", "is no checkpoint's manifest"),
        ('{"format": "megamtp-checkpoint", "version": 2}', "lacks files, model, optimizer_steps"),
        ('{"format": "megamtp-checkpoint", "version": 3}', "damaged, its checksum is wrong"),
    ],
)
def test_a_foreign_or_torn_manifest_is_refused(damaged, manifest, message):
    file = checkpoint_folder(damaged) / "manifest.json"
    file.write_text(manifest)
    assert message in (text := refusal(lambda: open_newest(damaged)))
    assert str(file) in text


def test_a_folder_without_manifest_is_refused(damaged):
    (checkpoint_folder(damaged) / "manifest.json").unlink()
    assert "not a complete checkpoint" in refusal(lambda: open_newest(damaged))


def test_latest_naming_a_missing_folder_is_refused(damaged):
    (damaged / "checkpoints" / "latest").write_text("step-00000009")
    assert "step-00000009, which is not there" in refusal(lambda: open_newest(damaged))


def test_no_latest_is_no_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path / "checkpoints") is None


def test_another_model_is_refused_by_what_differs(two_ranks):
    checkpoint = newest(two_ranks)
    checkpoint.require_model(checkpoint.manifest["model"])
    ours = checkpoint.manifest["model"] | {"n_kv_heads": 4}
    assert "n_kv_heads is 2 there and 4 here" in refusal(lambda: checkpoint.require_model(ours))


def test_a_manifest_that_is_older_than_an_option_means_what_the_model_was_then(two_ranks):
    checkpoint = newest(two_ranks)
    ours = dict(checkpoint.manifest["model"])
    assert checkpoint.manifest["model"].pop("replicated_unembedding") is False
    checkpoint.require_model(ours)
    other = ours | {"replicated_unembedding": True}
    assert "replicated_unembedding is False there and True here" in refusal(lambda: checkpoint.require_model(other))


# --- crashes


def run_with_fault(grid, config, fault: str) -> int:
    """Something happens while the checkpoint of step 4 is written, on the last rank."""
    from megamtp.training import loop

    save_untouched, write_untouched = pieces_module.save_file, checkpoint_module.write_atomic
    rename_untouched = Path.rename

    def strike(kind: str, path: Path) -> None:
        if fault.endswith(kind) and "step-00000004" in str(path):
            if fault.startswith("kill"):
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError("No space left on device")

    def save_file(tensors, path):
        if grid.rank == grid.world_size - 1:
            Path(path).write_bytes(b"half")
            strike("in the fragments", path)
        save_untouched(tensors, path)

    def write_atomic(path, data):
        if path.name == "manifest.json":
            strike("before the manifest", path)
        if path.name == "latest" and data == b"step-00000004":
            strike("before latest", path / data.decode())
        write_untouched(path, data)

    def rename(self, target):
        strike("before the rename", target)
        return rename_untouched(self, target)

    pieces_module.save_file, checkpoint_module.write_atomic, Path.rename = save_file, write_atomic, rename
    return loop.train(config, grid)


@pytest.mark.parametrize(
    "fault",
    [
        "kill in the fragments",
        "kill before the manifest",
        "kill before the rename",
        "kill before latest",
        "raise in the fragments",
        "raise before the rename",
    ],
)
def test_a_crash_while_saving_leaves_the_checkpoint_before_it(corpus, tmp_path, fault):
    changes = {"training.steps": 6, "training.checkpoint_every": 2, "parallel.zero_stage": 1}
    config = run_config(tmp_path / "run", corpus, changes)
    if fault.startswith("kill"):
        with pytest.raises(RankError, match=f"exit code {-signal.SIGKILL}"):
            run_rank(run_with_fault, config, fault)
    else:  # training goes on, and the next save succeeds
        assert run_rank(run_with_fault, config, fault) == 0
        [failed] = events(tmp_path / "run", "checkpoint_failed")
        assert failed["step"] == 4 and "No space left on device" in failed["error"]
    folder = tmp_path / "run" / "checkpoints"
    if fault.startswith("kill"):
        assert latest_checkpoint(folder).name == "step-00000002"
        newest(tmp_path / "run").verify()
    complete = [path for path in folder.glob("step-*") if path.suffix != ".tmp"]
    for path in complete:
        Checkpoint.open(path).verify()
    steps = ["2", "4"] if "latest" in fault else ["2"] if fault.startswith("kill") else ["2", "6"]
    assert sorted(path.name for path in complete) == [f"step-0000000{step}" for step in steps]

    assert run_rank(run_training, config) == 0
    left = "step-00000004" if fault.startswith("kill") else "step-00000002"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", left, "step-00000006"]
    newest(tmp_path / "run").verify()
    assert run_rank(run_training, run_config(tmp_path / "unbroken", corpus, changes)) == 0
    ours, unbroken = (step_lines(tmp_path / name) for name in ("run", "unbroken"))
    assert [exact(line) for line in ours] == [exact(line) for line in unbroken]


def run_on_a_full_disk(grid, config) -> int:
    """From step 4 on the last rank's disk is full."""
    from megamtp.training import loop

    save_untouched = pieces_module.save_file

    def save_file(tensors, path):
        if grid.rank == grid.world_size - 1 and "step-00000002" not in str(path):
            Path(path).write_bytes(b"half")
            raise OSError("No space left on device")
        save_untouched(tensors, path)

    pieces_module.save_file = save_file
    return loop.train(config, grid)


@pytest.mark.parametrize("background", [True, False])
def test_a_disk_that_stays_full_ends_the_run_at_its_end_on_all_ranks(corpus, tmp_path, background):
    changes = {"training.steps": 6, "training.checkpoint_every": 2, "parallel.zero_stage": 1}
    config = run_config(tmp_path, corpus, changes | {"training.background_save": background})
    outcomes = start_ranks(2, _with_start, run_on_a_full_disk, config)
    for outcome in outcomes:
        assert "RunFailure: the last checkpoint was not written: " in outcome.error
        assert "No space left on device" in outcome.error
    assert "rank 1: " in outcomes[0].error  # who did not fail itself names the one that did
    assert [line["step"] for line in step_lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert [event["step"] for event in events(tmp_path, "checkpoint_failed")] == [4, 6]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000002"]
    newest(tmp_path).verify()


def _with_start(function, *args):
    from megamtp.engine.launch import start_processes

    return function(start_processes(), *args)


# --- how many are kept


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_exactly_the_newest_are_kept(corpus, tmp_path, keep):
    changes = {"training.steps": 8, "training.checkpoint_every": 2, "training.keep_checkpoints": keep}
    run_rank(run_training, run_config(tmp_path, corpus, changes))
    kept = [f"step-{step:08d}" for step in (2, 4, 6, 8)[-keep:]]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", *kept]
    assert (tmp_path / "checkpoints" / "latest").read_text() == kept[-1]


def test_going_back_by_hand_never_loses_the_new_checkpoints(corpus, tmp_path):
    """A user names an earlier checkpoint in ``latest``, as the messages advise; later ones lie there still."""
    changes = {"training.steps": 8, "training.checkpoint_every": 4, "training.stop_after": 8}
    run_rank(run_training, run_config(tmp_path, corpus, changes))
    (tmp_path / "checkpoints" / "latest").write_text("step-00000004")
    changes |= {"training.checkpoint_every": 1, "training.stop_after": 6, "training.keep_checkpoints": 1}
    run_rank(run_training, run_config(tmp_path, corpus, changes))
    assert newest(tmp_path).manifest["step"] == 6
    newest(tmp_path).verify()


def test_a_manifest_is_plain_json_and_names_what_is_needed(two_ranks):
    manifest = json.loads((checkpoint_folder(two_ranks) / "manifest.json").read_text())
    assert manifest["step"] == 2
    assert manifest["state"]["loader"]["consumed_samples"] == 16
    counters = {"tokens": 2 * 8 * 16, "skipped_steps": 0, "rollbacks": 0, "rollbacks_to_this_step": 0}
    assert manifest["state"]["counters"] == counters
    assert len(manifest["state"]["guard"]["losses"]) == 2
    assert set(manifest["files"]) == {"rank-00000.safetensors", "rank-00001.safetensors"}
