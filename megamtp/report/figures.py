"""Runs as plotly figures: one run with its heads in one plot, several runs overlaid, a plot a head."""

import html
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from plotly import graph_objects as go

from megamtp.report.runs import Run, as_number
from megamtp.report.thin import bin_means, extremes, smooth

# Each is legible on white and on near-black.
COLOURS = ("#3d85d6", "#e8833a", "#3fa35b", "#c65bb5", "#d6564e", "#2aa7a7", "#b59b1f", "#9a7458")
PLOT_PIXELS, LANE_PIXELS = 250, 10
MOST_MARKS = 300  # of one kind of event: the newest
# Of the parts of a step, in the order in which they happen; others follow.
PARTS = ("data", "forward", "backward", "step", "checkpoint")


@dataclass(frozen=True)
class Mark:
    """How an event is drawn: plotly's symbol, the same as a character for the key, a colour, a line across or not."""

    symbol: str
    character: str
    colour: str
    across: bool = False


MARKS = {
    "started": Mark("triangle-right", "▶", "#3fa35b", across=True),
    "stopped": Mark("square", "■", "#8a8f98"),
    "checkpoint": Mark("circle", "●", "#8a8f98"),
    "checkpoint_failed": Mark("x", "✖", "#d6564e"),
    "skipped": Mark("diamond", "◆", "#e8833a"),
    "rolled_back": Mark("triangle-left", "◀", "#c65bb5", across=True),
    "damaged": Mark("star", "★", "#d6564e"),
    "hang": Mark("hourglass", "⧗", "#d6564e", across=True),
    "slow_rank": Mark("triangle-up", "▲", "#b59b1f"),
}
OTHER_MARK = Mark("circle-open", "○", "#3d85d6")


@dataclass(frozen=True)
class Panel:
    """One plot of the page."""

    section: str
    title: str
    figure: go.Figure
    positive: bool = False  # a logarithmic axis makes sense


@dataclass(frozen=True)
class Curve:
    """(T,) each. ``smoothed``: pale, with its running mean on top."""

    name: str
    steps: np.ndarray
    values: np.ndarray
    colour: str
    smoothed: bool = False
    points: bool = False  # sparse: dots, and no entry in the legend


def panels(runs: list[Run]) -> list[Panel]:
    """All plots for which there is data."""
    found = [
        *_per_head(runs, "Loss", "loss_per_head", "nats per token", positive=True),
        *_single(runs, "Loss", "Weighted loss, all heads", "nats", "loss", smoothed=True, positive=True),
        *_per_head(runs, "Accuracy", "accuracy_per_head", "top-1, %", scale=100),
        *_validation_sets(runs),
        *_single(runs, "Optimizer", "Gradient norm", "before clipping", "grad_norm", positive=True),
        *_single(runs, "Optimizer", "Learning rate", "", "lr"),
        *_single(runs, "Speed", "Throughput", "tokens/s", "tokens_per_s", smoothed=True),
        *_single(runs, "Speed", "Model FLOPs utilisation", "%", "mfu", smoothed=True, scale=100),
        *_time_per_part(runs),
        *_slowest_rank(runs),
        *_single(runs, "Speed", "Peak memory", "GiB", "memory_gib"),
    ]
    return [panel for panel in found if panel is not None]


def details(event: dict[str, Any]) -> str:
    """What an event line says beside its step, time and name."""
    told = {key: value for key, value in event.items() if key not in ("step", "time", "event")}
    return ", ".join(f"{key} {_plain(value)}" for key, value in told.items() if value is not None)


