"""Plan a run before it is launched: memory, seconds a step, days; and which layout to take.

python tools/plan.py configs/13b_n4.yaml --gpu h100-80gb --gpus 256
python tools/plan.py configs/13b_n4.yaml --gpu h100-80gb --gpus 256 --rank
python tools/plan.py configs/demo.yaml --gpu cpu --gpus 2 --memory-gb 12 --fp32-tflops 0.05 --bandwidth-gbs 10 \\
    --intra-gbs 2 --per-node 2
"""

import argparse
import json
from dataclasses import fields
from pathlib import Path

from megamtp.errors import UserError, exits_cleanly
from megamtp.files import write_atomic
from megamtp.planner.devices import DEVICES, FIGURES, Assumptions, check_complete, find_device


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="plan.py CONFIG --gpu NAME --gpus N [--rank] [--timeline FILE] [--json FILE] [--section.key VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", help="YAML file; see configs/. Keys of it may be overridden: --section.key VALUE")
    parser.add_argument("--gpu", required=True, metavar="NAME", help=f"one of {', '.join(DEVICES)}")
    parser.add_argument("--gpus", required=True, type=int, metavar="N", help="how many, over all nodes")
    parser.add_argument("--gpu-file", type=Path, metavar="FILE", help="YAML with more GPUs: a name and its figures")
    parser.add_argument("--rank", action="store_true", help="rank all layouts in place of the config's own")
    parser.add_argument("--timeline", type=Path, metavar="FILE", help="draw one step of the pipeline (.svg, .png)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON, too")
    device = parser.add_argument_group("figures in place of the GPU's own, as in its data sheet")
    for figure in FIGURES:
        kind = int if figure == "per_node" else float
        device.add_argument(f"--{figure.replace('_', '-')}", type=kind, metavar="X")
    assumed = parser.add_argument_group("assumptions")
    for field in fields(Assumptions):
        text = f"{field.metadata['help']} (default {field.default})"
        assumed.add_argument(f"--{field.name.replace('_', '-')}", type=float, metavar="X", help=text)
    return parser


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    options, overrides = build_parser().parse_known_args(arguments)
    if options.gpus < 1:
        raise UserError(f"--gpus must be 1 or more, got {options.gpus}")
    if options.timeline and options.rank:
        raise UserError("--timeline draws the config's own layout; leave out --rank")
    device = find_device(options.gpu, _given(options, FIGURES), options.gpu_file)
    assumptions = Assumptions(**_given(options, [field.name for field in fields(Assumptions)]))

    from megamtp.config import load
    from megamtp.training.run_config import RunConfig

    config = load(RunConfig, options.config, overrides)
    check_complete(options.gpu, device, config.training.precision, options.gpus)
    title = f"{options.config} on {options.gpus} x {options.gpu}"
    if options.rank:
        values = _rank(title, config, options.gpus, device, assumptions)
    else:
        values = _plan(title, config, options.gpus, device, assumptions, options.timeline)
    if options.json:
        device_values = vars(device) | {"name": options.gpu, "count": options.gpus}
        values = {"config": options.config, "device": device_values, "assumptions": vars(assumptions)} | values
        write_atomic(options.json, json.dumps(values, indent=1).encode())


def _given(options: argparse.Namespace, names: list[str]) -> dict[str, float]:
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _plan(title, config, gpus, device, assumptions, timeline: Path | None) -> dict:
    from megamtp.planner.estimate import estimate_on
    from megamtp.planner.tables import describe_estimate

    if timeline and config.parallel.pipeline == 1:
        raise UserError("--timeline draws a pipeline; parallel.pipeline is 1")
    estimate = estimate_on(config, gpus, device, assumptions)
    print(f"{title}\n{describe_estimate(estimate)}")
    if timeline:
        from megamtp.planner.timeline import draw_timeline

        draw_timeline(estimate, timeline)
        print(f"timeline: {timeline}")
    return estimate.as_json()


def _rank(title, config, gpus, device, assumptions) -> dict:
    from megamtp.planner.layouts import rank_layouts
    from megamtp.planner.tables import describe_ranking

    ranking = rank_layouts(config, gpus, device, assumptions)
    print(f"{title}\n{describe_ranking(ranking)}")
    counts = {"considered": ranking.considered, "too_large": ranking.too_large}
    return counts | {"layouts": [estimate.as_json() for estimate in ranking.best]}


if __name__ == "__main__":
    main()
