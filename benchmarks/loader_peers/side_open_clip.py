"""open_clip's own training pipeline: `get_wds_dataset` with the transform and the tokenizer that it trains with."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Generator
from pathlib import Path

import torch

from mmfoundry.pipeline.torchvision_ops import declare_missing_ops

declare_missing_ops()
from open_clip import AugmentationCfg, SimpleTokenizer, image_transform  # noqa: E402
from open_clip_train.data import get_wds_dataset  # noqa: E402


def prepare(pool: Path) -> None:
    """Tars are what it reads."""


def batches(pool: Path, workers: int, batch: int, device: str) -> Generator[torch.Tensor, None, None]:
    """Normalised images on the device, float32 (batch, 3, 224, 224), without end."""
    shards = len(list(pool.glob("*.tar")))
    arguments = Namespace(
        train_data=f"{pool}/shard-{{00000..{shards - 1:05d}}}.tar",
        train_num_samples=1 << 40,  # one epoch without end: nothing of its start is timed again
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        batch_size=batch,
        workers=workers,
        world_size=1,
        seed=0,
    )
    transform = image_transform(224, is_train=True, aug_cfg=AugmentationCfg(scale=(0.9, 1.0)))
    data = get_wds_dataset(arguments, transform, is_train=True, tokenizer=SimpleTokenizer())
    for images, _ in data.dataloader:
        yield images.to(device, non_blocking=True)
