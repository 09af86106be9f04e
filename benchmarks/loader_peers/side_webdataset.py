"""webdataset with torch's DataLoader, written as its own page on ImageNet training writes it."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import torch
import webdataset

from mmfoundry.pipeline.torchvision_ops import declare_missing_ops

declare_missing_ops()
from open_clip import AugmentationCfg, SimpleTokenizer, image_transform  # noqa: E402


def prepare(pool: Path) -> None:
    """Tars are what it reads."""


def batches(pool: Path, workers: int, batch: int, device: str) -> Generator[torch.Tensor, None, None]:
    """Normalised images on the device, float32 (batch, 3, 224, 224), without end."""
    transform = image_transform(224, is_train=True, aug_cfg=AugmentationCfg(scale=(0.9, 1.0)))
    tokenizer = SimpleTokenizer()
    shards = sorted(map(str, pool.glob("*.tar")))
    dataset = (
        webdataset.WebDataset(shards, resampled=True, shardshuffle=False)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg;png", "txt")
        .map_tuple(transform, lambda text: tokenizer(text)[0])
        .batched(batch)
    )
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=workers, pin_memory=device == "cuda")
    for images, _ in loader:
        yield images.to(device, non_blocking=True)
