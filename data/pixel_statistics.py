"""Numbers that tell how much there is to see in a picture."""

import numpy as np
from PIL import Image


def pixel_entropy(pixels: np.ndarray) -> float:
    """Shannon entropy of the grey levels, bits a pixel: 0 for one shade, at most 8.

    Args:
        pixels: uint8 (height, width, 3), RGB; grey levels are ITU-R BT.601 luma, rounded.
    """
    counts = np.array(Image.fromarray(pixels).convert("L").histogram(), np.float64)
    shares = counts[counts > 0] / counts.sum()
    return abs(float(-(shares * np.log2(shares)).sum()))  # abs: a single shade gives -0.0
