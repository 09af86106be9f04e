"""data/tiles.py: the cut itself; that its pixels are the released processor's is held in the tests of interop."""

import numpy as np
import pytest
import torch

from mmfoundry.data.tiles import choose_grid, cut_tiles


def test_four_tiles_and_the_whole() -> None:
    image = np.zeros((32, 32, 3), np.uint8)
    for number, (row, column) in enumerate([(0, 0), (0, 16), (16, 0), (16, 16)]):
        image[row : row + 16, column : column + 16] = 50 * (number + 1)
    tiles = cut_tiles(image, 16, 4, 4)
    assert tiles.shape == (5, 3, 16, 16)
    assert tiles.dtype == torch.uint8
    assert [int(tile.float().mean()) for tile in tiles[:4]] == [50, 100, 150, 200]  # reading order
    assert [int(tiles[4, 0, row, column]) for row in (2, 13) for column in (2, 13)] == [50, 100, 150, 200]


def test_one_tile_is_the_whole() -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    tiles = cut_tiles(image, 16)
    assert torch.equal(tiles, torch.from_numpy(image).permute(2, 0, 1)[None])


@pytest.mark.parametrize(
    ("height", "width", "low", "high", "grid"),
    [
        (100, 100, 4, 4, (2, 2)),
        (100, 400, 4, 4, (4, 1)),
        (400, 100, 4, 4, (1, 4)),
        (100, 100, 1, 4, (2, 2)),  # as near as 1 x 1, and the picture is big
        (10, 10, 1, 4, (1, 1)),  # as near, but the picture is small
        (100, 210, 1, 12, (4, 2)),  # twice as many tiles of the same shape
        (10, 21, 1, 12, (2, 1)),
    ],
)
def test_grid(height: int, width: int, low: int, high: int, grid: tuple[int, int]) -> None:
    assert choose_grid(height, width, 16, low, high) == grid
