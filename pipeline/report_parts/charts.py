"""Charts as inline SVG: a few kilobytes each, sharp at any size, readable without JavaScript."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mmfoundry.pipeline.report_parts.html import Child, Markup, compact, duration, percent, tag

MAX_POINTS = 240  # of a line; more than the pixels that it has
CHART_WIDTH, CHART_HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 54, 10, 10, 26


@dataclass(frozen=True)
class Line:
    """A named curve; `faint` draws it as the noisy background of a smooth one."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    faint: bool = False


def line_chart(title: str, lines: Sequence[Line], x_name: str = "step", log: bool = False) -> Markup:
    """Curves over a common axis, with the value under the pointer shown by the page's script.

    Args:
        title: what is drawn, above the chart.
        lines: at least one, each with at least one finite point.
        x_name: what the horizontal axis counts.
        log: logarithmic vertical axis; needs positive values.
    """
    thinned = [thin(line) for line in lines]
    xs = [x for line in thinned for x in line.x]
    ys = [y for line in thinned for y in line.y]
    to_scale = math.log10 if log else float
    x_axis = Axis.over(min(xs), max(xs), LEFT, CHART_WIDTH - RIGHT)
    y_axis = Axis.over(to_scale(min(ys)), to_scale(max(ys)), CHART_HEIGHT - BOTTOM, TOP)
    parts: list[Markup] = []
    for value in y_axis.ticks(4):
        y = y_axis.at(value)
        parts.append(tag("line", x1=LEFT, x2=CHART_WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        label = compact(10**value if log else value)
        parts.append(tag("text", label, x=LEFT - 6, y=y + 3.5, text_anchor="end", class_="tick"))
    for value in x_axis.ticks(5):
        x = x_axis.at(value)
        parts.append(tag("text", compact(value), x=x, y=CHART_HEIGHT - 10, text_anchor="middle", class_="tick"))
    number = 0
    for line in thinned:
        points = " ".join(
            f"{x_axis.at(x):.1f},{y_axis.at(to_scale(y)):.1f}" for x, y in zip(line.x, line.y, strict=True)
        )
        style = "faint" if line.faint else f"line c{number % 6}"
        number += not line.faint
        parts.append(tag("polyline", points=points, class_=style))
    shown = [line for line in thinned if not line.faint]
    main = shown[0] if shown else thinned[0]
    parts.append(
        tag("g", tag("line", y1=TOP, y2=CHART_HEIGHT - BOTTOM, class_="cursor"), tag("circle", r=3.5), class_="at")
    )
    svg = tag(
        "svg",
        parts,
        viewBox=f"0 0 {CHART_WIDTH} {CHART_HEIGHT}",
        role="img",
        aria_label=title,
        class_="chart",
        data_x=" ".join(f"{x:g}" for x in main.x),
        data_y=" ".join(f"{y:.5g}" for y in main.y),
        data_px=" ".join(f"{x_axis.at(x):.1f}" for x in main.x),
        data_py=" ".join(f"{y_axis.at(to_scale(y)):.1f}" for y in main.y),
        data_name=x_name,
    )
    keys = [tag("span", line.name, class_=f"key c{i % 6}") for i, line in enumerate(shown)] if len(shown) > 1 else []
    last = tag("span", compact(main.y[-1]), class_="last", data_last=compact(main.y[-1]))
    return tag("figure", tag("figcaption", tag("b", title), keys, last), svg, class_="chart")


@dataclass(frozen=True)
class Axis:
    """A linear map from values to pixels."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def over(cls, low: float, high: float, start: float, end: float) -> Axis:
        """An axis from `low` to `high`, widened a little where they are the same."""
        if high <= low:
            pad = abs(low) * 0.05 or 1.0
            low, high = low - pad, high + pad
        return cls(low, high, start, end)

    def at(self, value: float) -> float:
        """The pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, wanted: int) -> list[float]:
        """Round values inside the axis, about as many as wanted."""
        raw = (self.high - self.low) / wanted
        power = 10 ** math.floor(math.log10(raw))
        step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        count = math.floor(self.high / step + 1e-9) - first + 1
        return [(first + i) * step for i in range(count)]


def thin(line: Line) -> Line:
    """Finite points of a line, means of equal runs of them where there are more than can be seen.

    Raises:
        ValueError: there is no finite point.
    """
    points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
    if not points:
        raise ValueError(f"{line.name}: no finite points to draw")
    run = math.ceil(len(points) / MAX_POINTS)
    groups = [points[i : i + run] for i in range(0, len(points), run)]
    mean = [[sum(p[axis] for p in group) / len(group) for axis in (0, 1)] for group in groups]
    return Line(line.name, [x for x, _ in mean], [y for _, y in mean], line.faint)


def smooth(values: Sequence[float], half_life: float) -> list[float]:
    """Exponential moving average, unbiased at the start; `half_life` in points."""
    decay = 0.5 ** (1 / half_life)
    out, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        out.append(total / weight)
    return out


@dataclass(frozen=True)
class Mark:
    """A baseline on a scale: `chance`, `untrained` or `constant`, as the legend explains them."""

    kind: str
    value: float | None


def whisker(value: float, low: float, high: float, marks: Sequence[Mark] = (), good: bool | None = None) -> Markup:
    """A value with its interval and baselines, on a scale from 0 to 100%."""
    width, middle = 300, 13

    def at(share: float) -> float:
        return 8 + min(1.0, max(0.0, share)) * (width - 16)

    parts = [tag("line", x1=at(tick), x2=at(tick), y1=2, y2=24, class_="grid") for tick in (0, 0.25, 0.5, 0.75, 1)]
    for mark in marks:
        if mark.value is None:
            continue
        x = at(mark.value)
        title = tag("title", f"{mark.kind}: {percent(mark.value)}")
        if mark.kind == "chance":
            shape = tag("rect", x=x - 1.5, y=5, width=3, height=16, class_="chance")
        elif mark.kind == "constant":
            shape = tag("path", d=f"M{x:.1f} {middle - 5}l5 5l-5 5l-5 -5z", class_="constant")
        else:
            shape = tag("circle", cx=x, cy=middle, r=4, class_="untrained")
        parts.append(tag("g", title, shape))
    state = "" if good is None else " better" if good else " same"
    parts.append(tag("line", x1=at(low), x2=at(high), y1=middle, y2=middle, class_=f"whisker{state}"))
    dot = tag("circle", cx=at(value), cy=middle, r=5.5, class_=f"dot{state}")
    parts.append(tag("g", tag("title", f"{percent(value)} [{percent(low)}, {percent(high)}]"), dot))
    label = f"{percent(value)}, 95% interval {percent(low)} to {percent(high)}"
    return tag("svg", parts, viewBox=f"0 0 {width} 26", class_="whisker", role="img", aria_label=label)


def whisker_legend() -> Markup:
    """What the marks of `whisker` mean."""
    items = {
        "the model, with its 95% bootstrap interval": tag("circle", cx=8, cy=8, r=5.5, class_="dot better"),
        "chance": tag("rect", x=6.5, y=0, width=3, height=16, class_="chance"),
        "the same model before training": tag("circle", cx=8, cy=8, r=4, class_="untrained"),
        "the best answer that never looks": tag("path", d="M8 3l5 5l-5 5l-5 -5z", class_="constant"),
    }
    keys = [tag("span", tag("svg", shape, viewBox="0 0 16 16", class_="mark"), text) for text, shape in items.items()]
    return tag("p", keys, class_="legend")


def bars(rows: Sequence[tuple[Child, float, float, Child]], total: float) -> Markup:
    """Horizontal bars of what is left and what was just taken away.

    Args:
        rows: label, amount left, amount taken away, text at the end.
        total: amount of a full bar.
    """
    body = []
    for label, left, taken, text in rows:
        scale = 100 / max(total, 1e-9)
        bar = tag(
            "div",
            tag("span", class_="left", style=f"width:{left * scale:.2f}%"),
            tag("span", class_="taken", style=f"width:{taken * scale:.2f}%"),
            class_="bar",
        )
        body.append(tag("div", tag("div", label, class_="name"), bar, tag("div", text, class_="text"), class_="row"))
    return tag("div", body, class_="bars")


def shares(parts: Sequence[tuple[str, float]]) -> Markup:
    """One bar cut into parts by their seconds, with a key below."""
    total = sum(seconds for _, seconds in parts) or 1.0
    cut = [
        tag(
            "span",
            style=f"width:{100 * seconds / total:.2f}%",
            class_=f"c{i % 6}",
            title=f"{name}: {duration(seconds)}",
        )
        for i, (name, seconds) in enumerate(parts)
    ]
    keys = [
        tag("span", tag("b", name), f" {duration(seconds)} · {percent(seconds / total, 0)}", class_=f"key c{i % 6}")
        for i, (name, seconds) in enumerate(parts)
    ]
    return tag("div", cut, class_="shares") + tag("p", keys, class_="keys")
