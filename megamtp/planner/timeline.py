"""A picture of one step of the pipeline: a row a rank, a box a pass, an arrow a message."""

from pathlib import Path

from megamtp.errors import UserError
from megamtp.planner.estimate import Estimate
from megamtp.planner.pipeline import Event, Pass, Pipeline
from megamtp.training.run_config import RunConfig

FORWARD, BACKWARD, HEADS_FORWARD, HEADS_BACKWARD = "#9ecae1", "#3182bd", "#fdae6b", "#e6550d"
MESSAGE = "#636363"
MAX_MICRO_BATCHES = 64  # beyond, boxes are thinner than their edges
ROW, SPACING = 0.72, 1.0


def draw_timeline(estimate: Estimate, path: Path) -> None:
    """``path``'s ending is the format. ``UserError`` without matplotlib, or where the picture would be unreadable."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--timeline needs matplotlib: pip install megamtp[plot]") from None
    config, step = estimate.config, estimate.step
    parallel = config.parallel
    micro_batches = config.micro_batches(estimate.world_size)
    if micro_batches > MAX_MICRO_BATCHES:
        raise UserError(
            f"--timeline: {micro_batches} micro-batches are too many to be seen; draw fewer, at most "
            f"{MAX_MICRO_BATCHES}, such as with a smaller --training.global_batch_size"
        )
    pipeline = Pipeline(parallel.pipeline, micro_batches, parallel.schedule)
    end = max(event.end for event in step.events)
    unit, name = (1e3, "ms") if end < 1 else (1, "s")

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "megamtp", "font.size": 9}):
        width = min(24, max(9, 1.5 + 0.65 * micro_batches * parallel.stages / parallel.pipeline))
        figure = Figure(figsize=(width, 1.7 + 0.62 * parallel.pipeline), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        least = 0.012 * end / (width / 12)  # a narrower box has no room for its number
        for event in step.events:
            if isinstance(event.what, Pass) and event.end > event.begin:
                _draw_pass(axes, event, pipeline, unit, least)
        for event in step.events:
            if not isinstance(event.what, Pass):
                _draw_message(axes, event, pipeline, unit)
        axes.set_xlim(0, end * unit)
        axes.set_ylim(parallel.pipeline - 0.4, -0.6)
        stages = ["" for _ in range(parallel.pipeline)]
        for stage in estimate.stages:
            stages[stage.rank] += f"\n{stage.layers}"
        labels = [f"rank {rank}{layers}" for rank, layers in enumerate(stages)]
        axes.set_yticks(range(parallel.pipeline), labels)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(f"{name} from the step's start; without what follows: gradients between replicas, optimizer")
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        busy = sum(e.end - e.begin for e in step.events if isinstance(e.what, Pass)) / (end * parallel.pipeline)
        axes.set_title(
            f"{parallel.schedule}, {parallel.pipeline} pipeline ranks, {micro_batches} micro-batches: "
            f"{end * unit:,.3g} {name}, ranks busy {busy:.0%} of it",
            loc="left",
        )
        figure.legend(
            handles=_legend(config, bool(estimate.step.stages[-1].backward.total)),
            loc="outside lower center",
            ncols=5,
            frameon=False,
        )
        try:
            figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)
        except (ValueError, OSError) as error:
            raise UserError(f"--timeline {path}: cannot write it: {error}") from None


def _draw_pass(axes, event: Event, pipeline: Pipeline, unit: float, least: float) -> None:
    from matplotlib.patches import Rectangle

    what, seconds = event.what, event.end - event.begin
    heads, forward = what.stage == pipeline.stages - 1, what.kind == "forward"
    color = {
        (False, True): FORWARD,
        (False, False): BACKWARD,
        (True, True): HEADS_FORWARD,
        (True, False): HEADS_BACKWARD,
    }[heads, forward]
    # Of DualPipeV's two stages on a rank the one that comes back stands below.
    height, top = ROW, event.rank - ROW / 2
    if pipeline.stages > pipeline.ranks:
        height = ROW / 2
        top += height * (what.stage >= pipeline.ranks)
    corner = event.begin * unit, top
    axes.add_patch(Rectangle(corner, seconds * unit, height, facecolor=color, edgecolor="white", linewidth=0.6))
    if seconds > least:
        axes.text(
            (event.begin + seconds / 2) * unit,
            top + height / 2,
            str(what.micro_batch),
            ha="center",
            va="center_baseline",
            fontsize=7.5,
            color="black" if forward else "white",
        )


def _draw_message(axes, event: Event, pipeline: Pipeline, unit: float) -> None:
    to = pipeline.rank_of(event.what.to)
    down = 1 if to > event.rank else -1
    style = dict(arrowstyle="-|>", color=MESSAGE, linewidth=0.6, shrinkA=0, shrinkB=0, mutation_scale=5)
    begin = (event.begin * unit, event.rank + down * ROW / 2)
    axes.annotate("", (event.end * unit, to - down * ROW / 2), begin, arrowprops=style, annotation_clip=False)


def _legend(config: RunConfig, heads_have_backward: bool) -> list:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    inside = config.heads.mode_under(config.parallel.zero_stage) == "sequential"
    also = ", with the heads' backward" if inside else ""
    handles = [
        Patch(color=FORWARD, label="forward"),
        Patch(color=BACKWARD, label="backward"),
        Line2D([], [], color=MESSAGE, linewidth=0.8, marker=">", markersize=3, label="message"),
        Patch(color=HEADS_FORWARD, label=f"last stage: forward{also}"),
    ]
    return handles + [Patch(color=HEADS_BACKWARD, label="last stage: backward")] * heads_have_backward
