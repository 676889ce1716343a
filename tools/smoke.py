"""The first hour on a new machine: every layout trains a small model and must give the losses of one device.

python tools/smoke.py runs/smoke                                   # all GPUs of this machine, at most 8
python tools/smoke.py runs/smoke --ranks 4 --precision fp32        # without GPUs: 4 processes by gloo
python tools/smoke.py runs/smoke --ranks 8 --launcher "srun --nodes=2 --ntasks={ranks}"    # inside an allocation

Then it saves in one layout, goes on in another, and exports. At the end it says what holds on this machine and what it
has not tried. Exit code 0: all that was tried holds.
"""

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megamtp.errors import UserError, exits_cleanly
from megamtp.files import write_atomic

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = f"{sys.executable} -m torch.distributed.run --standalone --no-python --nproc-per-node {{ranks}}"
STEPS, STOP_AFTER = 6, 3
VOCAB, SEQ_LEN = 1000, 64  # no multiple of 128
# Small, and yet cut by 8 in every way: 8 heads of 4 key/value heads (which TP 8 shares), 8 stages of PP 4 DualPipeV.
CONFIG: dict[str, Any] = {
    "model": {"vocab_size": VOCAB, "dim": 128, "n_layers": 10, "n_heads": 8, "n_kv_heads": 4, "n_future_tokens": 4}
    | {"ffn_dim": 256, "init_std": 0.05},
    "data": {"seq_len": SEQ_LEN},
    "optimizer": {"lr": 5.0e-4, "clip": 0.5},
    "schedule": {"warmup_steps": 2},
    "training": {"steps": STEPS, "global_batch_size": 16, "micro_batch_size": 1, "checkpoint_every": None},
}
# Largest relative differences from one device, of each head's loss and of the gradient norm: those of docs/results.md.
# bf16 rounds each layout's partial sums elsewhere. A larger rate or larger weights would make more of a rounding.
TOLERANCE = {"fp32": (2e-6, 1e-5), "bf16": (2e-3, 1e-2)}
# A GPU's libraries choose another kernel, with its own order of summation, for each shape, so TP and the micro-batch
# change it. A form of parallelism that is wrong is off by 1e-3 and more.
GPU_FACTOR = {"fp32": 10.0, "bf16": 2.0}


@dataclass(frozen=True)
class Case:
    """A layout, with what it changes in the config."""

    name: str
    ranks: int
    changes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Verdict:
    """What came of one check."""

    name: str
    failure: str | None = None
    difference: tuple[float, float] | None = None  # relative, of losses and gradient norms
    seconds: float = 0.0

    def __str__(self) -> str:
        if self.failure:
            return f"FAILED  {self.name}: {self.failure}"
        found = (
            ""
            if self.difference is None
            else "loss within {:.0e}, gradient norm within {:.0e}, ".format(*self.difference)
        )
        return f"ok      {self.name}: {found}{self.seconds:.0f} s"


def every_case() -> list[Case]:
    """Each form of parallelism alone, on as few ranks as show it, then together and on more."""

    def case(name: str, ranks: int, tensor: int = 1, pipeline: int = 1, zero: int = 1, **parallel: Any) -> Case:
        layout = {"tensor": tensor, "pipeline": pipeline, "zero_stage": zero} | parallel
        return Case(name, ranks, {f"parallel.{key}": value for key, value in layout.items()})

    dual = {"schedule": "dualpipev"}
    return [
        case("TP 2", 2, tensor=2, sequence=False),
        case("TP 2 with sequence parallelism", 2, tensor=2, sequence=True),
        case("PP 2, 1F1B", 2, pipeline=2),
        case("PP 2, DualPipeV", 2, pipeline=2, **dual),
        *(case(f"DP 2, ZeRO-{stage}", 2, zero=stage) for stage in range(4)),
        case("TP 2 x PP 2", 4, tensor=2, pipeline=2),
        case("TP 2 x PP 2, DualPipeV", 4, tensor=2, pipeline=2, **dual),
        case("TP 2 x DP 2, ZeRO-3", 4, tensor=2, zero=3),
        case("PP 2 x DP 2", 4, pipeline=2),
        case("PP 4, DualPipeV", 4, pipeline=4, **dual),
        case("TP 2 x PP 2 x DP 2", 8, tensor=2, pipeline=2),
        case("TP 8 with sequence parallelism", 8, tensor=8),
        case("DP 8, ZeRO-3", 8, zero=3),
    ]


