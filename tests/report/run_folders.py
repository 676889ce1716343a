"""Run folders with all that a run may write, and what a page holds."""

import base64
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import yaml

T0 = 1_790_000_000.0
PARTS = ("data", "forward", "backward", "step")


def step_line(step: int, n_heads: int = 2, **changes: Any) -> dict[str, Any]:
    losses = [2.0 + head + 5 * math.exp(-step / 40) for head in range(n_heads)]
    return {
        "step": step,
        "time": T0 + 2.0 * step,
        "tokens": step * 512,
        "loss": sum(losses),
        "loss_per_head": losses,
        "accuracy_per_head": [math.exp(-loss) for loss in losses],
        "lr": 1e-3,
        "grad_norm": 1.0 + 1 / step,
        "skipped_steps": 0,
        "tokens_per_s": 256.0,
        "mfu": 0.25,
        "memory_gib": 0.5,
        "seconds": 2.0,
        "seconds_per_part": dict(zip(PARTS, (0.1, 0.5, 1.0, 0.2), strict=True)),
        "slowest_rank": {"rank": 1, "seconds": 3.0, "median_seconds": 2.0},
    } | changes


def validation_line(step: int, losses: list[float]) -> dict[str, Any]:
    return {
        "step": step,
        "validation_loss_per_head": losses,
        "validation_accuracy_per_head": [math.exp(-loss) for loss in losses],
        "validation_targets": 99,
        "validation_sets": {"code": {"losses": losses}, "prose": {"losses": [loss + 1 for loss in losses]}},
    }


def event_line(step: int, name: str, **values: Any) -> dict[str, Any]:
    return {"step": step, "time": T0 + 2.0 * step, "event": name, **values}


ALL_EVENTS = [
    event_line(0, "started", world_size=4, layout={"tensor": 2, "pipeline": 1, "data": 2}, resumed_from=None),
    event_line(20, "checkpoint", path="checkpoints/step-20", stall_seconds=0.5, seconds=1.5, bytes=1000),
    event_line(21, "checkpoint_failed", error="No space left on device"),
    event_line(22, "skipped", reason="spike", loss=9.0, grad_norm=80.0),
    event_line(23, "slow_rank", rank=1, ratio=1.5),
    event_line(23, "hang", ranks=[1], hosts=["node7"], part="training", seconds=360.0),
    event_line(24, "stopped", signal="SIGTERM"),
    event_line(20, "damaged", path="checkpoints/step-24", error="a checksum differs"),
    event_line(20, "started", world_size=2, layout={"tensor": 2, "pipeline": 1, "data": 1}, resumed_from="step-20"),
    event_line(25, "of_tomorrow", unheard={"of": 1}),
]


def write_run(folder: Path, records: list[dict[str, Any]], config: Any = None, tail: str = "") -> Path:
    folder.mkdir(parents=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text + tail)
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


class Page(HTMLParser):
    """The figures of a page and its words; ``addresses`` are those that a browser loads."""

    def __init__(self, path: Path):
        super().__init__()
        self.addresses: list[str] = []
        self.words: list[str] = []
        self._figures, self._inside = "", ""
        self.feed(path.read_text())
        self.figures = [plot["figure"] for plot in json.loads(self._figures or "[]")]
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self._inside = "figures" if attributes.get("id") == "figures" else tag
        names = ("src", "srcset", "data", "action") + (("href",) if tag != "a" else ())
        self.addresses += [attributes[name] for name in names if name in attributes]

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "figures":
            self._figures += data
        elif self._inside not in ("script", "style"):
            self.words.append(data)

    def curves(self, unit: str) -> list[tuple[str, list[float], list[float]]]:
        """(name, x, y) of the curves in the figures whose y axis has this title."""
        return [
            (trace["name"], _array(trace["x"]), _array(trace["y"]))
            for figure in self.figures
            if figure["layout"]["yaxis"]["title"]["text"] == unit
            for trace in figure["data"]
            if trace.get("meta") != "marks"
        ]

    def marks(self, figure: int = 0) -> dict[str, list[float]]:
        """Steps by the name of the event."""
        traces = self.figures[figure]["data"]
        return {trace["name"]: _array(trace["x"]) for trace in traces if trace.get("meta") == "marks"}


def _array(value: Any) -> list[float]:
    if isinstance(value, dict):
        kinds = {"f8": np.float64, "f4": np.float32, "i1": np.int8, "i2": np.int16, "i4": np.int32, "u1": np.uint8}
        return np.frombuffer(base64.b64decode(value["bdata"]), kinds[value["dtype"]]).tolist()
    return [math.nan if item is None else item for item in value]
