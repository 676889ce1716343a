import dataclasses

import pytest

from megamtp.config import from_dict
from megamtp.errors import UserError
from megamtp.planner.devices import DEVICES, Assumptions, Device
from megamtp.planner.estimate import Estimate, estimate_on, estimate_run, layout_of
from megamtp.planner.layouts import _layouts, rank_layouts
from megamtp.planner.tables import describe_estimate, describe_ranking
from megamtp.training.run_config import RunConfig

H100 = DEVICES["h100-80gb"]
SMALL_GPU = Device(0.5, 5, 2, 100, 2, 0.5, per_node=4)


def run_config(**changes):
    values = {
        "run_dir": "run",
        "model": {"vocab_size": 4000, "dim": 504, "n_layers": 10, "n_heads": 6, "n_future_tokens": 3},
        "data": {"train": "data", "seq_len": 512},
        "training": {"steps": 1000, "global_batch_size": 48, "precision": "bf16"},
    }
    for section, keys in changes.items():
        values[section] = values.get(section, {}) | keys
    return from_dict(RunConfig, values, "test")


NO_LIBRARIES = Assumptions(libraries_gb=0)


def test_the_best_are_those_of_an_exhaustive_search():
    """Without the lower bound that spares simulations."""
    config = run_config()
    everything = [estimate_on(layout, 12, SMALL_GPU, NO_LIBRARIES) for layout in _layouts(config, 12, SMALL_GPU)]
    fitting = sorted((e for e in everything if e.fits), key=lambda e: (e.step.total, e.memory.total))
    ranking = rank_layouts(config, 12, SMALL_GPU, NO_LIBRARIES, keep=10)
    assert 20 < len(fitting) < len(everything) == ranking.considered
    assert ranking.too_large == len(everything) - len(fitting)
    assert [e.step.total for e in ranking.best] == [e.step.total for e in fitting[:10]]
    assert layout_of(ranking.best[0].config, 12) == layout_of(fitting[0].config, 12)


def test_what_is_among_the_layouts():
    """Each divides, each once; tensor parallelism in the node and by the heads; nothing that the config refuses."""
    layouts = [layout_of(layout, 12) for layout in _layouts(run_config(), 12, SMALL_GPU)]
    assert len({tuple(layout.values()) for layout in layouts}) == len(layouts)
    assert {layout["parallel.tensor"] for layout in layouts} == {1, 2}  # 4 does not divide 6 heads, 3 not the node
    assert {layout["parallel.pipeline"] for layout in layouts} == {1, 2, 3, 4, 6}  # 12 are more than the layers
    for layout in layouts:
        assert layout["parallel.tensor"] * layout["parallel.pipeline"] * layout["data"] == 12
        assert layout["data"] * layout["micro_batches"] * layout["training.micro_batch_size"] == 48
        assert layout["parallel.zero_stage"] >= 1  # bf16
        if layout["parallel.schedule"] == "dualpipev":
            assert layout["micro_batches"] >= 2 * layout["parallel.pipeline"]
    fp32 = [layout_of(layout, 12) for layout in _layouts(run_config(training={"precision": "fp32"}), 12, SMALL_GPU)]
    assert {layout["parallel.zero_stage"] for layout in fp32} == {0, 1, 2, 3}
    alone = [layout_of(layout, 1) for layout in _layouts(run_config(), 1, SMALL_GPU)]
    assert {layout["parallel.zero_stage"] for layout in alone} == {1}  # there is nobody to share with


def test_a_ranked_layout_is_the_configs_own_when_asked_for():
    """The cut that the ranking gives by hand is the one that the config makes by itself."""
    ranking = rank_layouts(run_config(), 12, SMALL_GPU, NO_LIBRARIES)
    for best in ranking.best:
        parallel = dataclasses.replace(best.config.parallel, pipeline_cut=None)
        again = estimate_on(dataclasses.replace(best.config, parallel=parallel), 12, SMALL_GPU, NO_LIBRARIES)
        assert again.step.total == pytest.approx(best.step.total, rel=1e-12)
        assert again.memory == best.memory


@pytest.mark.parametrize("figure", ["bf16_tflops", "bandwidth_gbs", "intra_gbs", "inter_gbs", "memory_gb"])
def test_a_better_device_ranks_no_slower(figure):
    config = run_config()
    better = dataclasses.replace(SMALL_GPU, **{figure: 2 * getattr(SMALL_GPU, figure)})
    own, other = (rank_layouts(config, 12, device, NO_LIBRARIES, keep=1) for device in (SMALL_GPU, better))
    assert other.best[0].step.total <= own.best[0].step.total
    if figure == "memory_gb":
        assert other.too_large < own.too_large


def test_nothing_fits():
    tiny = dataclasses.replace(SMALL_GPU, memory_gb=0.01)
    ranking = rank_layouts(run_config(), 12, tiny, NO_LIBRARIES)
    assert ranking.best == [] and ranking.too_large == ranking.considered > 0
    with pytest.raises(UserError, match="none of .* fits into 0.0 GiB: the smallest .* needs .*most of it") as refused:
        describe_ranking(ranking)
    assert "\n" not in str(refused.value)
    ranking = rank_layouts(run_config(), 13, tiny, NO_LIBRARIES)
    with pytest.raises(UserError, match="no layout divides"):
        describe_ranking(ranking)