class Machine:
    """Runs commands of this package, and keeps what they said."""

    def __init__(self, folder: Path, launcher: str, timeout: float):
        self.folder, self.launcher, self.timeout = folder, launcher, timeout

    def train(self, name: str, ranks: int, changes: dict[str, Any], run_dir: Path) -> None:
        """``pretrain.py`` to its end; ``RuntimeError`` with the last line that it said."""
        overrides = [word for key, value in changes.items() for word in (f"--{key}", json.dumps(value).strip('"'))]
        command = [str(ROOT / "pretrain.py"), str(self.folder / "smoke.yaml"), "--run_dir", str(run_dir), *overrides]
        launcher = shlex.split(self.launcher.format(ranks=ranks)) if ranks > 1 else []
        self.run(name, [*launcher, sys.executable, *command])

    def run(self, name: str, command: list[str]) -> None:
        log = self.folder / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w") as output:
            print(f"$ {shlex.join(command)}", file=output, flush=True)
            # A group of its own: a launcher that hangs goes with its ranks.
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                code = process.wait(self.timeout)
            except BaseException as error:
                os.killpg(process.pid, 9)
                process.wait()
                if isinstance(error, subprocess.TimeoutExpired):
                    raise RuntimeError(f"hangs (more than {self.timeout:.0f} s); see {log}") from None
                raise
        if code:
            said = [line for line in log.read_text(errors="replace").splitlines()[1:] if "rror" in line]
            raise RuntimeError(f"exit code {code}: {said[0].strip() if said else ''}; see {log}")


def write_data(folder: Path) -> None:
    """Random walks over the vocabulary: there is something to learn."""
    from megamtp.data.dataset_writer import IndexedDatasetWriter

    for name, seed, count in (("train", 0, 200), ("validation", 1, 20)):
        random = np.random.default_rng(seed)
        with IndexedDatasetWriter(folder / name, "uint16") as writer:
            for length in random.integers(20, 200, count):
                writer.add_document((random.integers(VOCAB) + np.cumsum(random.integers(1, 4, length))) % VOCAB)


def read_steps(run_dir: Path) -> list[tuple[list[float], float]]:
    """(loss of each head, gradient norm) of each step."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss_per_head"], line["grad_norm"]) for line in lines if "loss_per_head" in line]


def difference(found: list, expected: list) -> tuple[float, float]:
    """Largest relative differences of losses and of gradient norms; infinite where steps are missing."""
    if len(found) != len(expected):
        return math.inf, math.inf
    losses = [
        abs(a - b) / abs(b) for (x, _), (y, _) in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True)
    ]
    norms = [abs(a - b) / abs(b) for (_, a), (_, b) in zip(found, expected, strict=True)]
    # A NaN compares as no difference at all.
    return tuple(math.inf if any(map(math.isnan, values)) else max(values) for values in (losses, norms))


def compare(name: str, run_dir: Path, reference: Path, limits: tuple[float, float]) -> Verdict:
    found = difference(read_steps(run_dir), read_steps(reference))
    beyond = [
        f"{what} differs by {value:.0e}, more than {limit:.0e}"
        for what, value, limit in zip(("a loss", "a gradient norm"), found, limits, strict=True)
        if not value <= limit
    ]
    return Verdict(name, " and ".join(beyond) or None, found)


def checks(machine: Machine, precision: str, ranks: int, limits: tuple[float, float]) -> Iterator[Verdict]:
    """One verdict after another, as they come."""
    folder = machine.folder
    reference = folder / f"{precision}-one-device"
    common = {"training.precision": precision}

    def attempt(name: str, check) -> Verdict:
        started = time.monotonic()
        try:
            verdict = check()
        except (RuntimeError, OSError) as error:
            verdict = Verdict(name, str(error))
        verdict.seconds = time.monotonic() - started
        return verdict

    def layout(case: Case) -> Verdict:
        run_dir = folder / f"{precision}-{_file_name(case.name)}"
        machine.train(run_dir.name, case.ranks, common | case.changes, run_dir)
        return compare(f"{precision}, {case.name}", run_dir, reference, limits)

    def one_device() -> Verdict:
        machine.train(reference.name, 1, common, reference)
        losses = [sum(losses) for losses, _ in read_steps(reference)]
        falls = len(losses) == STEPS and losses[-1] < losses[0]
        return Verdict(f"{precision}, one device", None if falls else f"the loss does not fall: {losses}")

    def resumed(first: Case, second: Case) -> Verdict:
        name = f"{precision}, saved as {first.name}, gone on as {second.name}"
        run_dir = folder / f"{precision}-resumed-{second.ranks}"
        begin = common | first.changes | {"training.stop_after": STOP_AFTER}
        machine.train(f"{run_dir.name}-begin", first.ranks, begin, run_dir)
        machine.train(f"{run_dir.name}-end", second.ranks, common | second.changes, run_dir)
        return compare(name, run_dir, reference, limits)

    yield (first := attempt(f"{precision}, one device", one_device))
    if first.failure:
        return
    cases = [case for case in every_case() if case.ranks <= ranks]
    if precision == "bf16":  # bf16 needs the fp32 weights that ZeRO keeps
        cases = [case for case in cases if case.changes["parallel.zero_stage"] > 0]
    for case in cases:
        yield attempt(f"{precision}, {case.name}", lambda case=case: layout(case))
    by_name = {case.name: case for case in cases} | {"one device": Case("one device", 1)}
    pairs = [("TP 2 with sequence parallelism", "PP 2, DualPipeV"), ("DP 2, ZeRO-2", "one device")]
    pairs += [("TP 2 x PP 2", "TP 2 x DP 2, ZeRO-3")]
    for begin, end in pairs:
        if begin in by_name and end in by_name:
            name = f"{precision}, saved as {begin}, gone on as {end}"
            yield attempt(name, lambda pair=(by_name[begin], by_name[end]): resumed(*pair))
    if precision == "fp32":
        yield attempt("export", lambda: exported(machine, reference))


def exported(machine: Machine, run_dir: Path) -> Verdict:
    """The exported Llama, run by ``transformers``, must have the validation loss that training measured for head 1."""
    output = machine.folder / "exported"
    tool = str(ROOT / "tools" / "convert_checkpoint.py")
    machine.run("export", [sys.executable, tool, "export", str(run_dir), str(output), "--dtype", "fp32", "--force"])
    try:
        import transformers
    except ImportError:
        return Verdict("export: written; transformers, which would open it, is not installed")
    import torch

    from megamtp.config import load
    from megamtp.data.loader import validation_batches
    from megamtp.training.loop import open_run_data
    from megamtp.training.run_config import RunConfig

    config = load(RunConfig, str(run_dir / "config.yaml"), [])
    samples = next(iter(open_run_data(config).validation.values()))
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in validation_batches(samples, 4, 0, 1):
            targets = batch.targets(config.data.mask_cross_document_targets)[0]
            logits = model(batch.inputs).logits
            total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
            count += (targets >= 0).sum().item()
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    expected = next(line["validation_loss_per_head"][0] for line in lines if "validation_loss_per_head" in line)
    error = abs(total / count - expected) / expected
    failure = None if error < 1e-4 else f"transformers finds a validation loss of {total / count}, training {expected}"
    return Verdict(f"export: transformers gives training's validation loss within {error:.0e}", failure)


def describe_machine() -> tuple[str, int, bool]:
    """A line, the devices, and whether they are GPUs."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpus:
        return f"no GPU, {len(os.sched_getaffinity(0))} cores, gloo; torch {torch.__version__}", 2, False
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    names = ", ".join(sorted({torch.cuda.get_device_name(i) for i in range(gpus)}))
    return f"{gpus} x {names}, NCCL {nccl}, CUDA {torch.version.cuda}; torch {torch.__version__}", gpus, True


