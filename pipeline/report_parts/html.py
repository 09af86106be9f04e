"""HTML without a template engine: everything is escaped unless it was built here.

Captions, keys and answers come from strangers' data and from models; a report that ran them as HTML would run their
scripts. So text becomes `Markup` only through `tag`, which escapes it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

VOID = frozenset(("br", "img", "input", "meta", "line", "circle", "rect", "path", "polyline", "polygon"))
MAX_PICTURE_SIDE = 256
WEBP_QUALITY = 82


@dataclass(frozen=True)
class Markup:
    """HTML that is safe to put into the page as it is."""

    text: str

    def __str__(self) -> str:
        return self.text

    def __add__(self, other: Markup) -> Markup:
        return Markup(self.text + other.text)


Child = Markup | str | int | float | None | Iterable["Child"]


def tag(name: str, /, *children: Child, **attributes: str | int | float | bool | None) -> Markup:
    """An element.

    Args:
        name: of the element.
        children: text (escaped), markup, numbers, or iterables of these; None is left out.
        attributes: values are escaped; True is a bare attribute, None and False are left out. A name's trailing `_` is
            dropped (`class_`), its other underscores become dashes (`stroke_width`).
    """
    parts = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        parts.append(f" {key}" if value is True else f' {key}="{escape(_number(value), quote=True)}"')
    opening = f"<{name}{''.join(parts)}"
    if name in VOID:
        return Markup(f"{opening}/>")
    return Markup(f"{opening}>{join(children)}</{name}>")


def join(children: Child) -> Markup:
    """Children one after another, text escaped."""
    if children is None:
        return Markup("")
    if isinstance(children, Markup):
        return children
    if isinstance(children, str | int | float):
        return Markup(escape(_number(children)))
    return Markup("".join(join(child).text for child in children))


def _number(value: str | int | float) -> str:
    # Coordinates: two decimals are a hundredth of a pixel, and keep the page small.
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def picture(source: NDArray[np.uint8] | bytes, alt: str, class_: str = "pic") -> Markup:
    """A picture inside the page.

    Args:
        source: uint8 (H, W, 3), or an encoded image of ours; larger ones are shown smaller.
        alt: what it shows, for those who cannot see it.
        class_: CSS class.
    """
    with Image.open(io.BytesIO(source)) if isinstance(source, bytes) else Image.fromarray(source) as image:
        rgb = image.convert("RGB")
        rgb.thumbnail((MAX_PICTURE_SIDE, MAX_PICTURE_SIDE))
        out = io.BytesIO()
        rgb.save(out, "WEBP", quality=WEBP_QUALITY, method=4)
    data = base64.b64encode(out.getvalue()).decode("ascii")
    return tag("img", src=f"data:image/webp;base64,{data}", alt=alt, class_=class_, loading="lazy")


def details(summary: str, *children: Child, open_: bool = False) -> Markup:
    """A part that unfolds on click."""
    return tag("details", tag("summary", summary), *children, open=open_)


def table(head: Iterable[Child], rows: Iterable[Iterable[Child]], class_: str = "") -> Markup:
    """A table; every cell is a child of `tag`. Numbers (and markup of class `num`) are set right by CSS."""
    body = [tag("tr", [tag("td", cell, class_="num" if isinstance(cell, int | float) else None) for cell in row])
            for row in rows]  # fmt: skip
    return tag(
        "div",
        tag("table", tag("thead", tag("tr", [tag("th", cell) for cell in head])), tag("tbody", body), class_=class_),
        class_="scroll",
    )


def facts(pairs: Mapping[str, Child], long: int = 1000) -> Markup:
    """Names with their values; a value that is a list, or text of more than `long` characters, goes below its name."""
    rows = []
    for name, value in pairs.items():
        is_list = isinstance(value, Markup) and value.text.startswith(("<ol", "<ul"))
        below = "below" if is_list or (isinstance(value, str) and len(value) > long) else None
        rows.append(tag("dt", name, class_=below) + tag("dd", value, class_=below))
    return tag("dl", rows, class_="facts")


def percent(value: float | None, digits: int = 1) -> str:
    """A share of 1 as percent; a dash for None."""
    return "–" if value is None else f"{100 * value:.{digits}f}%"


def duration(seconds: float) -> str:
    """Seconds in the two units that matter: "4.2 s", "3 min 10 s", "2 h 5 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def compact(value: float) -> str:
    """A number in few characters: "7.4M", "12,345", "0.0031"."""
    for limit, unit in ((1e9, "G"), (1e6, "M")):
        if abs(value) >= limit:
            return f"{value / limit:.1f}{unit}"
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
