"""The page: summary, plots, events and configs of one or several runs in one HTML file that needs nothing else."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

import numpy as np

from megamtp.errors import UserError
from megamtp.files import write_atomic
from megamtp.report.runs import Run, as_number, read_runs
from megamtp.report.thin import MOST_POINTS, window_of

MOST_EVENTS = 500
NO_VALUE = "-"


def write_report(folders: list[Path], output: Path) -> None:
    """Write the page of ``folders``. ``UserError`` for a folder without metrics, and without plotly or jinja2."""
    runs = read_runs(folders)  # first: it is the user's, and importing plotly takes time
    write_atomic(output, render(runs, [str(folder) for folder in folders]).encode())


def render(runs: list[Run], folders: list[str]) -> str:
    """The page as text."""
    try:
        import jinja2
        from plotly.io.json import to_json_plotly
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        package = (error.name or "plotly").partition(".")[0]
        raise UserError(f"the report needs {package}, which is not installed; pip install {package}") from None
    from megamtp.report.figures import COLOURS, MOST_MARKS, details, marks_of, panels, time_of

    plots = panels(runs)
    numbered = [(panel.section, number, panel.title) for number, panel in enumerate(plots)]
    sections = [
        (section, [(number, title) for _, number, title in of_section])
        for section, of_section in groupby(numbered, key=lambda entry: entry[0])
    ]
    events = sorted(
        (
            {
                "time": time_of(event),
                "run": run.name,
                "step": event["step"],
                "name": name,
                "mark": mark,
                "details": details(event),
            }
            for run in runs
            for name, mark, of_name in marks_of(run)
            for event in of_name
        ),
        key=lambda event: (event["time"], event["step"]),
    )
    counts = {name: (mark, 0) for run in runs for name, mark, _ in marks_of(run)}
    for event in events:
        mark, count = counts[event["name"]]
        counts[event["name"]] = mark, count + 1
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("megamtp.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["thousands"] = lambda number: f"{number:,}"
    return environment.get_template("page.html").render(
        title=" · ".join(run.name for run in runs),
        written=datetime.fromtimestamp(time.time(), UTC).strftime("%Y-%m-%d %H:%M"),
        folders=folders,
        notes=[f"{run.name}: {note}" for run in runs for note in run.notes],
        runs=[
            {"name": run.name, "colour": COLOURS[index % len(COLOURS)], "config": list(run.config.items())}
            for index, run in enumerate(runs)
        ],
        summary=summary(runs),
        sections=sections,
        thinned=any(len(run.steps) > MOST_POINTS for run in runs),
        most_points=MOST_POINTS,
        most_marks=MOST_MARKS,
        key=[(name, mark, count) for name, (mark, count) in counts.items()],
        events=events[-MOST_EVENTS:],
        events_left_out=max(0, len(events) - MOST_EVENTS),
        differences=differences(runs),
        # It escapes "<", so that no text ends the script.
        figures=to_json_plotly([{"figure": panel.figure, "positive": panel.positive} for panel in plots]),
        plotly=get_plotlyjs() if plots else "",
    )


def differences(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """(dotted key, its value in each run) for keys whose values are not all equal."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = [(key, [str(run.config.get(key, NO_VALUE)) for run in runs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def summary(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """(label, a text for each run); rows that no run can fill are left out."""
    rows = [(label, [describe(run) or NO_VALUE for run in runs]) for label, describe in _SUMMARY]
    return [(label, values) for label, values in rows if set(values) != {NO_VALUE}]


def _steps(run: Run) -> str:
    planned = run.config.get("training.steps")
    return f"{max(run.steps, default=0):,}" + (f" of {planned:,}" if type(planned) is int else "")


def _tokens(run: Run) -> str:
    tokens = run.numbers("tokens")[1]
    return f"{tokens[-1]:,.0f}" if len(tokens) and np.isfinite(tokens[-1]) else ""


def _wall_time(run: Run) -> str:
    seconds = np.nansum(run.seconds()[1])
    times = np.array([as_number(record.get("time")) for record in (*run.steps.values(), *run.events)])
    times = times[np.isfinite(times)]
    told = f"{_duration(seconds)} in steps" if seconds > 0 else ""
    return f"{told}, {_duration(np.ptp(times))} from first to last line" if told and len(times) > 1 else told


def _last_losses(run: Run) -> str:
    window = window_of(len(run.steps))
    means = [_mean(run.numbers("loss_per_head", head)[1][-window:]) for head in range(run.n_heads)]
    return _row(means, "{:.3f}") + (f" (mean of {window} steps)" if window > 1 and means else "")


def _validation(key: str, form: str, scale: float = 1) -> Callable[[Run], str]:
    def describe(run: Run) -> str:
        columns = [run.numbers(key, head, of="validation") for head in range(run.n_heads)]
        last = [(steps[-1], values[-1] * scale) for steps, values in columns if len(steps)]
        return f"{_row([value for _, value in last], form)} (step {last[0][0]:,.0f})" if last else ""

    return describe


def _median(key: str, form: str, scale: float = 1) -> Callable[[Run], str]:
    def describe(run: Run) -> str:
        values = run.numbers(key)[1]
        return form.format(np.nanmedian(values) * scale) if np.isfinite(values).any() else ""

    return describe


def _peak_memory(run: Run) -> str:
    values = run.numbers("memory_gib")[1]
    return f"{np.nanmax(values):.2f} GiB" if np.isfinite(values).any() else ""


def _layout(run: Run) -> str:
    layouts = []
    for event in run.events:
        if event["event"] == "started" and isinstance(event.get("layout"), dict):
            text = " x ".join(f"{name} {size}" for name, size in event["layout"].items())
            ranks = event.get("world_size", "?")
            layouts.append(f"{text} ({ranks} rank{'' if ranks == 1 else 's'})")
    if layouts:
        changed = list(dict.fromkeys(layouts))
        return layouts[-1] + (f", before: {'; '.join(text for text in changed if text != layouts[-1])}"
                              if len(changed) > 1 else "")  # fmt: skip
    sizes = [f"{name} {run.config[f'parallel.{name}']}" for name in ("tensor", "pipeline")
             if f"parallel.{name}" in run.config]  # fmt: skip
    return " x ".join(sizes)


def _count(event: str) -> Callable[[Run], str]:
    def describe(run: Run) -> str:
        found = sum(record["event"] == event for record in run.events)
        return f"{found:,}" if found or _writes_events(run) else ""

    return describe


def _writes_events(run: Run) -> bool:
    return any(event["event"] == "started" for event in run.events)


def _restarts(run: Run) -> str:
    starts = sum(event["event"] == "started" for event in run.events)
    return f"{starts - 1:,}" if starts else ""


def _skipped(run: Run) -> str:
    counted = run.numbers("skipped_steps")[1]
    found = sum(event["event"] == "skipped" for event in run.events)
    return f"{max(found, np.nanmax(counted, initial=0)):,.0f}" if len(counted) or found else ""


_SUMMARY: list[tuple[str, Callable[[Run], str]]] = [
    ("steps", _steps),
    ("tokens", _tokens),
    ("wall time", _wall_time),
    ("loss per head, nats", _last_losses),
    ("validation loss per head, nats", _validation("validation_loss_per_head", "{:.3f}")),
    ("validation accuracy per head, %", _validation("validation_accuracy_per_head", "{:.1f}", 100)),
    ("tokens/s, median", _median("tokens_per_s", "{:,.0f}")),
    ("MFU, median", _median("mfu", "{:.1f} %", 100)),
    ("peak memory of the main rank", _peak_memory),
    ("layout", _layout),
    ("restarts", _restarts),
    ("skipped steps", _skipped),
    ("rolled back", _count("rolled_back")),
    ("checkpoints", _count("checkpoint")),
    ("checkpoints that failed", _count("checkpoint_failed")),
    ("damaged checkpoints", _count("damaged")),
]


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def _row(values: list[float], form: str) -> str:
    return " · ".join(form.format(value) if np.isfinite(value) else NO_VALUE for value in values)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    first = next(place for place, (number, _) in enumerate(parts) if number)
    return " ".join(f"{number} {unit}" for number, unit in parts[first : first + 2])