def time_of(event: dict[str, Any]) -> str:
    """UTC, or nothing where the line does not tell."""
    try:
        return datetime.fromtimestamp(as_number(event.get("time")), UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return ""


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={_plain(item)}" for key, item in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if type(value) is int else str(value)


def _per_head(
    runs: list[Run], section: str, key: str, unit: str, scale: float = 1, positive: bool = False
) -> list[Panel | None]:
    heads = range(max((run.n_heads for run in runs), default=0))
    single = len(runs) == 1
    curves = [
        [
            curve
            for index, run in enumerate(runs)
            for curve in _training_and_validation(
                run, key, head, f"head {head + 1}" if single else run.name, _colour(head if single else index), scale
            )
        ]
        for head in heads
    ]
    if single:
        return [_panel(runs, section, f"{section} per head", unit, sum(curves, []), positive)]
    return [_panel(runs, section, f"{section} of head {head + 1}", unit, curves[head], positive) for head in heads]


def _training_and_validation(run: Run, key: str, head: int, name: str, colour: str, scale: float) -> list[Curve]:
    steps, values = run.numbers(key, head)
    checked, of_checked = run.numbers(f"validation_{key}", head, of="validation")
    return [
        Curve(name, steps, values * scale, colour, smoothed=True),
        Curve(f"{name}, validation", checked, of_checked * scale, colour, points=True),
    ]


def _single(
    runs: list[Run],
    section: str,
    title: str,
    unit: str,
    key: str,
    *,
    scale: float = 1,
    smoothed: bool = False,
    positive: bool = False,
) -> list[Panel | None]:
    curves = []
    for index, run in enumerate(runs):
        steps, values = run.numbers(key)
        curves.append(Curve(run.name, steps, values * scale, _colour(index), smoothed))
    return [_panel(runs, section, title, unit, curves, positive)]


def _validation_sets(runs: list[Run]) -> list[Panel | None]:
    names = {
        name: None
        for run in runs
        for line in run.validation.values()
        if isinstance(line.get("validation_sets"), dict)
        for name in line["validation_sets"]
    }
    single = len(runs) == 1
    curves = {
        name: [
            Curve(
                name if single else run.name,
                *run.numbers("validation_sets", name, "losses", 0, of="validation"),
                _colour(place if single else index),
            )
            for index, run in enumerate(runs)
        ]
        for place, name in enumerate(names)
    }
    title, unit = "Validation loss of head 1", "nats per token"
    if single:
        return [_panel(runs, "Validation sets", title, unit, sum(curves.values(), []), True)]
    return [_panel(runs, "Validation sets", f"{title}: {name}", unit, curves[name], True) for name in names]


def _slowest_rank(runs: list[Run]) -> list[Panel | None]:
    curves = []
    for index, run in enumerate(runs):
        steps, seconds = run.numbers("slowest_rank", "seconds")
        _, median = run.numbers("slowest_rank", "median_seconds")
        if len(seconds) == len(median):
            with np.errstate(divide="ignore", invalid="ignore"):
                curves.append(Curve(run.name, steps, seconds / median, _colour(index)))
    return [_panel(runs, "Speed", "Slowest rank", "times the median rank", curves)]


def _time_per_part(runs: list[Run]) -> list[Panel | None]:
    """Stacked seconds; what the parts leave of the step is "other"."""
    found: list[Panel | None] = []
    for index, run in enumerate(runs):
        parts = dict.fromkeys(
            part
            for line in run.steps.values()
            if isinstance(line.get("seconds_per_part"), dict)
            for part in line["seconds_per_part"]
        )
        if not parts:
            continue
        names = [part for part in PARTS if part in parts] + sorted(set(parts) - set(PARTS))
        lines = [line for line in run.steps.values() if isinstance(line.get("seconds_per_part"), dict)]
        steps = np.array([line["step"] for line in lines], dtype=np.float64)
        seconds = np.array([[as_number(line["seconds_per_part"].get(name)) for name in names] for line in lines])
        seconds = np.nan_to_num(seconds)  # a part that did not apply
        total = np.array([as_number(line.get("seconds")) for line in lines])
        within = [place for place, name in enumerate(names) if name != "checkpoint"]  # which comes before the step
        other = np.nan_to_num(np.maximum(total - seconds[:, within].sum(1), 0))
        steps, columns = bin_means(steps, np.column_stack([seconds, other]))
        figure = go.Figure()
        for place, (name, column) in enumerate(zip([*names, "other"], columns.T, strict=True)):
            colour = _colour(place) if name != "other" else "#8a8f98"
            figure.add_scatter(
                x=steps,
                y=column,
                name=_text(name),
                stackgroup="parts",
                mode="lines",
                line={"width": 0.5, "color": colour},
            )
        title = "Time per part of a step" + (f": {run.name}" if len(runs) > 1 else "")
        found.append(Panel("Speed", title, _finish(figure, [(index, run)], "seconds, main rank")))
    return found


def _panel(
    runs: list[Run], section: str, title: str, unit: str, curves: list[Curve], positive: bool = False
) -> Panel | None:
    curves = [curve for curve in curves if np.isfinite(curve.values).any()]
    if not curves:
        return None
    figure = go.Figure()
    named = len({curve.colour for curve in curves}) > 1
    for curve in curves:
        _draw(figure, curve, named)
    return Panel(section, title, _finish(figure, list(enumerate(runs)), unit), positive)


def _draw(figure: go.Figure, curve: Curve, named: bool) -> None:
    common = {"name": _text(curve.name), "legendgroup": curve.colour}
    if curve.points:
        figure.add_scatter(
            **common,
            **_points(curve.steps, curve.values),
            mode="lines+markers",
            line={"color": curve.colour, "width": 1, "dash": "dot"},
            marker={"size": 7, "line": {"width": 0}},
            showlegend=False,
        )
        return
    smooth_curve = curve.smoothed and len(curve.steps) >= 50
    line = {"color": curve.colour, "width": 1.6}
    if smooth_curve:
        figure.add_scatter(
            **common, **_points(curve.steps, curve.values), mode="lines", line=line | {"width": 1}, opacity=0.3,
            showlegend=False, hoverinfo="skip",
        )  # fmt: skip
    values = smooth(curve.values) if smooth_curve else curve.values
    mode = "lines" if len(curve.steps) > 1 else "markers"
    figure.add_scatter(
        **common, **_points(curve.steps, values), mode=mode, line=line, marker={"color": curve.colour}, showlegend=named
    )


def _points(steps: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
    steps, values = extremes(steps, values)
    return {"x": steps, "y": values.astype(np.float32)}  # half the size; seven digits are more than can be seen


def _finish(figure: go.Figure, runs: list[tuple[int, Run]], unit: str) -> go.Figure:
    """Axes, and below the curves a lane of marks for each kind of event of each run."""
    lanes = 0
    for index, run in runs:
        edge = _colour(index) if len(runs) > 1 else None
        for name, mark, events in marks_of(run):
            _draw_marks(figure, run, name, mark, events[-MOST_MARKS:], lane=lanes, edge=edge)
            lanes += 1
    share = lanes * LANE_PIXELS / (PLOT_PIXELS + (lanes + 1) * LANE_PIXELS)
    figure.update_layout(
        template="none",
        height=PLOT_PIXELS + (lanes + 1) * LANE_PIXELS + 60,
        margin={"l": 56, "r": 12, "t": 20, "b": 40},
        hovermode="x unified" if len(figure.data) > 1 else "closest",
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
        xaxis={"title": {"text": "step", "standoff": 4}, "anchor": "y2" if lanes else "y", "zeroline": False},
        yaxis={
            "title": {"text": unit, "standoff": 6},
            "domain": [share + 0.02 if lanes else 0, 1],
            "zeroline": False,
            "hoverformat": ".4~g",
        },
    )
    if lanes:
        hidden = {"fixedrange": True, "showticklabels": False, "showgrid": False, "zeroline": False}
        figure.update_layout(yaxis2={"domain": [0, share], "range": [-lanes + 0.2, 0.6], **hidden})
    return figure


def _draw_marks(
    figure: go.Figure, run: Run, name: str, mark: Mark, events: list[dict[str, Any]], *, lane: int, edge: str | None
) -> None:
    figure.add_scatter(
        x=[event["step"] for event in events],
        y=[-lane] * len(events),
        yaxis="y2",
        mode="markers",
        name=_text(name),
        marker={
            "symbol": mark.symbol,
            "size": LANE_PIXELS - 1,
            "color": mark.colour,
            "line": {"color": edge or mark.colour, "width": 1},
        },
        text=[_text(f"{run.name}, step {event['step']}: {name} {_shortened(details(event))}") for event in events],
        hovertemplate="%{text}<extra></extra>",
        showlegend=False,
        cliponaxis=False,
        meta="marks",
    )
    if mark.across:
        for step in sorted({event["step"] for event in events} - {0}):
            figure.add_shape(
                type="line", x0=step, x1=step, y0=0, y1=1, yref="paper", opacity=0.6,
                line={"color": edge or mark.colour, "width": 1, "dash": "dot"},
            )  # fmt: skip


def marks_of(run: Run) -> list[tuple[str, Mark, list[dict[str, Any]]]]:
    """The run's events by name: those that are known first, in the order of ``MARKS``."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for event in run.events:
        by_name.setdefault(str(event["event"]), []).append(event)
    names = [name for name in MARKS if name in by_name] + sorted(set(by_name) - set(MARKS))
    return [(name, MARKS.get(name, OTHER_MARK), by_name[name]) for name in names]


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _text(text: str) -> str:
    """For plotly, which reads tags in its texts."""
    return html.escape(_shortened(text, 200), quote=False)


def _shortened(text: str, limit: int = 120) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
