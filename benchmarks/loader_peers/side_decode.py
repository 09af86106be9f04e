"""No loader at all: libjpeg-turbo decodes the pool's pictures from memory, in as many threads as there are workers.

The scale is the smallest that still covers the 224 pixels that a crop is resized to where that is a power of two, the
scales that libjpeg-turbo has vector code for: the fastest that any loader could hope for.
"""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path

import simplejpeg
from pictures import picture_bytes


def prepare(pool: Path) -> None:
    """Tars are what it reads."""


def batches(pool: Path, workers: int, batch: int, device: str) -> Generator[list[int], None, None]:
    """Heights of decoded pictures, `batch` at a time, without end."""
    pictures = cycle(picture_bytes(pool))
    with ThreadPoolExecutor(workers) as threads:
        while True:
            yield list(threads.map(_decode, islice(pictures, batch)))


def _decode(data: bytes) -> int:
    height, width = simplejpeg.decode_jpeg_header(data)[:2]
    shortest = min(height, width)
    factor = max(factor for factor in (1, 2, 4, 8) if factor == 1 or shortest // factor >= 224 / 0.9**0.5)
    if factor == 1:
        return len(simplejpeg.decode_jpeg(data, "RGB"))
    return len(simplejpeg.decode_jpeg(data, "RGB", min_height=height // factor, min_width=width // factor))
