"""Small shards that the tests of reading, ordering and loading share."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmfoundry.data.shards import write_shards


def smooth(seed: int, height: int = 16, width: int = 16) -> np.ndarray:
    """uint8 (height, width, 3): colours that vary slowly, so that JPEG and resizing behave as on photographs."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encode(image: np.ndarray | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def samples(count: int, first: int = 0) -> list[dict]:
    return [
        {
            "__key__": f"{number:06d}",
            "png": encode(smooth(number)),
            "txt": f"picture {number}\nanother line for {number}",
            "json": {"uid": f"{number:032x}"},
        }
        for number in range(first, first + count)
    ]


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., list[Path]]:
    """Write `count` samples in shards of `per_shard` into a new folder; returns the shards."""
    made = iter(range(1000))

    def make(count: int = 20, per_shard: int = 10, first: int = 0, **options: object) -> list[Path]:
        return write_shards(samples(count, first), tmp_path / f"shards-{next(made)}", max_count=per_shard, **options)

    return make
