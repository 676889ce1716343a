"""What goes wrong: one clear line, nothing that looks complete, memory that does not grow with the model."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megamtp.convert import output as output_module
from megamtp.convert import safetensors_file
from megamtp.convert.export import export
from megamtp.convert.import_run import import_run
from megamtp.convert.safetensors_file import map_tensors
from megamtp.errors import RunFailure, UserError
from megamtp.training.checkpoint import write_manifest
from tests.convert.models import config_of_run, foreign_llama, parameters_of, write_run
from tools.convert_checkpoint import main

ROOT = Path(__file__).parents[2]
NAMED_AFTER_THE_RUN = ("README.md", "megamtp.json")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    config = config_of_run(vocab_size=257)
    return write_run(tmp_path_factory.mktemp("run") / "run", config, parameters_of(config))


def refused(capsys, *arguments) -> str:
    """The one line of a command that ends with exit code 2."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert caught.value.code == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    return told[0]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", ["export", "import"])
def test_inputs_and_outputs_that_do_not_do(run_dir, tmp_path, capsys, command):
    assert "is not there" in refused(capsys, command, tmp_path / "nothing", tmp_path / "out")
    assert "no model here" in refused(capsys, command, tmp_path, tmp_path / "out")
    (tmp_path / "file").write_text("")
    assert "cannot write here" in refused(capsys, command, run_dir, tmp_path / "file" / "out")
    assert "exists already" in refused(capsys, command, run_dir, tmp_path / "file")
    assert "--force does not replace it" in refused(capsys, command, run_dir, tmp_path / "file", "--force")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("")
    assert "exists already" in refused(capsys, command, run_dir, tmp_path / "mine")
    assert "--force does not replace it" in refused(capsys, command, run_dir, tmp_path / "mine", "--force")
    assert "holds the source itself" in refused(capsys, command, run_dir, run_dir, "--force")
    assert "holds the source itself" in refused(capsys, command, run_dir, run_dir.parent, "--force")
    assert names(tmp_path) == ["file", "mine"] and names(tmp_path / "mine") == ["precious"]


def test_options_that_do_not_do(run_dir, tmp_path, capsys):
    assert "--shard-size" in refused(capsys, "export", run_dir, tmp_path / "out", "--shard-size", "big")
    assert "no such tokenizer" in refused(capsys, "export", run_dir, tmp_path / "out", "--tokenizer", "/nothing")
    foreign_llama(tmp_path / "llama")
    for value in ("0", "-1", "x"):
        with pytest.raises(SystemExit) as caught:
            main(["import", str(tmp_path / "llama"), str(tmp_path / "out"), "--n-future-tokens", value])
        assert caught.value.code == 2
    assert names(tmp_path) == ["llama"]


@pytest.mark.parametrize("command", ["export", "import"])
def test_a_damaged_checkpoint_is_told_and_leaves_nothing(tmp_path, capsys, command):
    config = config_of_run(vocab_size=257)
    run_dir = write_run(tmp_path / "run", config, parameters_of(config))
    file = run_dir / "checkpoints/step-00000002/rank-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-9] ^= 4
    file.write_bytes(data)
    before = names(tmp_path)
    assert f"{file}: damaged" in refused(capsys, command, run_dir, tmp_path / "out")
    assert names(tmp_path) == before


def test_moments_are_neither_read_nor_checked(run_dir, tmp_path, capsys):
    """Unless the checkpoint is of a program that kept no checksum of the weights alone."""
    damaged = Path(shutil.copytree(run_dir, tmp_path / "damaged"))
    folder = damaged / "checkpoints/step-00000002"
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        data = bytearray((folder / name).read_bytes())
        first, last = entry["weights"]["without"]
        moments = [key for key in map_tensors(folder / name) if not key.startswith("weight/")]
        tensors = map_tensors(folder / name)
        assert last - first == sum(tensors[key].nbytes for key in moments) > 0
        data[first] ^= 1
        data[last - 1] ^= 1
        (folder / name).write_bytes(data)
    export(damaged, tmp_path / "out")
    export(run_dir, tmp_path / "expected")
    expected = content(tmp_path / "expected")
    assert {name: data for name, data in content(tmp_path / "out").items() if name not in NAMED_AFTER_THE_RUN} == {
        name: data for name, data in expected.items() if name not in NAMED_AFTER_THE_RUN
    }

    for entry in manifest["files"].values():
        del entry["weights"]
    write_manifest(folder, manifest)
    assert "damaged" in refused(capsys, "export", damaged, tmp_path / "again")


@pytest.mark.parametrize("where", ["header", "first weight", "last weight"])
def test_every_byte_that_counts_is_checked(run_dir, tmp_path, capsys, where):
    damaged = Path(shutil.copytree(run_dir, tmp_path / "damaged"))
    folder = damaged / "checkpoints/step-00000002"
    file = folder / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    last = json.loads((folder / "manifest.json").read_text())["files"][file.name]["weights"]["without"][1]
    # Of the header, the name of a moment: nothing else would notice.
    data[{"header": data.index(b"exp_avg"), "first weight": last, "last weight": -1}[where]] ^= 1
    file.write_bytes(data)
    assert f"{file}: damaged" in refused(capsys, "export", damaged, tmp_path / "out")


def test_values_that_fp16_cannot_hold(tmp_path, capsys):
    config = config_of_run(vocab_size=257)
    parameters = parameters_of(config)
    parameters["heads.2.attention.wo.weight"][3, 5] = 1e5
    run_dir = write_run(tmp_path / "run", config, parameters)
    told = refused(capsys, "export", run_dir, tmp_path / "out", "--dtype", "fp16")
    assert "heads.2.attention.wo.weight" in told and "--dtype bf16" in told
    export(run_dir, tmp_path / "out")


