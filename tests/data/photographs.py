"""Real photographs for tests, so that JPEG's blocks hold what they hold in crawled pictures."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from PIL import Image


@cache
def _whole(name: str) -> Image.Image:
    package = find_spec("sklearn")  # carries two photographs of 640 x 427; importing it would take seconds
    assert package is not None
    assert package.origin is not None
    return Image.open(Path(package.origin).parent / "datasets" / "images" / name).convert("RGB")


def photograph(height: int, width: int, name: str = "china.jpg") -> Image.Image:
    """The photograph, resized by Pillow's bicubic; name: china.jpg or flower.jpg."""
    return _whole(name).resize((width, height), Image.Resampling.BICUBIC)