def not_tried(ranks: int, on_gpus: bool, precisions: list[str], launcher: str) -> list[str]:
    """What a green result of these checks does not mean."""
    rest = [f"{case.name} (needs {case.ranks} ranks)" for case in every_case() if case.ranks > ranks]
    rest += [] if on_gpus else ["GPUs and NCCL: everything ran on CPUs by gloo"]
    rest += [f"{precision}" for precision in TOLERANCE if precision not in precisions]
    rest += [] if launcher != TORCHRUN else ["more than one node (see --launcher)"]
    return [
        *rest,
        "the speed and the memory of a model of full size",
        "hours of training: steps here are few and small",
    ]


@exits_cleanly
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "output", type=Path, help="folder for data, runs and logs; with --launcher one that all nodes see"
    )
    parser.add_argument("--ranks", type=int, help="most ranks of a layout; default: this machine's GPUs, 2 without any")
    parser.add_argument("--precision", choices=[*TOLERANCE], help="default: both")
    parser.add_argument("--launcher", default=TORCHRUN, help="starts {ranks} ranks; default: torchrun on this machine")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that one training may take")
    options = parser.parse_args(arguments)
    machine_line, devices, on_gpus = describe_machine()
    ranks = min(options.ranks or devices, 8)
    if on_gpus and ranks > devices and options.launcher == TORCHRUN:
        raise UserError(f"--ranks {ranks}: this machine has {devices} GPUs; lower it, or give a --launcher")
    if options.output.exists() and any(options.output.iterdir()):
        raise UserError(f"{options.output}: is not empty; name a new folder")
    print(machine_line, flush=True)

    folder = options.output.resolve()
    write_data(folder)
    data = {"train": str(folder / "train"), "validation": str(folder / "validation")}
    # JSON is YAML.
    config = CONFIG | {"run_dir": str(folder / "run"), "data": CONFIG["data"] | data}
    write_atomic(folder / "smoke.yaml", json.dumps(config).encode())
    machine = Machine(folder, options.launcher, options.timeout)
    precisions = [options.precision] if options.precision else [*TOLERANCE]
    verdicts = []
    for precision in precisions:
        factor = GPU_FACTOR[precision] if on_gpus else 1.0
        limits = tuple(limit * factor for limit in TOLERANCE[precision])
        for verdict in checks(machine, precision, ranks, limits):
            print(verdict, flush=True)
            verdicts.append(verdict)

    failed = [verdict for verdict in verdicts if verdict.failure]
    print(f"\nVerified on this machine ({machine_line}), {len(verdicts) - len(failed)} of {len(verdicts)}:")
    print(*(f"  {verdict.name}" for verdict in verdicts if not verdict.failure), sep="\n")
    print("Not verified:")
    print(*(f"  {line}" for line in not_tried(ranks, on_gpus, precisions, options.launcher)), sep="\n")
    if failed:
        print("Failed:", *(f"  {verdict.name}: {verdict.failure}" for verdict in failed), sep="\n")
    return 1 if failed else 0


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.replace(", ", "-").replace(" x ", "-"))


if __name__ == "__main__":
    sys.exit(main())