def test_zero3_needs_room_for_the_whole_model_at_the_start():
    config = run_config(parallel={"zero_stage": 3}, model={"vocab_size": 1_000_000})
    estimate = estimate_on(config, 48, H100, NO_LIBRARIES)
    weights = 2 * sum(stage.parameters for stage in estimate.stages)
    assert estimate.memory.start == weights
    assert estimate.memory.total == max(weights, estimate.memory.tensors.total + estimate.memory.slack)
    assert estimate_on(run_config(), 48, H100, NO_LIBRARIES).memory.start == 0


# --- what is said of a layout


def test_figures_of_a_run():
    estimate = estimate_on(run_config(), 12, SMALL_GPU, NO_LIBRARIES)
    seconds = estimate.step.total
    assert estimate.tokens_per_step == 48 * 512
    assert estimate.tokens_per_day == pytest.approx(48 * 512 * 86_400 / seconds)
    assert estimate.days == pytest.approx(1000 * seconds / 86_400)
    assert estimate.mfu == pytest.approx(estimate.flops_per_step / seconds / 12 / 5e12)
    assert 0 < estimate.mfu < Assumptions().matmul_share
    values = estimate.as_json()
    assert values["device_hours"] == pytest.approx(12 * 24 * estimate.days)
    assert sum(values["seconds"].values()) == pytest.approx(values["seconds_per_step"])
    assert sum(values["memory_bytes"].values()) == pytest.approx(values["memory_total_bytes"], abs=20)
    assert values["layout"]["data"] == 12 and values["fits"] is True


@pytest.mark.parametrize(
    ("driver", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA A100-SXM-64GB", None),
        ("NVIDIA GH200 480GB", None),
        ("Tesla T4", None),
        ("cpu", None),
        (None, None),
    ],
)
def test_devices_by_their_drivers_names(driver, known):
    estimate = estimate_run(run_config(), 12, driver)
    assert estimate.device == (known and DEVICES[known])
    assert isinstance(estimate, Estimate) and (estimate.step is None) == (known is None)
    line = estimate.summary()
    assert "\n" not in line and "GiB on the fullest rank" in line and "TFLOP a step" in line
    assert ("MFU" in line) == (known is not None)
    if known is None:
        assert estimate.mfu is estimate.days is estimate.fits is estimate.tokens_per_day is None


def test_summary_says_that_it_does_not_fit():
    estimate = estimate_on(run_config(), 12, dataclasses.replace(SMALL_GPU, memory_gb=0.1))
    assert "(does not fit)" in estimate.summary()
    assert "DOES NOT FIT" in describe_estimate(estimate)


def test_estimate_beside_what_was_measured():
    estimate = estimate_on(run_config(), 12, SMALL_GPU)
    tensors = estimate.memory.tensors.total
    line = estimate.against(2 * estimate.step.total, tensors / 2)
    assert "of tensors (2.00)" in line and line.endswith("s a step (0.50)")
    unknown = estimate_on(run_config(), 12, None)
    assert unknown.against(3.0, tensors).endswith("of tensors (1.00); 3.000 s a step")
    assert unknown.against(3.0, tensors, resident=True).endswith("GiB resident, with freed memory; 3.000 s a step")


def test_the_estimate_beside_the_measurement_is_the_main_ranks():
    """Not the fullest one's, which has the heads here."""
    estimate = estimate_on(run_config(parallel={"pipeline": 2, "pipeline_cut": [1, 6]}), 12, SMALL_GPU)
    first, last = (stage.rank_memory.total for stage in estimate.stages)
    assert first < 0.9 * last == 0.9 * estimate.memory.tensors.total
    assert "of tensors (1.00)" in estimate.against(1.0, first)


def test_table_of_the_ranking():
    ranking = rank_layouts(run_config(), 12, SMALL_GPU, NO_LIBRARIES, keep=3)
    header, *rows, counts, first = describe_ranking(ranking).splitlines()
    assert len(rows) == 3 and header.split()[:3] == ["s/step", "MFU", "days"]
    assert [float(row.split()[0]) for row in rows] == pytest.approx([e.step.total for e in ranking.best], abs=6e-4)
    assert counts.startswith(f"{ranking.considered} layouts divide; {ranking.too_large} of them")
    overrides = first.removeprefix("the first one: ").split()
    again = estimate_on(_with(run_config(), overrides), 12, SMALL_GPU, NO_LIBRARIES)
    assert again.step.total == pytest.approx(ranking.best[0].step.total)


def _with(config, overrides):
    from megamtp.config import to_dict

    values = to_dict(config)
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        section, name = key[2:].split(".")
        values[section][name] = int(value) if value.isdigit() else value
    return from_dict(RunConfig, values, "test")
