"""The digest of what pretraining reads from the sample data, to hold order, pixels and tokens to what they were.

python -m tests.data.golden_batches
"""

import hashlib
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from mmfoundry.data import Loader, PairEncoder, Sample, Source
from mmfoundry.data.decode import LazyImage
from mmfoundry.data.pairs import pad_text

SAMPLES = Path(__file__).resolve().parents[2] / "data" / "samples"


class Pairs(PairEncoder):
    """Pairs, and which of them are decoded whole: how much of a JPEG is decoded may change with the decoder."""

    def __call__(self, sample: Sample, rng: np.random.Generator) -> dict[str, Any]:
        whole = not (isinstance(sample.picture, LazyImage) and sample.picture.scalable)
        return super().__call__(sample, rng) | {"whole": whole}


def loader(**options: Any) -> Loader:
    """Two sources, weights, redraws for what cannot be used, two captions a sample."""
    return Loader(
        [Source(str(SAMPLES / "pool-*.tar"), 3.0), Source(str(SAMPLES / "pictures-noto-*.tar"), 1.0)],
        batch_size=32,
        encode=Pairs(64, 32, scale=(0.5, 1.0), horizontal_flip=0.5),
        finish=pad_text,
        seed=7,
        max_unreadable=0.2,
        **options,
    )


def digest(steps: int = 12, **options: Any) -> str:
    """SHA-256 of the first steps' keys, pixels (but for JPEGs) and padded tokens."""
    sha256 = hashlib.sha256()
    with closing(iter(loader(**options))) as batches:  # type: ignore[type-var]
        for _ in range(steps):
            batch = next(batches)
            sha256.update("\n".join(batch["__key__"]).encode())
            sha256.update(batch["image"][batch["whole"]].numpy().tobytes())
            sha256.update(str(tuple(batch["text"].shape)).encode() + batch["text"].numpy().tobytes())
    return sha256.hexdigest()


if __name__ == "__main__":
    print(digest())
