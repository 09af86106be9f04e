"""Tiles with the name of what each shows, from pictures whose contents are known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmfoundry.data.decode import UnreadableSample
from mmfoundry.data.sample import Sample
from mmfoundry.data.scenes import CELLS


@dataclass(frozen=True)
class NamedTiles:
    """Sample and generator to its tiles and their names' numbers; an `encode` of the loader.

    A scene of a grid (`objects` in its JSON, each with `concept` and `cell`) gives its four tiles, each with the name
    of what lies in it; any other picture is one tile, named by its metadata.

    Attributes:
        cut_tiles: picture (H, W, 3) to its tiles (n, 3, side, side), uint8, the whole picture last.
        names: every name, by number.
        label: metadata field that names a single picture.
        empty: what an empty tile is called.
    """

    cut_tiles: Callable[[NDArray[np.uint8]], Tensor]
    names: Mapping[str, int]
    label: str
    empty: str

    def __call__(self, sample: Sample, rng: np.random.Generator) -> dict[str, Any]:
        """Encode one sample: `tiles` (n, 3, side, side) uint8, `target` (n,) int64, `__key__`.

        Raises:
            UnreadableSample: its metadata names nothing, or something that is not among the names.
        """
        tiles = self.cut_tiles(sample.image)
        found = names_in(sample.meta, self.label, self.empty)
        tiles = tiles[-1:] if len(found) == 1 else tiles[:-1]
        if len(tiles) != len(found):
            raise UnreadableSample("not as many tiles as cells", f"{len(tiles)} and {len(found)}")
        unknown = [name for name in found if name not in self.names]
        if unknown:
            raise UnreadableSample("an unknown name", unknown[0])
        target = torch.tensor([self.names[name] for name in found])
        return {"tiles": tiles, "target": target, "__key__": sample.key}


def names_in(meta: Mapping[str, Any], label: str, empty: str) -> list[str]:
    """What a picture's tiles show, in reading order: one name for each cell of a grid, or one for the picture.

    Raises:
        UnreadableSample: the metadata has neither.
    """
    objects = meta.get("objects")
    if isinstance(objects, list) and all(isinstance(each, Mapping) and each.get("cell") in CELLS for each in objects):
        shown = {each["cell"]: str(each["concept"]) for each in objects}
        return [shown.get(cell, empty) for cell in CELLS]
    if isinstance(objects, list) and len(objects) == 1 and isinstance(objects[0], Mapping):
        return [str(objects[0]["concept"])]
    if label in meta:
        return [str(meta[label])]
    raise UnreadableSample("no name", f"neither objects nor {label!r} in its JSON")


def all_names(metas: Iterable[Mapping[str, Any]], label: str, empty: str) -> list[str]:
    """Every name of some samples, sorted; those without any are passed over, the loader will count them."""
    found: set[str] = {empty}
    for meta in metas:
        try:
            found.update(names_in(meta, label, empty))
        except UnreadableSample:
            continue
    return sorted(found)


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Tiles and targets of all samples, one after the other; `__key__`: the samples' keys."""
    return {
        "tiles": torch.cat([row["tiles"] for row in rows]),
        "target": torch.cat([row["target"] for row in rows]),
        "__key__": [row["__key__"] for row in rows],
    }
