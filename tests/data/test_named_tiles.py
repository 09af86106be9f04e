"""data/named_tiles.py: every tile gets the name of what lies in it."""

from typing import Any

import numpy as np
import pytest
import torch

from mmfoundry.data.decode import UnreadableSample
from mmfoundry.data.named_tiles import NamedTiles, all_names, collate, names_in
from mmfoundry.data.sample import Sample
from mmfoundry.data.tiles import cut_tiles

SCENE = {"objects": [{"concept": "dog", "cell": "bottom left"}, {"concept": "apple", "cell": "top right"}]}
SINGLE = {"objects": [{"concept": "dog", "cell": None}]}
PICTURE = {"concept": "apple"}


def encode(meta: dict[str, Any]) -> dict[str, Any]:
    names = {name: number for number, name in enumerate(all_names([SCENE, PICTURE], "concept", "nothing"))}
    image = np.zeros((32, 32, 3), np.uint8)
    image[16:, :16] = 9
    encoder = NamedTiles(lambda picture: cut_tiles(picture, 16, 4, 4), names, "concept", "nothing")
    return encoder(Sample("k", image, meta=meta), np.random.default_rng(0))


def test_names() -> None:
    assert all_names([SCENE, PICTURE, {}], "concept", "nothing") == ["apple", "dog", "nothing"]
    assert names_in(SCENE, "concept", "nothing") == ["nothing", "apple", "dog", "nothing"]
    assert names_in(SINGLE, "concept", "nothing") == ["dog"]


def test_tiles_and_targets_pair() -> None:
    scene, single, picture = encode(SCENE), encode(SINGLE), encode(PICTURE)
    assert scene["target"].tolist() == [2, 0, 1, 2]
    assert [int(tile.max()) for tile in scene["tiles"]] == [0, 0, 9, 0]
    assert single["target"].tolist() == [1]
    assert picture["target"].tolist() == [0]
    assert int(picture["tiles"][0, 0, 12, 2]) == 9  # the whole
    batch = collate([scene, single])
    assert batch["tiles"].shape == (5, 3, 16, 16)
    assert torch.equal(batch["target"], torch.tensor([2, 0, 1, 2, 1]))


@pytest.mark.parametrize(("meta", "reason"), [({}, "no name"), ({"concept": "owl"}, "unknown name")])
def test_what_has_no_name(meta: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnreadableSample, match=reason):
        encode(meta)
