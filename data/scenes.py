"""Composed scenes: a few pictures on a plain canvas, with everything that is true about them known.

A scene is a function of its pictures, its style and one random generator; `scene_rng(seed, name, index)` gives each
scene its own, so that scenes can be rendered in any order, by any number of processes, with the same bytes.

Cells are drawn uniformly given the number of objects: which slot is empty tells no more about the count than it must
(a slot is empty with probability 1 - n / 4 whichever slot it is, and which ones are empty is independent of the count).
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from mmfoundry.data.concepts import Concept
from mmfoundry.data.pictures import Picture
from mmfoundry.pipeline.config import Config

CELLS = ("top left", "top right", "bottom left", "bottom right")  # by number: row * 2 + column


class SceneStyle(Config):
    """How a scene is laid out and drawn."""

    arrangement: Literal["grid", "single"] = Field(
        "grid", description="grid: objects in the cells of a 2 x 2 grid; single: one object anywhere on the canvas"
    )
    canvas_size: int = Field(128, ge=16, le=4096, description="side of the canvas, pixels")
    min_objects: int = Field(1, ge=1, le=4, description="objects a scene, at least; single takes 1")
    max_objects: int = Field(4, ge=1, le=4, description="objects a scene, at most; every number is equally likely")
    min_scale: float = Field(0.55, gt=0, le=1, description="a picture's longer side as a share of its cell, at least")
    max_scale: float = Field(1.0, gt=0, le=1, description="the same, at most")
    repeats: bool = Field(False, description="whether a concept may come twice in a scene")
    darkest: int = Field(200, ge=0, le=255, description="of each colour channel of the canvas")

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        if self.max_objects < self.min_objects:
            raise ValueError(f"max_objects {self.max_objects} is below min_objects {self.min_objects}")
        if self.max_scale < self.min_scale:
            raise ValueError(f"max_scale {self.max_scale} is below min_scale {self.min_scale}")
        return self


@dataclass(frozen=True)
class SceneObject:
    """One picture in its place.

    Attributes:
        concept: what it shows.
        cell: index into `CELLS`; None in a scene of one object without a grid.
        box: left, top, right, bottom of what can be seen of it, canvas pixels, the last two exclusive.
        scale: side of the picture as a fraction of its cell (of the canvas, without a grid).
    """

    concept: Concept
    cell: int | None
    box: tuple[int, int, int, int]
    scale: float

    @property
    def place(self) -> str:
        """The name of its cell.

        Raises:
            ValueError: it has none.
        """
        if self.cell is None:
            raise ValueError("an object outside a grid has no cell")
        return CELLS[self.cell]

    def as_json(self) -> dict[str, Any]:
        """What a scene's JSON says about it."""
        return {
            "concept": self.concept.name,
            "kind": self.concept.kind,
            "cell": None if self.cell is None else CELLS[self.cell],
            "box": list(self.box),
            "scale": round(self.scale, 4),
        }


@dataclass(frozen=True)
class Scene:
    """A drawn scene.

    Attributes:
        image: uint8 (canvas_size, canvas_size, 3), RGB.
        objects: in the order in which they were drawn, which is random and says nothing about their cells.
        style: the style of its pictures, e.g. "noto".
    """

    image: np.ndarray
    objects: tuple[SceneObject, ...]
    style: str


def scene_rng(seed: int, name: str, index: int) -> np.random.Generator:
    """The generator of scene `index` of the set `name`."""
    return np.random.default_rng([seed, zlib.crc32(name.encode()), index])


def compose_scene(
    pictures: Mapping[str, Mapping[str, Picture]],
    rng: np.random.Generator,
    style: SceneStyle,
    concepts: Sequence[Concept] | None = None,
) -> Scene:
    """Draw one scene.

    Args:
        pictures: concept name -> picture style -> picture; every concept in the same picture styles.
        rng: draws concepts, picture style, cells, sizes, places and the canvas's colour.
        style: the layout.
        concepts: exactly these, in random cells; None draws them from `pictures`.
    Raises:
        ValueError: more objects than concepts (without repeats) or than cells.
    """
    names = list(pictures)
    if concepts is None:
        single = style.arrangement == "single"
        count = 1 if single else int(rng.integers(style.min_objects, style.max_objects + 1))
        if count > len(names) and not style.repeats:
            raise ValueError(f"{count} objects a scene need as many concepts; there are {len(names)}")
        chosen = [names[i] for i in rng.choice(len(names), count, replace=style.repeats)]
    else:
        chosen = [concept.name for concept in concepts]
    drawn = sorted(pictures[chosen[0]])
    picture_style = drawn[int(rng.integers(len(drawn)))]
    size = style.canvas_size
    colour = tuple(int(value) for value in rng.integers(style.darkest, 256, 3))
    canvas = Image.new("RGB", (size, size), colour)
    cells: Sequence[int | None] = [None] if style.arrangement == "single" else _cells(len(chosen), rng)
    objects = []
    for name, cell in zip(chosen, cells, strict=True):
        picture = pictures[name][picture_style]
        objects.append(_draw(canvas, picture, cell, rng, style))
    return Scene(np.asarray(canvas), tuple(objects), picture_style)


def _cells(count: int, rng: np.random.Generator) -> list[int]:
    """`count` distinct cells, every ordered choice equally likely."""
    if count > len(CELLS):
        raise ValueError(f"{count} objects do not fit into {len(CELLS)} cells")
    return [int(cell) for cell in rng.permutation(len(CELLS))[:count]]


def _draw(
    canvas: Image.Image, picture: Picture, cell: int | None, rng: np.random.Generator, style: SceneStyle
) -> SceneObject:
    """Lay a picture into its cell (or onto the whole canvas), at a random size and place within it."""
    room = canvas.width if cell is None else canvas.width // 2
    left, top = (0, 0) if cell is None else (cell % 2 * room, cell // 2 * room)
    scale = float(rng.uniform(style.min_scale, style.max_scale))
    across, down = rng.random(2)
    longer = max(picture.image.size)
    width, height = (max(1, round(side / longer * scale * room)) for side in picture.image.size)
    x = left + int(across * (room - width + 1))
    y = top + int(down * (room - height + 1))
    scaled = picture.image.resize((width, height), Image.Resampling.BICUBIC)
    canvas.paste(scaled, (x, y), scaled)
    visible = picture.visible
    box = (
        x + visible[0] * width // picture.image.width,
        y + visible[1] * height // picture.image.height,
        x - (-visible[2] * width // picture.image.width),
        y - (-visible[3] * height // picture.image.height),
    )
    return SceneObject(picture.concept, cell, box, scale)
