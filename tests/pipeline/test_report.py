"""The report page: nothing of a stranger's text becomes markup, and every kind of artifact is shown."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmfoundry.pipeline.artifact import Artifact, write_atomic
from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.distributed import Runtime
from mmfoundry.pipeline.errors import MissingInput
from mmfoundry.pipeline.report import Headline, Section, StageReport, find_artifacts, write_report
from mmfoundry.pipeline.report_parts.charts import Axis, Line, Mark, line_chart, smooth, thin, whisker
from mmfoundry.pipeline.report_parts.html import Markup, compact, duration, percent, picture, table, tag
from mmfoundry.pipeline.stage import RunContext, Stage, StageConfig, run_stage

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&"
VOID = {"meta", "img", "br", "line", "circle", "rect", "path", "polyline"}


class Page(HTMLParser):
    """Checks that tags close in order, and collects what a browser would load or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.scripts = 0
        self.handlers: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


class NamedConfig(StageConfig):
    """A stage that writes what it is told."""

    name: str = "x"


def artifact(folder: Path, kind: str = "kind", **metrics: float) -> Artifact:
    def run(config: NamedConfig, context: RunContext) -> Artifact:
        write_atomic(context.work / "file.txt", config.name)
        return context.finish(metrics)

    config = parse(NamedConfig, {"name": HOSTILE})
    return run_stage(Stage(kind, NamedConfig, run, "writes"), config, folder, Runtime())


def test_text_is_escaped_everywhere() -> None:
    for markup in (
        tag("p", HOSTILE),
        tag("p", ["a", [HOSTILE]]),
        tag("p", title=HOSTILE),
        table([HOSTILE], [[HOSTILE]]),
        picture(np.zeros((2, 2, 3), np.uint8), HOSTILE),
        line_chart(HOSTILE, [Line(HOSTILE, [0, 1], [0, 1]), Line("b", [0, 1], [0, 1])], x_name=HOSTILE),
        whisker(0.5, 0.4, 0.6, [Mark(HOSTILE, 0.1)]),
    ):
        page = Page(str(markup))
        assert page.scripts == 0
        assert page.handlers == []
        assert all(source.startswith("data:image/webp;base64,") for source in page.loaded)


def test_the_page_is_whole_and_loads_nothing(tmp_path: Path) -> None:
    artifact(tmp_path / "first", loss=1.5, count=12345.0)
    artifact(tmp_path / "second", kind="shown")
    artifact(tmp_path / "old.stale")

    def show(each: Artifact, name: str) -> StageReport:
        body = tag("p", (each.path / "file.txt").read_text())
        return StageReport([Headline(HOSTILE, "97%", HOSTILE)], [Section(HOSTILE, HOSTILE, body)])

    path = write_report(tmp_path, {"shown": show})
    text = path.read_text()
    page = Page(text)
    assert page.scripts == 1  # ours
    assert page.handlers == []
    assert all(source.startswith(("#", "data:")) for source in page.loaded)
    assert "http-equiv" in text
    assert "default-src 'none'" in text.replace("&#x27;", "'")
    shown = " ".join(page.text)
    for wanted in ("12,345", "97%", HOSTILE, "first", "second", "Where the wall time went", "seed"):
        assert wanted in shown
    assert "old" not in find_artifacts(tmp_path)
    assert list(find_artifacts(tmp_path)) == ["first", "second"]
    anchors = set(re.findall(r'id="(s\d+)"', text))
    assert {source[1:] for source in page.loaded if source.startswith("#")} == anchors


def test_a_folder_without_artifacts_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="no finished stage"):
        write_report(tmp_path, {})


def points(chart: Markup) -> list[tuple[float, float]]:
    found = re.search(r'points="([^"]+)" class="line', str(chart))
    assert found
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in found.group(1).split())]


def test_lines_are_where_the_values_are() -> None:
    straight = points(line_chart("t", [Line("a", [0, 5, 10], [1.0, 2.0, 3.0])]))
    (x0, y0), (x1, y1), (x2, y2) = straight
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.11)
    assert y0 > y2  # up is more
    decades = points(line_chart("t", [Line("a", [0, 1, 2], [1.0, 10.0, 100.0])], log=True))
    assert decades[0][1] - decades[1][1] == pytest.approx(decades[1][1] - decades[2][1], abs=0.11)


def test_charts_take_what_training_can_give() -> None:
    long = Line("a", list(range(10_000)), [float(i % 7) for i in range(10_000)])
    assert len(thin(long).x) <= 240
    assert np.mean(thin(long).y) == pytest.approx(3.0, abs=0.01)
    Page(str(line_chart("flat", [Line("a", [1, 2], [0.0, 0.0])])))
    Page(str(line_chart("holes", [Line("a", [1, 2, 3], [1.0, float("nan"), 2.0])])))
    with pytest.raises(ValueError, match="no finite points"):
        thin(Line("a", [1], [float("inf")]))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.001, 0.0013), (-5, 12345), (4.19, 4.2)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    ticks = Axis.over(low, high, 0, 100).ticks(4)
    assert 2 <= len(ticks) <= 6
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    assert all(len(f"{tick:.6g}") <= 8 for tick in ticks)


def test_smoothing_is_unbiased_and_follows() -> None:
    assert smooth([2.0] * 5, 3) == pytest.approx([2.0] * 5)
    stepped = smooth([0.0] * 10 + [1.0] * 10, 3)
    assert stepped[12] == pytest.approx(0.5, abs=0.1)  # half-way after a half-life
    assert stepped[-1] > 0.85


def test_a_whisker_outside_the_scale_stays_on_it() -> None:
    chart = str(whisker(1.3, -0.2, 1.5))
    for x in re.findall(r'(?:cx|x1|x2)="([-\d.]+)"', chart):
        assert 0 <= float(x) <= 300


def test_numbers_for_people() -> None:
    assert [compact(value) for value in (0, 12345, 7.4e6, 0.00312, 1234.5, 2.57e-7)] == [
        "0", "12,345", "7.4M", "0.00312", "1,234", "2.57e-07",
    ]  # fmt: skip
    assert [duration(value) for value in (4.21, 190, 7500)] == ["4.2 s", "3 min 10 s", "2 h 5 min"]
    assert percent(None) == "–"
    assert percent(0.1234) == "12.3%"


def test_pictures_are_made_small_and_keep_their_shape() -> None:
    import base64
    import io

    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (300, 600, 3), dtype=np.uint8)
    data: Any = re.search(r"base64,([^\"]+)", str(picture(pixels, "noise")))
    with Image.open(io.BytesIO(base64.b64decode(data.group(1)))) as image:
        assert image.size == (256, 128)
