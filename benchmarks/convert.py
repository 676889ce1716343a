"""Converting a checkpoint here against DeepSpeed's ``zero_to_fp32.py`` (0.19.8): memory and time of whole processes.

    python benchmarks/convert.py            # some 20 minutes, 40 GB of disk; --quick for a look

Models of about 300M, 600M and 1B random parameters are written twice, as four data-parallel ranks leave them: our
checkpoint (fp32 weights and both moments) and DeepSpeed's ZeRO-1 checkpoint of bf16 training (the same fp32 weights and
moments, and the bf16 weights of the model). Then, in turn and each in a process of its own:

ours        ``tools/convert_checkpoint.py export``, as fp32 and as bf16: checksums compared, output synced to the disk.
theirs      ``zero_to_fp32.py --safe_serialization``: fp32, nothing compared, nothing synced.

memory      peak of RssAnon, sampled: what the process holds that is not a mapped file.
seconds     from the start of the process to its end; ``on disk``: until what it wrote is synced as well.

Before the first run both read their files once. At the smallest size the two outputs are compared, bit by bit.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megamtp.convert.formats import LLAMA, logical_names, padded_shape
from megamtp.convert.safetensors_file import map_tensors
from megamtp.engine.fragments import Fragment
from megamtp.errors import UserError, exits_cleanly
from megamtp.model.cost import parameters
from megamtp.model.transformer import ModelConfig
from megamtp.training.checkpoint import make_manifest
from megamtp.training.pieces import write_pieces

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OURS, THEIRS, TAG, SCRIPT = "ours", "theirs", "global_step1", "zero_to_fp32.py"
OPTIMIZER_FILE = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"
RANKS = 4  # data-parallel ones that have written the checkpoints
KINDS = ("weight", "exp_avg", "exp_avg_sq")
# The smallest two are of the paper. A vocabulary without padding: both write the same bytes.
SHARED = {"vocab_size": 32_000, "n_future_tokens": 4}
SHAPES = {
    "300M": {"dim": 1024, "n_layers": 18, "n_heads": 16, **SHARED},
    "600M": {"dim": 1280, "n_layers": 27, "n_heads": 20, **SHARED},
    "1B": {"dim": 2048, "n_layers": 17, "n_heads": 16, **SHARED},
    "20M": {"dim": 256, "n_layers": 6, "n_heads": 4, **SHARED},
    "40M": {"dim": 512, "n_layers": 6, "n_heads": 4, **SHARED},
}
FULL, QUICK = ["300M", "600M", "1B"], ["20M", "40M"]
SAMPLE_SECONDS = 0.005
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}


class Group(NamedTuple):
    """Parameters that the optimizer treats alike: ZeRO flattens them one after another, and cuts equal partitions."""

    shapes: dict[str, tuple[int, ...]]  # by logical name

    @property
    def size(self) -> int:
        return sum(map(math.prod, self.shapes.values()))

    @property
    def partition(self) -> int:
        return -(-self.size // RANKS)


def groups_of(config: ModelConfig) -> list[Group]:
    """Matrices, which decay, and norms."""
    shapes = {name: padded_shape(name, config) for name in logical_names(config)}
    matrices = [{name: shape for name, shape in shapes.items() if (len(shape) == 2) == kind} for kind in (True, False)]
    return [Group(kind) for kind in matrices]


def partitions(groups: list[Group], rank: int) -> list[dict[str, Tensor]]:
    """What a rank holds of each group, padded at its end: random fp32 values, the same at each call."""
    random = torch.Generator().manual_seed(rank)
    found = []
    for group in groups:
        length = min(group.partition, group.size - rank * group.partition)
        found.append({kind: torch.zeros(group.partition) for kind in KINDS})
        for kind in KINDS:
            found[-1][kind][:length].normal_(std=0.02, generator=random)
    return found


def write_rank(folder: Path, config: ModelConfig, rank: int) -> dict[str, Any]:
    """Both formats' files of one rank. Returns the entry of ours for the manifest."""
    groups = groups_of(config)
    held = partitions(groups, rank)
    pieces = []
    for group, flat in zip(groups, held, strict=True):
        begin, offset = rank * group.partition, 0
        for name, shape in group.shapes.items():
            first, last = max(begin, offset), min(begin + group.partition, offset + math.prod(shape))
            if first < last:
                tensors = {kind: flat[kind][first - begin : last - begin] for kind in KINDS}
                pieces.append(Fragment(name, shape, first - offset, tensors, is_owner=True))
            offset += math.prod(shape)
    entry = write_pieces(folder / OURS / f"rank-{rank:05d}.safetensors", pieces)
    state = {i: {"step": torch.tensor(1.0)} | {kind: flat[kind] for kind in KINDS[1:]} for i, flat in enumerate(held)}
    optimizer = {
        "base_optimizer_state": {"state": state},
        "single_partition_of_fp32_groups": [flat["weight"] for flat in held],
        "zero_stage": 1,
        "partition_count": [RANKS] * len(groups),
        "ds_version": deepspeed_version(),
    }
    torch.save(
        {"optimizer_state_dict": optimizer, "ds_version": deepspeed_version()},
        folder / THEIRS / TAG / OPTIMIZER_FILE.format(rank),
    )
    return entry


