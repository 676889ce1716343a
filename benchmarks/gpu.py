"""Everything that a GPU has to show, in one command that can be stopped and goes on where it was.

    python benchmarks/gpu.py                  # again and again until it says that nothing is left; 25 minutes in all
    python benchmarks/gpu.py --only decode    # one group of measurements
    python benchmarks/gpu.py --device cpu --tiny --output /tmp/tiny.json     # the same code in small, for no figures

Each measurement is written down as soon as it is made; no new one is begun after ``--minutes``. The groups: ceilings
(bf16 GEMM, copy), kernels (each backend against its definition: error, time), loss (the cross-entropy against its bare
products), train (steps at the paper's sizes: tokens/s, MFU, peak memory), heads (the modes against a naive sum),
precision (200 steps in bf16 against fp32), decode (plain and self-speculative, with and without CUDA graphs).
"""

import argparse
import datetime
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import gpu_measurements as measurements
import torch

from megamtp.files import write_atomic
from megamtp.training.device import grow_segments

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    options = command_line()
    grow_segments()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("error: there is no GPU here; --device cpu --tiny runs the same code in small")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    path = options.output or RESULTS / f"{slug(name)}-{datetime.date.today()}.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    results: dict[str, Any] = record.setdefault("results", {})
    record |= {"device": name, "torch": torch.__version__, "tiny": options.tiny, "command": " ".join(sys.argv)}

    bench = measurements.Bench(device, options.tiny, results)
    todo = [key for key in bench.measurements if key not in results and bool(re.match(options.only, key))]
    started = time.perf_counter()
    while todo and time.perf_counter() - started < 60 * options.minutes:
        key = todo.pop(0)
        begun = time.perf_counter()
        results[key] = bench.measurements[key]() | {"took_s": round(time.perf_counter() - begun, 1)}
        record |= summary(results)
        write_atomic(path, json.dumps(record, indent=1).encode())
        print(
            f"[{time.perf_counter() - started:5.0f} s] {key}: {json.dumps(results[key])}", file=sys.stderr, flush=True
        )
    print(table(results))
    print(f"{len(todo)} measurements left: run it again" if todo else "nothing is left", file=sys.stderr)
    print(json.dumps({"file": str(path), "left": len(todo)} | summary(results)))


def command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="begin nothing later than this (default: 8)")
    parser.add_argument("--only", default="", help="measurements whose name begins with this regular expression")
    parser.add_argument("--output", type=Path, help="results, read and added to (default: by device and date)")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the code")
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    return parser.parse_args()


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def summary(results: dict[str, Any]) -> dict[str, float | None]:
    """The figures that are asked for by name; null where what they need has not been measured."""

    def of(key: str, *fields: str) -> float | None:
        value: Any = results.get(key)
        for field in fields:
            value = value and value.get(field)
        return value

    one, four = results.get("train 1.3b n1 sequential"), results.get("train 1.3b n4 sequential")
    return {
        "mfu_1.3b_n4": of("train 1.3b n4 sequential", "mfu"),
        "mfu_3b_n4": of("train 3b n4 sequential", "mfu"),
        "time_over_flops_n4": one and four and four["seconds"] / one["seconds"] / four["flops"] * one["flops"],
        "memory_ratio_n4_n1": one and four and four["peak_gib"] and four["peak_gib"] / one["peak_gib"],
        "cross_entropy_share": of("loss cross-entropy", "share"),
        "bf16_over_fp32_loss": of("precision bf16", "over_fp32"),
    }


def table(results: dict[str, Any]) -> str:
    """A block a group, a row a measurement; the columns are whatever its measurements have."""
    lines = []
    groups: dict[str, dict[str, Any]] = {}
    for key, value in results.items():
        words = key.split()
        groups.setdefault(" ".join(words[:2] if words[0] in ("kernels", "ceilings") else words[:1]), {})[key] = value
    for rows in groups.values():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row if column != "took_s"))
        cells = [["", *columns]] + [[key, *(shown(row.get(column)) for column in columns)] for key, row in rows.items()]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines += ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in cells]
        lines.append("")
    return "\n".join(lines)


def shown(value: Any) -> str:
    if isinstance(value, list):
        return " - ".join(map(shown, value))
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
