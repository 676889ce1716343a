"""The page, read as a file and in a browser."""

import json
import re
import sys

import numpy as np
import pytest

from megamtp.report.thin import MOST_POINTS
from tests.report.browser import NAMES, REQUIRE, chromium, open_page
from tests.report.run_folders import ALL_EVENTS, Page, event_line, step_line, validation_line, write_run
from tools.report import main

NASTY = """</script><script>window.broken = 1</script><img src="x" onerror="window.broken = 1">&amp;'"{{ 7 * 7 }}"""


@pytest.fixture
def full(tmp_path):
    """A run with everything that a run can tell."""
    lines = [step_line(step) for step in range(1, 41)]
    lines += [validation_line(step, [2.5, 3.5]) for step in (20, 40)]
    return write_run(tmp_path / "full", lines + ALL_EVENTS, config={"model": {"dim": 64}, "note": NASTY})


@pytest.fixture
def long(tmp_path):
    """5,000 steps with a spike, a gap and hostile texts."""
    lines = [step_line(step, loss_per_head=[3.0, 4.0]) for step in range(1, 5001)]
    lines[1233]["loss_per_head"] = [77.0, 4.0]
    for line in lines[3000:3300]:
        line["loss_per_head"] = [None, 4.0]
    lines += [event_line(step, "checkpoint", path=NASTY) for step in range(1, 5001)]
    return write_run(tmp_path / "<b>long & 'bold'<b>", lines, config={"model": {"dim": 96}, NASTY: [NASTY]})


def report(*folders) -> Page:
    output = folders[0].parent / "page.html"
    main([*map(str, folders), "--output", str(output)])
    return Page(output)


def test_curves_are_the_run_s_numbers(full):
    page = report(full)
    losses = {(name, len(x)): (x, y) for name, x, y in page.curves("nats per token")}
    for head in (0, 1):
        x, y = losses[f"head {head + 1}", 40]
        assert x == list(range(1, 41))
        assert y == pytest.approx([step_line(step)["loss_per_head"][head] for step in range(1, 41)], rel=1e-6)
        x, y = losses[f"head {head + 1}, validation", 2]
        assert (x, y) == ([20, 40], [2.5 + head, 2.5 + head])
    assert losses["prose", 2] == ([20, 40], [3.5, 3.5])
    assert page.curves("GiB") == [("full", list(range(1, 41)), [0.5] * 40)]
    assert page.curves("%")[0][2] == [25.0] * 40
    assert page.curves("times the median rank")[0][2] == [1.5] * 40
    parts = {name: set(np.round(y, 6)) for name, _, y in page.curves("seconds, main rank")}
    assert parts == {"data": {0.1}, "forward": {0.5}, "backward": {1.0}, "step": {0.2}, "other": {0.2}}


def test_every_event_is_a_mark_on_every_plot_and_a_row(full):
    page = report(full)
    expected = {}
    for event in ALL_EVENTS:
        expected.setdefault(event["event"], []).append(event["step"])
    for figure in range(len(page.figures)):
        assert page.marks(figure) == expected
    for text in ("No space left on device", "a checksum differs", "resumed_from step-20", "unheard of=1", "SIGTERM"):
        assert text in page.text
    assert "2026-09-21 14:14:04" in page.text  # 24 steps of 2 s after T0


def test_a_long_run_is_thinned_and_says_so(long, full):
    page = report(long)
    head = next((x, y) for name, x, y in page.curves("nats per token") if name == "head 1")  # pale: every step
    assert len(head[0]) <= MOST_POINTS and head[0][0] == 1 and head[0][-1] == 5000
    assert dict(zip(*head, strict=True))[1234] == 77
    assert all(
        len(trace["x"]) <= MOST_POINTS
        for figure in page.figures
        for trace in figure["data"]
        if "bdata" not in trace["x"]
    )
    assert page.marks()["checkpoint"] == list(range(4701, 5001))
    assert "checkpoint (5,000, the newest 300 drawn)" in page.text
    assert "At most 2,000 points" in page.text and "4,500 earlier ones are left out" in page.text
    assert "At most" not in report(full).text


def test_runs_side_by_side(full, long):
    page = report(full, long)
    named = {figure["layout"]["yaxis"]["title"]["text"] for figure in page.figures}
    assert {"nats per token", "tokens/s", "GiB", "%", "top-1, %"} <= named
    names = {name for name, *_ in page.curves("tokens/s")}
    assert names == {"full", "&lt;b&gt;long &amp; 'bold'&lt;b&gt;"}  # plotly reads tags
    assert re.search(r"What differs\. full <b>long & 'bold'<b> model\.dim 64 96 note", page.text)


