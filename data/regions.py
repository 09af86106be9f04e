"""Regions of a picture that a detector found: how much they cover, and the picture without what is in them.

A region is a convex quadrilateral, its corners as fractions of the picture's width and height (x first), so that it
holds for the picture at any size. All regions of a picture are one float32 array (n, 4, 2).
"""

import numpy as np

NO_REGIONS = np.zeros((0, 4, 2), np.float32)
_RING = 0.25  # of the shorter side of a region's frame: how far its surroundings reach


def from_boxes(boxes: np.ndarray | list[list[float]]) -> np.ndarray:
    """Regions of boxes x0, y0, x1, y1, as fractions: (n, 4) to (n, 4, 2)."""
    x0, y0, x1, y1 = np.asarray(boxes, np.float32).reshape(-1, 4).T
    return np.stack([x0, y0, x1, y0, x1, y1, x0, y1], axis=1).reshape(-1, 4, 2)


def to_boxes(regions: np.ndarray) -> list[list[float]]:
    """The frames of regions as DataComp's `face_bboxes` has them: x0, y0, x1, y1, each a fraction cut to 0..1."""
    inside = regions.astype(np.float64).clip(0, 1)
    return np.concatenate([inside.min(axis=1), inside.max(axis=1)], axis=1).tolist()


def mask_of(regions: np.ndarray, height: int, width: int) -> np.ndarray:
    """Which pixels have their centre in a region: bool (height, width)."""
    mask = np.zeros((height, width), bool)
    for corners in regions * np.array([width, height], np.float64):
        rows, columns, inside = _inside(corners, height, width)
        mask[rows, columns] |= inside
    return mask


def _inside(corners: np.ndarray, height: int, width: int) -> tuple[slice, slice, np.ndarray]:
    """A quadrilateral (4, 2), in pixels from the upper left edge: its frame's rows and columns, and which are in it."""
    low = np.floor(corners.min(axis=0)).clip(0, (width, height)).astype(int)
    high = np.ceil(corners.max(axis=0)).clip(0, (width, height)).astype(int)
    y, x = np.mgrid[low[1] : high[1], low[0] : high[0]] + 0.5
    sides = []
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        sides.append((x1 - x0) * (y - y0) - (y1 - y0) * (x - x0))
    # on one hand of all sides, whichever way around the corners are given
    hands = np.stack(sides)
    inside = np.asarray((hands >= 0).all(axis=0) | (hands <= 0).all(axis=0))
    return slice(low[1], high[1]), slice(low[0], high[0]), inside


def covered(regions: np.ndarray, height: int, width: int) -> float:
    """The share of a picture's pixels that lie in at least one region, 0 to 1."""
    return float(mask_of(regions, height, width).mean()) if len(regions) else 0.0


def without(pixels: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """The picture with each region painted over in the mean colour of what surrounds it.

    T-MARS (Maini et al. 2023, arXiv 2307.03132) masks detected text so before it scores the picture again. Its
    published code stops at the detection; surroundings here are the pixels within a quarter of the region's shorter
    side that lie in no region. Where there are none, the mean of the picture outside all regions stands in, and where
    regions cover everything, its mean colour.

    Args:
        pixels: uint8 (height, width, 3); not changed.
        regions: (n, 4, 2).
    Returns:
        uint8 (height, width, 3).
    """
    height, width = pixels.shape[:2]
    inside = mask_of(regions, height, width)
    if not inside.any():
        return pixels
    filled = pixels.copy()
    rest = pixels[~inside] if not inside.all() else pixels.reshape(-1, 3)
    fallback = rest.mean(axis=0)
    for one in regions:
        corners = one.astype(np.float64) * (width, height)
        low, high = np.floor(corners.min(axis=0)), np.ceil(corners.max(axis=0))
        reach = max(2.0, float(np.ceil(_RING * (high - low).min())))
        x0, y0 = (low - reach).clip(0).astype(int)
        x1, y1 = (high + reach).clip(0, (width, height)).astype(int)
        around = pixels[y0:y1, x0:x1][~inside[y0:y1, x0:x1]]
        colour = around.mean(axis=0) if len(around) else fallback
        rows, columns, own = _inside(corners, height, width)
        filled[rows, columns][own] = np.rint(colour).astype(np.uint8)
    return filled
