"""A run folder as values: what ``metrics.jsonl`` and ``config.yaml`` tell, whoever wrote them and whenever.

Readers of metrics meet files of older versions, of runs that still go on and of runs that crashed. So nothing but a
missing file is an error here: keys and lines that are not known are passed over, and broken lines are counted.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megamtp.errors import UserError
from megamtp.evaluation.loss_curves import METRICS_FILE

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """Training lines and validation lines by step, ascending; events in the order in which they were written."""

    name: str
    steps: dict[int, Record] = field(default_factory=dict)
    validation: dict[int, Record] = field(default_factory=dict)
    events: list[Record] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)  # by dotted key
    notes: list[str] = field(default_factory=list)  # on what could not be read

    @property
    def n_heads(self) -> int:
        lines = (*self.steps.values(), *self.validation.values())
        return max((len(_list(line.get(key))) for line in lines for key in _PER_HEAD), default=0)

    def numbers(self, *keys: str | int, of: str = "steps") -> tuple[np.ndarray, np.ndarray]:
        """(steps (T,), values (T,)) of the lines that have ``keys``, such as ``("loss_per_head", 0)``.

        ``of``: "steps" or "validation". What is null, infinite or no number is NaN.
        """
        found = [(step, _at(line, keys)) for step, line in getattr(self, of).items()]
        found = [(step, value) for step, value in found if value is not _MISSING]
        steps, values = np.array([step for step, _ in found]), np.array([as_number(value) for _, value in found])
        return steps.astype(np.float64), values.astype(np.float64)

    def seconds(self) -> tuple[np.ndarray, np.ndarray]:
        """Wall time of each step; of lines that do not tell it, what their tokens/s say."""
        steps, seconds = [], []
        previous = (0, 0.0)  # step and tokens
        for step, line in self.steps.items():
            tokens, value = as_number(line.get("tokens")), as_number(line.get("seconds"))
            if math.isnan(value) and step > previous[0]:
                rate = as_number(line.get("tokens_per_s"))
                value = (tokens - previous[1]) / (step - previous[0]) / rate if rate > 0 else math.nan
            previous = step, tokens
            steps.append(step)
            seconds.append(value)
        return np.array(steps, dtype=np.float64), np.array(seconds, dtype=np.float64)


def read_run(folder: Path, name: str) -> Run:
    """Read one run folder. ``UserError`` where it has no ``metrics.jsonl`` that can be read."""
    notes: list[str] = []
    run = Run(name, config=_read_config(folder / "config.yaml", notes), notes=notes)
    path = folder / METRICS_FILE
    try:
        with open(path, "rb") as file:
            for record in _records(file, notes):
                _take(run, record)
    except OSError as error:
        raise UserError(f"{path}: cannot read the metrics: {error.strerror}; give the folder of a run") from None
    for lines in (run.steps, run.validation):
        ordered = sorted(lines.items())
        lines.clear()
        lines.update(ordered)
    run.events.extend(_skips_without_event(run))
    return run


def read_runs(folders: list[Path]) -> list[Run]:
    """Read run folders, named after the folder, or by the path where two folders have the same name."""
    names = [folder.resolve().name for folder in folders]
    several = {name for name, count in Counter(names).items() if count > 1}
    return [
        read_run(folder, str(folder) if name in several else name) for folder, name in zip(folders, names, strict=True)
    ]


def as_number(value: Any) -> float:
    """``value`` as a finite number, else NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        number = float(value)
    except OverflowError:
        return math.nan
    return number if math.isfinite(number) else math.nan


_PER_HEAD = ("loss_per_head", "accuracy_per_head", "validation_loss_per_head", "validation_accuracy_per_head")
_MISSING = object()


def _records(file: Any, notes: list[str]) -> Iterator[Record]:
    broken = []
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and type(record.get("step")) is int:
            yield record
        elif line.endswith(b"\n"):  # else it is the last one, torn by a crash or half written
            broken.append(number)
    if broken:
        notes.append(f"{METRICS_FILE}: {len(broken)} lines are no records of a step; the first is line {broken[0]}")


def _take(run: Run, record: Record) -> None:
    """The later line of a step wins."""
    step = record["step"]
    if "event" in record:
        run.events.append(record)
        to_step = record.get("to_step")
        if record["event"] == "rolled_back" and type(to_step) is int:  # what came after it is done anew
            for lines in (run.steps, run.validation):
                for undone in [known for known in lines if known > to_step]:
                    del lines[undone]
    elif "validation_loss_per_head" in record:
        run.validation[step] = record
    elif "loss_per_head" in record or "loss" in record:
        run.steps[step] = record


def _skips_without_event(run: Run) -> list[Record]:
    """Runs that wrote no events still counted their skipped steps."""
    told = {event["step"] for event in run.events if event["event"] == "skipped"}
    found, before = [], 0.0
    for step, line in run.steps.items():
        count = as_number(line.get("skipped_steps"))
        if count > before and step not in told:
            found.append({"step": step, "event": "skipped", "grad_norm": line.get("grad_norm")})
        before = count if count >= 0 else before
    return found


def _read_config(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_bytes())
    except OSError as error:
        notes.append(f"{path.name}: {error.strerror}")
        return {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date
        notes.append(f"{path.name}: not valid YAML: {' '.join(str(error).split())}")
        return {}
    return dict(_leaves("", config)) if isinstance(config, dict) else {}


def _leaves(prefix: str, values: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(f"{prefix}{key}.", value)
        else:
            yield f"{prefix}{key}", value


def _at(value: Any, keys: tuple[str | int, ...]) -> Any:
    for key in keys:
        if isinstance(key, str) and isinstance(value, dict) and key in value:
            value = value[key]
        elif isinstance(key, int) and isinstance(value, list) and key < len(value):
            value = value[key]
        else:
            return _MISSING
    return value


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