def test_a_run_that_has_only_begun(tmp_path):
    page = report(write_run(tmp_path / "run", ALL_EVENTS[:1]))
    assert page.figures == [] and "steps 0" in page.text and "started" in page.text
    page = report(write_run(tmp_path / "one", [step_line(1)]))
    assert page.curves("tokens/s") == [("one", [1], [256.0])]


def test_a_folder_that_is_no_run_is_one_line_and_code_2(full, tmp_path, capsys):
    output = tmp_path / "report.html"
    output.write_text("an earlier one")
    with pytest.raises(SystemExit) as ended:
        main([str(full), str(tmp_path / "nothing"), "--output", str(output)])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "nothing/metrics.jsonl: cannot read the metrics" in line
    assert output.read_text() == "an earlier one"


def test_without_output_the_page_lies_in_the_run_s_folder(full, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["full"])
    main(["full", str(full)])
    assert capsys.readouterr().out.split() == ["full/report.html", "report.html"]
    assert sorted(path.name for path in full.iterdir()) == ["config.yaml", "metrics.jsonl", "report.html"]


def test_plotly_that_is_not_installed_is_told(full, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(SystemExit) as ended:
        main([str(full)])
    assert ended.value.code == 2 and "pip install plotly" in capsys.readouterr().err


# What the page looks like from within, written into it once all is drawn.
PROBE = """<script>
async function probe() {
  while (!document.body.dataset.drawn) await new Promise((done) => setTimeout(done, 20));
  const all = [...document.querySelectorAll(".plot > div")];
  const types = () => all.map((place) => place._fullLayout.yaxis.type);
  const found = {
    width: innerWidth, needed: document.documentElement.scrollWidth, broken: window.broken ?? null,
    drawn: all.map((place) => place.querySelectorAll(".scatterlayer .trace").length),
    traces: all.map((place) => place.data.length),
    text: getComputedStyle(document.body).color, tick: all[0].querySelector(".xtick text").style.fill,
    before: types(),
  };
  document.getElementById("log").click();
  await new Promise((done) => setTimeout(done, 500));
  found.after = types();
  parent.postMessage(found, "*");
}
addEventListener("message", (event) => {
  const place = document.createElement("pre");
  place.id = "probe";
  place.textContent = JSON.stringify(event.data);
  document.body.append(place);
});
probe();
</script>"""
FRAME = """<!doctype html><body><iframe src="{page}" style="width: {width}px; height: 900px"></iframe><script>
addEventListener("message", (event) => {{
  const place = Object.assign(document.createElement("pre"), {{ id: "probe" }});
  place.textContent = JSON.stringify(event.data);
  document.body.append(place);
}});
</script>"""


def look(folders, tmp_path, *options, width=None):
    """The page of ``folders`` in a browser; in a frame of ``width``, as a phone has."""
    page = tmp_path / "page.html"
    main([*map(str, folders), "--output", str(page)])
    page.write_text(page.read_text().replace("</body>", PROBE + "</body>"))
    if width:
        page = tmp_path / "frame.html"
        page.write_text(FRAME.format(page="page.html", width=width))
    opened = open_page(page, tmp_path / "profile", *options)
    assert opened.console == []
    assert [url for url in opened.requests if not url.startswith("file:")] == []
    found = re.search(r'<pre id="probe">(.*?)</pre>', opened.dom)
    assert found, "the page never finished drawing"
    return json.loads(found[1])


def check(found, n_plots):
    assert len(found["drawn"]) == n_plots
    assert found["drawn"] == found["traces"] and min(found["drawn"]) > 0
    assert found["broken"] is None
    assert found["needed"] <= found["width"]
    assert set(found["before"]) == {"linear"}
    assert {"linear", "log"} == set(found["after"])


def test_a_browser_draws_one_run(full, tmp_path):
    found = look([full], tmp_path)
    check(found, n_plots=11)
    assert found["text"] == found["tick"] == "rgb(28, 35, 48)"


def test_a_browser_draws_several_runs_in_the_dark(full, long, tmp_path):
    found = look([full, long], tmp_path, "--blink-settings=preferredColorScheme=0")
    check(found, n_plots=15)
    assert found["text"] == found["tick"] == "rgb(228, 232, 238)"


def test_a_phone_does_not_scroll_sideways(long, tmp_path):
    found = look([long], tmp_path, width=360)
    check(found, n_plots=10)
    assert found["width"] == 360


def test_nothing_is_loaded_from_elsewhere(full):
    assert report(full).addresses == ["data:,"]


def test_a_missing_browser_skips_unless_it_is_required(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv(REQUIRE, raising=False)
    with pytest.raises(pytest.skip.Exception, match=NAMES[0]):
        chromium()
    monkeypatch.setenv(REQUIRE, "1")
    with pytest.raises(pytest.fail.Exception, match=f"{REQUIRE}=1, but"):
        chromium()