def write_model(folder: Path, config: ModelConfig) -> None:
    """DeepSpeed's file of the bf16 weights, from the ranks' files."""
    groups = groups_of(config)
    shapes = [OrderedDict((name, torch.Size(shape)) for name, shape in group.shapes.items()) for group in groups]
    module = OrderedDict()
    for i, group in enumerate(groups):
        files = (folder / THEIRS / TAG / OPTIMIZER_FILE.format(rank) for rank in range(RANKS))
        loaded = (torch.load(file, mmap=True, weights_only=False) for file in files)
        parts = [one["optimizer_state_dict"]["single_partition_of_fp32_groups"][i].bfloat16() for one in loaded]
        flat = torch.cat(parts)[: group.size]
        split = flat.split([math.prod(shape) for shape in group.shapes.values()])
        module |= {name: part.view(shape) for (name, shape), part in zip(group.shapes.items(), split, strict=True)}
    state = {"module": module, "buffer_names": [], "param_shapes": shapes, "shared_params": {}}
    state |= {"frozen_param_shapes": None, "frozen_param_fragments": None, "ds_version": deepspeed_version()}
    torch.save(state, folder / THEIRS / TAG / "mp_rank_00_model_states.pt")


def write_checkpoints(folder: Path, size: str) -> None:
    """Both, a rank in a process of its own: its memory is gone when the measuring begins."""
    config = ModelConfig(**SHAPES[size])
    (folder / OURS).mkdir(parents=True)
    (folder / THEIRS / TAG).mkdir(parents=True)
    command = [sys.executable, __file__, "--size", size, "--folder", str(folder), "--write"]
    entries = [json.loads(subprocess.check_output([*command, str(rank)])) for rank in range(RANKS)]
    subprocess.run([*command, "model"], check=True)
    (folder / THEIRS / "latest").write_text(TAG)
    spec = importlib.util.find_spec("deepspeed")  # without importing it
    # As DeepSpeed itself does when it saves; beside modules of that folder, like torch.py, it could not run.
    shutil.copy(Path(spec.submodule_search_locations[0]) / "utils" / SCRIPT, folder / THEIRS)
    state = {"loader": None, "counters": {"tokens": 0, "skipped_steps": 0}}
    manifest = make_manifest(entries, step=1, optimizer_steps=1, model=asdict(config), state=state)
    (folder / OURS / "manifest.json").write_text(json.dumps(manifest))


def deepspeed_version() -> str:
    return importlib.metadata.version("deepspeed")


def commands(folder: Path) -> dict[str, list[str]]:
    """By side; the output's folder comes last."""
    ours = [str(ROOT / "tools" / "convert_checkpoint.py"), "export", str(folder / OURS)]
    return {
        "fp32": [sys.executable, *ours, "--dtype", "fp32"],
        "bf16": [sys.executable, *ours, "--dtype", "bf16"],
        "zero_to_fp32": [sys.executable, str(folder / THEIRS / SCRIPT), "--safe_serialization", str(folder / THEIRS)],
    }


class Measured(NamedTuple):
    seconds: float
    seconds_synced: float  # until all that it wrote is on the disk
    peak_mib: float  # RssAnon


def measure(command: list[str], output: Path) -> Measured:
    """Run a command as a process of its own; ``UserError`` where it fails."""
    shutil.rmtree(output, ignore_errors=True)
    os.sync()  # what others have written is not waited for in here
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        process = subprocess.Popen([*command, str(output)], stdout=log, stderr=log, env=ENVIRONMENT)
        peak = 0
        while process.poll() is None:
            peak = max(peak, anonymous_kib(process.pid))
            time.sleep(SAMPLE_SECONDS)
        seconds = time.perf_counter() - started
        os.sync()
        synced = time.perf_counter() - started
        if process.returncode:
            log.seek(0)
            raise UserError(f"{' '.join(command)}: failed: {log.read().decode()[-1000:]}")
    return Measured(seconds, synced, peak / 1024)


