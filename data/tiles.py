"""A picture as the vision tower of a language model sees it: square tiles of one size, and the whole as one more.

The same pixels as transformers' `GotOcr2ImageProcessor` with `crop_to_patches`, which released models carry: bicubic
with antialiasing, on uint8, the grid chosen as InternVL does (Chen et al. 2024, arXiv 2404.16821, section 3.2). A
picture that is wanted as one tile is resized to a square.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


def cut_tiles(image: NDArray[np.uint8], size: int, min_tiles: int = 1, max_tiles: int = 1) -> Tensor:
    """Cut a picture into tiles.

    Args:
        image: (H, W, 3) uint8, RGB.
        size: side of a tile, pixels.
        min_tiles: least number of tiles.
        max_tiles: greatest number of tiles.

    Returns:
        (n, 3, size, size) uint8: the tiles in reading order, then the whole picture; the whole alone if one tile
        covers it.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    columns, rows = choose_grid(image.shape[0], image.shape[1], size, min_tiles, max_tiles)
    whole = _resize(pixels, size, size)
    if columns * rows == 1:
        return whole
    fitted = _resize(pixels, rows * size, columns * size)[0]
    tiles = fitted.reshape(3, rows, size, columns, size).permute(1, 3, 0, 2, 4).reshape(-1, 3, size, size)
    return torch.cat([tiles, whole])


@cache
def choose_grid(height: int, width: int, size: int, min_tiles: int, max_tiles: int) -> tuple[int, int]:
    """Columns and rows of the grid whose shape is nearest to the picture's.

    Of two that are equally near, the one with more tiles is taken while the picture has more than half its pixels.
    """
    grids = sorted(
        (
            (columns, rows)
            for columns in range(1, max_tiles + 1)
            for rows in range(1, max_tiles + 1)
            if min_tiles <= columns * rows <= max_tiles
        ),
        key=lambda grid: grid[0] * grid[1],
    )
    best, best_distance = (1, 1), float("inf")
    for columns, rows in grids:
        distance = abs(width / height - columns / rows)
        is_big = height * width > 0.5 * size * size * columns * rows
        if distance < best_distance or (distance == best_distance and is_big):
            best, best_distance = (columns, rows), distance
    return best


def _resize(pixels: Tensor, height: int, width: int) -> Tensor:
    if pixels.shape[2:] == (height, width):
        return pixels
    return F.interpolate(pixels, (height, width), mode="bicubic", align_corners=False, antialias=True)
