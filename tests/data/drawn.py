"""Small pictures of made-up concepts, for tests that compose scenes."""

import io
from pathlib import Path
from typing import Any

from PIL import Image

from mmfoundry.data.concepts import Concept
from mmfoundry.data.pictures import Picture
from mmfoundry.data.shards import write_shards

KINDS = ("animal", "food", "tool")


def concept(number: int, **changes: Any) -> Concept:
    values: dict[str, Any] = {
        "name": f"thing{number}",
        "noun": ("a", "mass", "plural")[number % 3],
        "synonyms": (f"item{number}",),
        "kind": KINDS[number % len(KINDS)],
        "category": "Objects",
        "subcategory": "test",
        "split": "heldout" if number % 5 == 4 else "train",
        "question": number % 5 == 0,
        "adapt": number % 5 == 4,
        "file": f"{number}.png",
    }
    return Concept(**values | changes)


def drawn(number: int, style: str = "noto") -> Picture:
    """A filled square of a colour of its own, with a transparent border of an eighth of the side."""
    side = 16
    image = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    shade = 120 if style == "noto" else 60
    image.paste((number * 7 % 256, number * 31 % 256, shade, 255), (2, 2, side - 2, side - 2))
    return Picture(concept(number), style, image)


def pictures(count: int = 20, styles: tuple[str, ...] = ("noto", "twemoji")) -> list[Picture]:
    return [drawn(number, style) for style in styles for number in range(count)]


def by_name(found: list[Picture]) -> dict[str, dict[str, Picture]]:
    named: dict[str, dict[str, Picture]] = {}
    for picture in found:
        named.setdefault(picture.concept.name, {})[picture.style] = picture
    return named


def write_pictures(folder: Path, count: int = 20) -> Path:
    samples = []
    for picture in pictures(count):
        buffer = io.BytesIO()
        picture.image.save(buffer, "PNG")
        meta = picture.concept.as_json() | {"style": picture.style}
        key = f"{picture.style}-{picture.concept.slug}"
        samples.append({"__key__": key, "png": buffer.getvalue(), "txt": picture.concept.phrase, "json": meta})
    write_shards(samples, folder, pattern="pictures-%05d.tar")
    return folder