def test_a_failed_sync_in_the_middle_is_told(run_dir, tmp_path, monkeypatch):
    """The kernel tells it once: the sync at the end succeeds."""

    def fdatasync(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(safetensors_file, "SYNC_BYTES", 2000)
    monkeypatch.setattr(os, "fdatasync", fdatasync)
    with pytest.raises(RunFailure, match="Input/output error"):
        export(run_dir, tmp_path / "out")
    assert names(tmp_path) == []


def test_force_replaces_an_earlier_output_and_only_at_the_end(run_dir, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    main(["export", str(run_dir), str(out), "--dtype", "fp32"])
    first = content(out)
    assert "exists already" in refused(capsys, "export", run_dir, out)
    with monkeypatch.context() as patch:
        patch.setattr(output_module, "_sync_all", lambda folder: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(RunFailure, match="No space left; free some space"):
            export(run_dir, out, force=True)
    assert content(out) == first and names(tmp_path) == ["out"]
    main(["export", str(run_dir), str(out), "--force"])
    assert content(out) != first and names(tmp_path) == ["out"]
    import_run(out, tmp_path / "in")
    import_run(out, tmp_path / "in", force=True)
    assert names(tmp_path) == ["in", "out"]


def test_a_disk_without_room_is_told_before_anything_is_written(run_dir, tmp_path, monkeypatch):
    free = output_module.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(output_module.shutil, "disk_usage", lambda path: free)
    with pytest.raises(UserError, match="needs 0.0 GB, 0.0 GB are free"):
        export(run_dir, tmp_path / "out")
    assert names(tmp_path) == []


def test_a_full_disk_while_writing(run_dir, tmp_path):
    """A limit on the size of files stands for it."""
    code = (
        "import resource, signal, sys; from tools.convert_checkpoint import main; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); "
        f"main(['export', {str(run_dir)!r}, {str(tmp_path / 'out')!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "cannot write" in done.stderr and "Traceback" not in done.stderr
    assert names(tmp_path) == []


SLOWLY = """
import sys, time
from megamtp.convert import stream
untouched = stream.write_items
def write_items(path, *rest, **more):
    result = untouched(path, *rest, **more)
    print(path.name, flush=True)
    time.sleep(float(sys.argv[1]))
    return result
import megamtp.convert.export, megamtp.convert.import_run
megamtp.convert.export.write_items = megamtp.convert.import_run.write_items = write_items
from tools.convert_checkpoint import main
main(sys.argv[2:])
"""


@pytest.mark.parametrize("command", ["export", pytest.param("import", marks=pytest.mark.slow)])
def test_a_killed_conversion_leaves_nothing_complete_and_the_next_is_clean(run_dir, tmp_path, command):
    arguments = [sys.executable, "-c", SLOWLY, "60", command, str(run_dir), str(tmp_path / "out")]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout.readline()  # a file of weights is there
        # A second one of the same output leaves the first one's files alone.
        (living,) = tmp_path.iterdir()
        main([command, str(run_dir), str(tmp_path / "other")])
        os.kill(process.pid, signal.SIGKILL)
    assert living.name.startswith("out.") and living.suffix == ".tmp" and living.is_dir()
    assert not (tmp_path / "out").exists()
    main([command, str(run_dir), str(tmp_path / "out")])
    assert names(tmp_path) == ["other", "out"]
    assert names(tmp_path / "other") == names(tmp_path / "out")


def test_a_living_writer_keeps_its_folder(tmp_path):
    held = tmp_path / "out.01234567.tmp"
    held.mkdir()
    with output_module._locked(held):
        output_module._remove_leftovers(tmp_path / "out")
        assert held.exists()
    output_module._remove_leftovers(tmp_path / "out")
    assert not held.exists()


def test_a_kill_between_the_two_renames_loses_nothing(run_dir, tmp_path):
    out = tmp_path / "out"
    export(run_dir, out)
    first = content(out)
    out.rename(tmp_path / "out.01234567.replaced")
    with pytest.raises(UserError, match="exists already"):
        export(run_dir, out)
    assert content(out) == first and names(tmp_path) == ["out"]


MEMORY = """
import sys, threading, time
from pathlib import Path
from megamtp.convert import stream
stream.BLOCK_BYTES = 1 << 20
def anonymous():
    return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssAnon'))
peak = 0
untouched = stream._blocks
def blocks(item, source):
    global peak
    for block in untouched(item, source):
        peak = max(peak, anonymous())
        yield block
stream._blocks = blocks
import megamtp.convert.export, megamtp.convert.import_run
from tools.convert_checkpoint import main
source, folder = sys.argv[1:]
before = anonymous()
main(['export', source, folder + '/out'])
main(['import', folder + '/out', folder + '/in'])
print('peak', before, peak)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    peaks = []
    for size in (1, 2):
        config = config_of_run(vocab_size=257, dim=256, ffn_dim=1024 * size, n_layers=6 * size, init_std=0.02)
        folder = tmp_path / str(size)
        run_dir = write_run(folder / "run", config, parameters_of(config))
        arguments = [sys.executable, "-c", MEMORY, str(run_dir), str(folder)]
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory goes back at once
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
        before, peak = map(int, done.stdout.split()[-2:])
        written = sum(path.stat().st_size for path in folder.glob("in/**/*") if path.is_file()) >> 10
        assert written > 20_000 * size
        assert 0 < peak - before < 15_000, (before, peak)
        peaks.append(peak)
    assert peaks[1] < 1.1 * peaks[0], peaks
