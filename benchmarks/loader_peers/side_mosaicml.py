"""mosaicml-streaming: the same encoded pictures in its own shards, read as its guide to custom datasets reads them."""

from __future__ import annotations

import io
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from pictures import read_pairs
from PIL import Image

from mmfoundry.pipeline.torchvision_ops import declare_missing_ops

declare_missing_ops()
from open_clip import AugmentationCfg, SimpleTokenizer, image_transform  # noqa: E402
from streaming import MDSWriter, StreamingDataLoader, StreamingDataset  # noqa: E402


class Pairs(StreamingDataset):
    """Picture and caption, transformed."""

    def __init__(self, folder: Path, batch: int) -> None:
        super().__init__(local=str(folder), shuffle=True, batch_size=batch, epoch_size=1 << 20)
        self._transform = image_transform(224, is_train=True, aug_cfg=AugmentationCfg(scale=(0.9, 1.0)))
        self._tokenizer = SimpleTokenizer()

    def __getitem__(self, at: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Image float32 (3, 224, 224), ids int64 (77,)."""
        sample: Any = super().__getitem__(at)
        return self._transform(Image.open(io.BytesIO(sample["image"]))), self._tokenizer(sample["text"])[0]


def _folder(pool: Path) -> Path:
    return pool.with_name(pool.name + ".mds")


def prepare(pool: Path) -> None:
    """Convert the tars; the pictures' bytes stay as they are."""
    if _folder(pool).exists():
        return
    unfinished = _folder(pool).with_suffix(".unfinished")
    with MDSWriter(out=str(unfinished), columns={"image": "bytes", "text": "str"}, exist_ok=True) as writer:
        for image, text in read_pairs(pool):
            writer.write({"image": image, "text": text})
    unfinished.rename(_folder(pool))


def batches(pool: Path, workers: int, batch: int, device: str) -> Generator[torch.Tensor, None, None]:
    """Normalised images on the device, float32 (batch, 3, 224, 224), without end."""
    dataset = Pairs(_folder(pool), batch)
    loader = StreamingDataLoader(
        dataset,
        batch_size=batch,
        num_workers=workers,
        persistent_workers=True,
        drop_last=True,
        pin_memory=device == "cuda",
    )
    while True:
        for images, _ in loader:
            yield images.to(device, non_blocking=True)