def anonymous_kib(pid: int) -> int:
    """0 for a process that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:")), 0)


def require_equal(ours: Path, theirs: Path, config: ModelConfig) -> None:
    """``UserError`` unless both hold the same fp32 values."""
    tensors = [{}, {}]
    for side, folder in zip(tensors, (ours, theirs), strict=True):
        for file in folder.glob("*.safetensors"):
            side |= map_tensors(file)
    names = LLAMA.names(config)
    if set(names) != set(tensors[1]) or set(names.values()) != set(tensors[0]):
        raise UserError("the two outputs hold different tensors")
    for name, llama_name in names.items():
        if not torch.equal(tensors[0][llama_name], tensors[1][name]):
            raise UserError(f"{name} differs between the two outputs")


def run(folder: Path, sizes: list[str], repeats: int) -> dict[str, Any]:
    """All figures, by size and side."""
    results = {}
    for size in sizes:
        here = folder / size
        write_checkpoints(here, size)
        found: dict[str, list[Measured]] = {side: [] for side in commands(here)}
        for repeat in range(-1, repeats):  # the first only brings the files into memory, where they fit
            order = list(commands(here).items())
            for side, command in order if repeat % 2 else order[::-1]:
                result = measure(command, here / "output" / side)
                if repeat >= 0:
                    found[side].append(result)
                elif size != sizes[0] or side == "bf16":
                    shutil.rmtree(here / "output" / side)
            if repeat < 0 and size == sizes[0]:
                require_equal(here / "output" / "fp32", here / "output" / "zero_to_fp32", ModelConfig(**SHAPES[size]))
            shutil.rmtree(here / "output", ignore_errors=True)
        results[size] = found
        shutil.rmtree(here)
    return results


def spread(measured: list[Measured], field: str) -> dict[str, float]:
    each = [getattr(one, field) for one in measured]
    return {"median": statistics.median(each), "min": min(each), "max": max(each)}


def report(results: dict[str, dict[str, list[Measured]]], repeats: int) -> dict[str, Any]:
    """Print the table; returns what the JSON line holds."""
    summary: dict[str, Any] = {"repeats": repeats, "sizes": {}}
    print(f"{'median (min - max)':28}{'anonymous memory, MiB':>26}{'seconds':>26}{'until on disk, s':>26}")
    for size, found in results.items():
        count = parameters(ModelConfig(**SHAPES[size])).total
        figures = {side: {f: spread(each, f) for f in Measured._fields} for side, each in found.items()}
        print(f"{size}: {count:,} parameters")
        for side, values in figures.items():
            cells = [values[field] for field in ("peak_mib", "seconds", "seconds_synced")]
            print(f"  {side:26}" + "".join(f"{c['median']:11,.1f} ({c['min']:,.1f} - {c['max']:,.1f})" for c in cells))
        median = {side: {f: values[f]["median"] for f in values} for side, values in figures.items()}
        ours, theirs = median["fp32"], median["zero_to_fp32"]
        ratios = {"time_ratio": ours["seconds"] / theirs["seconds"]}
        ratios["time_ratio_on_disk"] = ours["seconds_synced"] / theirs["seconds_synced"]
        ratios["memory_ratio"] = ours["peak_mib"] / theirs["peak_mib"]
        print("  ours / theirs, fp32: " + ", ".join(f"{name} {value:.2f}" for name, value in ratios.items()))
        summary["sizes"][size] = {"parameters": count, **ratios, "sides": figures}
    first, second, *_ = summary["sizes"]
    last = list(summary["sizes"])[-1]
    peak = {size: figures["sides"]["fp32"]["peak_mib"]["median"] for size, figures in summary["sizes"].items()}
    summary |= {"peak_mib": peak[last], "growth": peak[second] / peak[first] - 1}
    summary["time_ratio"] = summary["sizes"][last]["time_ratio"]
    summary["time_ratio_on_disk"] = summary["sizes"][last]["time_ratio_on_disk"]
    print(f"memory at {second} over {first}: {summary['growth']:+.1%}")
    return summary


@exits_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="timed processes of each side (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small models, 2 repeats: says nothing about large ones")
    parser.add_argument("--folder", type=Path, help="where temporary files go")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "convert.json", help="of the JSON line")
    for hidden in ("--size", "--write"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        config = ModelConfig(**SHAPES[options.size])
        if options.write == "model":
            write_model(options.folder, config)
        else:
            print(json.dumps(write_rank(options.folder, config, int(options.write))))
        return
    repeats = 2 if options.quick else options.repeats
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        summary = report(run(Path(folder), QUICK if options.quick else FULL, repeats), repeats)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "safetensors")}
    line = json.dumps(rounded({"command": "python benchmarks/convert.py", "versions": versions, **summary}))
    if not options.quick:
        options.output.write_text(line + "\n")
    print(line)


def rounded(value: Any) -> Any:
    """Nested plain values with 3 digits after the point."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return round(value, 3) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
