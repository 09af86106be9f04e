"""Ours, as docs/loader.md has it: bytes and ragged ids out of the workers, normalised on the device."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import mmfoundry.data.clip_words  # noqa: F401 - later otherwise: the peers' tokenizers are imported before the clock starts
from mmfoundry.data.index import expand_shards, open_index
from mmfoundry.data.loader import Loader, Source
from mmfoundry.data.pairs import pad_text
from mmfoundry.data.ragged import Ragged
from mmfoundry.data.text import ClipTokenizer, choose_caption
from mmfoundry.data.transforms import Normalise, TrainTransform

if TYPE_CHECKING:
    import torch

    from mmfoundry.data.sample import Sample


class Encode:
    """What `PairEncoder` does, but no ids are remembered: a corpus that is read once repeats no caption."""

    def __init__(self) -> None:
        self._transform = TrainTransform(224)
        self._tokenizer = ClipTokenizer(cached_captions=0)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> dict[str, Any]:
        """Sample -> `image` uint8 (3, 224, 224), `text` int32 (at most 77,)."""
        tokens = self._tokenizer.encode(choose_caption(sample, rng))
        return {"image": self._transform(sample.picture, rng), "text": Ragged.one(tokens)}


def prepare(pool: Path) -> None:
    """Write the indexes."""
    for shard in expand_shards(pool):
        open_index(shard)


def batches(pool: Path, workers: int, batch: int, device: str) -> Generator[torch.Tensor, None, None]:
    """Normalised images on the device, float32 (batch, 3, 224, 224), without end."""
    normalise = Normalise()
    loader = Loader(
        [Source(pool)],
        batch_size=batch,
        encode=Encode(),
        num_workers=workers,
        finish=pad_text,
        device=device,
    )
    for made in loader:
        yield normalise(made["image"])
