"""A hash of how a picture looks: few bits differ between copies of a picture, many between different pictures.

256 bits of shape: which low frequencies of the luminance are clearly positive, after pHash (Zauner 2010,
"Implementation and benchmarking of perceptual image hash functions"). There it is 8 x 8 frequencies of 32 x 32 pixels,
each against the median; but at 64 bits two drawings of one size on plain backgrounds can be 2 bits apart and two
encodings of one picture 8, so there are 16 x 16 of 64 x 64 here; and in smooth pictures most frequencies are near the
median, where an encoder's noise decides the bit, so here a frequency must rise above a floor over that noise.
256 bits of colour: the two chroma values in a 4 x 4 grid, each as a row of 8 bits of which as many are set as the value
is high, so that a shape in red and in blue are not called the same.

On the sample pool copies are at most 24 bits apart and other pictures at least 50 (held by a test).
"""

from functools import lru_cache

import numpy as np
from PIL import Image

HASH_BYTES = 64
_SIDE = 64  # pixels of the thumbnail
_FREQUENCIES = 16
_GRID = 4
# in grey levels times 64 (the transform is orthonormal), which is what JPEG at quality 60 leaves as noise
_FLOOR = 6.0
_CHROMA_STEPS = np.linspace(-40, 40, 8)
# ITU-R BT.601 luma and chroma, full range, as in JPEG
_YCC = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])


def perceptual_hash(pixels: np.ndarray) -> bytes:
    """The hash of a picture.

    Args:
        pixels: uint8 (height, width, 3), RGB.
    Returns:
        64 bytes; compare by the number of bits that differ.
    """
    thumbnail = np.asarray(Image.fromarray(pixels).resize((_SIDE, _SIDE), Image.Resampling.BOX))
    ycc = thumbnail @ _YCC.T
    basis = _cosines()
    frequencies = basis @ ycc[..., 0] @ basis.T
    shape = frequencies > _FLOOR
    shape[0, 0] = False  # the mean brightness is no shape
    cell = _SIDE // _GRID
    chroma = ycc[..., 1:].reshape(_GRID, cell, _GRID, cell, 2).mean(axis=(1, 3))
    colour = chroma[..., None] > _CHROMA_STEPS
    return np.packbits(np.concatenate([shape.reshape(-1), colour.reshape(-1)])).tobytes()


@lru_cache(maxsize=1)
def _cosines() -> np.ndarray:
    """The first rows of the orthonormal DCT-II matrix, (frequencies, side)."""
    k, x = np.arange(_FREQUENCIES)[:, None], np.arange(_SIDE)[None, :]
    basis = np.cos(np.pi * k * (2 * x + 1) / (2 * _SIDE)) * np.sqrt(2 / _SIDE)
    basis[0] /= np.sqrt(2)
    return basis
