"""Runs cases of the matrix and prints what came out as Markdown tables made from the records."""

import argparse
import json
import sys
import time
from itertools import groupby
from pathlib import Path
from typing import Any

from tests.parallel.cases import QUICK, Case, every_case
from tests.parallel.matrix import TOLERANCE, record, train_all

BEGIN, END = "<!-- layouts:begin -->", "<!-- layouts:end -->"
HEADINGS = {"loss": "loss", "grad_norm": "gradient norm", "parameters": "parameters", "evaluation": "evaluation"}
CASES_PER_GROUP = 21  # of ranks: process groups and memory of earlier cases stay behind in a process


def run(cases: list[Case]) -> list[dict[str, Any]]:
    """The records of all cases; a group of ranks that fails ends the run."""
    records = []
    for (_, layout, schedule), members in groupby(cases, key=lambda case: (case.world, case.layout, case.schedule)):
        members = list(members)
        for first in range(0, len(members), CASES_PER_GROUP):
            some, started = members[first : first + CASES_PER_GROUP], time.perf_counter()
            records += [record(case, training) for case, training in zip(some, train_all(some), strict=True)]
            seconds, failed = time.perf_counter() - started, sum(bool(r["failed"]) for r in records)
            print(f"{layout} {schedule}: {len(some)} cases, {seconds:.0f} s; failed so far: {failed}", file=sys.stderr)
    return records


def layout_table(records: list[dict[str, Any]]) -> str:
    """A row for each layout and schedule with the worst errors of its cases."""
    header = ["layout", "engine", "cases", "sequence parallel", "ZeRO", "recompute", "heads", *HEADINGS.values()]
    rows = []
    groups: dict[tuple, list[dict]] = {}
    for entry in records:
        groups.setdefault((entry["running"]["layout"], entry["running"]["engine"]), []).append(entry)
    for (layout, engine), members in groups.items():
        running = [entry["running"] for entry in members]
        replicas = running[0]["kv_replicas"]
        failed = sum(bool(entry["failed"]) for entry in members)
        rows.append(
            [
                layout + (f" (each key/value head on {replicas} ranks)" if replicas > 1 else ""),
                engine.split(" of ")[0],
                f"{len(members)}" + (f", {failed} failed" if failed else ""),
                _values("on" if one["sequence"] else "off" for one in running),
                _values(_zero(one) for one in running),
                _values(one["recompute"] for one in running),
                _values(one["mode"] for one in running),
                *(f"{max(entry['errors'][key] for entry in members):.0e}" for key in HEADINGS),
            ]
        )
    return _markdown(header, rows)


def case_table(records: list[dict[str, Any]]) -> str:
    """A row for each case."""
    header = ["layout", "layers of each pipeline rank", "on", *HEADINGS.values()]
    rows = []
    for entry in records:
        running = entry["running"]
        on = [f"ZeRO {_zero(running)}", f"{running['mode']} heads"]
        on += ["sequence parallelism"] * running["sequence"] + ["DualPipeV"] * ("Dual" in running["engine"])
        on += [f"recompute {running['recompute']}"] * (running["recompute"] != "none")
        on += ["**failed**"] * bool(entry["failed"])
        layers = " / ".join(_short(rank) for rank in running["layers"])
        rows.append([running["layout"], layers, ", ".join(on), *(f"{entry['errors'][key]:.0e}" for key in HEADINGS)])
    return _markdown(header, rows)


def report(records: list[dict[str, Any]]) -> str:
    quick = {str(case) for case in QUICK}
    failed = sum(bool(entry["failed"]) for entry in records)
    limits = ", ".join(f"{name} {TOLERANCE[key]:.0e}" for key, name in HEADINGS.items())
    n_replicas = sum(entry["errors"]["replicas"] for entry in records)
    return "\n".join(
        [
            f"{len(records)} cases, {failed} outside of the limits ({limits}); tensors whose replicas on two ranks "
            f"differ in any bit: {n_replicas}. Worst relative errors:",
            "",
            layout_table(records),
            "",
            "The cases that every run of the tests repeats, one by one:",
            "",
            case_table([entry for entry in records if entry["case"] in quick]),
        ]
    )


def replace_between(text: str, new: str) -> str:
    """``text`` with ``new`` between the markers."""
    before, found, rest = text.partition(BEGIN)
    _, found_end, after = rest.partition(END)
    if not found or not found_end:
        raise ValueError(f"no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{new}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.parallel.matrix", description=__doc__)
    parser.add_argument("--full", action="store_true", help="every case; default: those of `make test` alone")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="with --full: only each N-th")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there")
    parser.add_argument("--write", type=Path, metavar="PAGE", help=f"put the tables between {BEGIN} and {END} of it")
    options = parser.parse_args()
    more = every_case()[:: options.every] if options.full else []
    records = run(list(dict.fromkeys([*QUICK, *more])))
    if options.json:
        options.json.write_text(json.dumps(records, indent=1))
    text = report(records)
    print(text)
    if options.write:
        options.write.write_text(replace_between(options.write.read_text(), text))
    if any(entry["failed"] for entry in records):
        sys.exit(1)


def _zero(running: dict[str, Any]) -> str:
    return f"{running['zero']}{' offloaded' if running['offload'] else ''}"


def _values(values) -> str:
    return ", ".join(sorted(set(values)))


def _short(layers: list[str]) -> str:
    """embedding and trunk layers as numbers, for a narrow column."""
    names = {"tok_embeddings": "embedding"}
    return " ".join(names.get(layer, layer.removeprefix("layers.")) for layer in layers)


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
