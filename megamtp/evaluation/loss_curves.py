"""Loss and accuracy per head of one run, from its ``metrics.jsonl`` to a picture."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megamtp.errors import UserError
from megamtp.files import write_atomic

METRICS_FILE = "metrics.jsonl"
INCHES, DOTS_PER_INCH = (12.0, 5.0), 100  # 1200 x 500 px


@dataclass(frozen=True)
class Curves:
    """T training and E evaluation steps in ascending order, n heads; losses in nats per token."""

    train_steps: np.ndarray  # (T,)
    train_loss: np.ndarray  # (T, n)
    validation_steps: np.ndarray  # (E,)
    validation_loss: np.ndarray  # (E, n)
    validation_accuracy: np.ndarray  # (E, n)  top-1, 0..1

    @property
    def n_heads(self) -> int:
        return max(self.train_loss.shape[1], self.validation_loss.shape[1])


def read_curves(run_dir: str | Path) -> Curves:
    """Read ``run_dir/metrics.jsonl``: training lines hold ``loss_per_head``, evaluation lines
    ``validation_loss_per_head`` and ``validation_accuracy_per_head``; lines of other kinds are passed over.

    A run that resumes repeats steps: the later line wins. A torn last line, left by a crash, is dropped.
    Raises ``UserError`` for a missing or empty file, any other broken line, or a changing number of heads.
    """
    path = Path(run_dir) / METRICS_FILE
    train: dict[int, list[float]] = {}
    validation: dict[int, tuple[list[float], list[float]]] = {}
    heads: set[int] = set()
    for number, record in _records(path):
        try:
            if "loss_per_head" in record:
                train[int(record["step"])] = record["loss_per_head"]
                heads.add(len(record["loss_per_head"]))
            elif "validation_loss_per_head" in record:
                loss, accuracy = record["validation_loss_per_head"], record["validation_accuracy_per_head"]
                validation[int(record["step"])] = loss, accuracy
                heads.update((len(loss), len(accuracy)))
        except KeyError as error:
            raise UserError(f"{path}:{number}: no {error.args[0]!r} on the line; remove the line") from None
    if not train and not validation:
        raise UserError(f"{path}: no training or evaluation line yet; let the run take a step first")
    if len(heads) > 1:
        raise UserError(f"{path}: lines with {sorted(heads)} heads; give a folder that holds one run")
    return Curves(*_columns({step: (loss,) for step, loss in train.items()}, 1), *_columns(validation, 2))


def plot_losses(run_dir: str | Path, output: str | Path, baseline: tuple[str, float] | None = None) -> None:
    """Draw ``run_dir``'s losses and validation accuracies per head into the PNG ``output``.

    ``baseline`` is (label, nats per token): a dashed line across the losses.
    Raises ``UserError`` as ``read_curves``, without matplotlib, or when ``output`` cannot be written.
    """
    curves = read_curves(run_dir)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plotting needs matplotlib, which is not installed; pip install matplotlib") from None

    figure = Figure(figsize=INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    figure.get_layout_engine().set(wspace=0.04)
    figure.suptitle(Path(run_dir).resolve().name, fontsize=13, fontweight="bold")
    loss_axes, accuracy_axes = figure.subplots(1, 2, width_ratios=[3, 2], sharex=True)
    handles = _draw_losses(loss_axes, curves, baseline)
    _draw_accuracies(accuracy_axes, curves)
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9.5, frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_atomic(Path(output), picture.getvalue())


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over ``window`` (odd) entries of ``values`` (T,); at the ends over those that there are."""
    kernel, half = np.ones(window), window // 2
    total = np.convolve(values, kernel)[half : half + len(values)]
    return total / np.convolve(np.ones(len(values)), kernel)[half : half + len(values)]


def _records(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot read the metrics: {error.strerror}; give a run's folder") from None
    last = len(lines)  # what follows the last newline: empty, or torn
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:  # broken JSON or broken UTF-8
            if number == last:
                break
            raise UserError(f"{path}:{number}: not a JSON object; remove the line") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number}: not a JSON object; remove the line")
        records.append((number, record))
    return records


def _columns(rows: dict[int, tuple[list[float], ...]], n_columns: int) -> list[np.ndarray]:
    """{step: columns of n values} -> steps (T,), then each column as (T, n); null becomes NaN."""
    steps = sorted(rows)
    if not steps:
        return [np.zeros(0, dtype=np.int64), *(np.zeros((0, 0)) for _ in range(n_columns))]
    columns = [np.array([rows[step][i] for step in steps], dtype=np.float64) for i in range(n_columns)]
    return [np.array(steps, dtype=np.int64), *columns]


def _draw_losses(axes: Any, curves: Curves, baseline: tuple[str, float] | None) -> list[Any]:
    """Draw, and return the legend's handles: both panels share it, so that it covers no curve."""
    colours = _colours(curves.n_heads)
    window = len(curves.train_steps) // 50 * 2 + 1  # 4 % of the run, odd
    for head, raw in enumerate(curves.train_loss.T):
        axes.plot(curves.train_steps, raw, color=colours[head], alpha=0.2, linewidth=0.8)
        axes.plot(curves.train_steps, running_mean(raw, window), color=colours[head], linewidth=1.2)
    for head, loss in enumerate(curves.validation_loss.T):
        axes.plot(
            curves.validation_steps, loss, color=colours[head], linewidth=1, linestyle=":", marker="o", markersize=4.5,
            markeredgecolor="white", markeredgewidth=0.6,
        )  # fmt: skip
    handles = [axes.plot([], [], color=colour, linewidth=3, label=_name(h))[0] for h, colour in enumerate(colours)]
    if len(curves.train_steps):
        smoothed = "training" if window == 1 else f"training, mean of {window} points"
        handles += axes.plot([], [], color="0.35", linewidth=1.2, label=smoothed)
    if len(curves.validation_steps):
        handles += axes.plot([], [], color="0.35", linestyle=":", marker="o", markersize=4.5, label="validation")
    if baseline is not None:
        label, value = baseline
        handles.append(axes.axhline(value, color="0.25", linestyle="--", linewidth=1.2, label=f"{label} {value:.2f}"))
    _dress(axes, "Loss per head", "nats per token")
    return handles


def _draw_accuracies(axes: Any, curves: Curves) -> None:
    colours = _colours(curves.n_heads)
    for head, accuracy in enumerate(curves.validation_accuracy.T):
        axes.plot(
            curves.validation_steps, 100 * accuracy, color=colours[head], linewidth=1.6, marker="o", markersize=4.5,
            markeredgecolor="white", markeredgewidth=0.6,
        )  # fmt: skip
    if len(curves.validation_steps):
        axes.set_ylim(bottom=0)
    else:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no evaluation yet", transform=axes.transAxes, ha="center", va="center", color="0.5")
    _dress(axes, "Validation accuracy per head", "top-1 accuracy, %")


def _dress(axes: Any, title: str, unit: str) -> None:
    axes.set_title(title, fontsize=12, loc="left")
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel(unit)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02)


def _colours(n_heads: int) -> list[Any]:
    """From dark to light with the distance that a head predicts; viridis without its pale end."""
    from matplotlib import colormaps

    return [colormaps["viridis"](place) for place in np.linspace(0.05, 0.85, n_heads)]


def _name(head: int) -> str:
    return f"head {head + 1} ({'next token' if head == 0 else f'{head + 1} tokens ahead'})"
