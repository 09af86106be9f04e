"""Samples -> the pairs that contrastive training learns from; worker processes import what is here, and little else."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmfoundry.data.gather import Batch
from mmfoundry.data.ragged import Ragged
from mmfoundry.data.sample import Sample
from mmfoundry.data.text import CONTEXT_LENGTH, choose_caption, clip_tokenizer
from mmfoundry.data.transforms import TrainTransform
from mmfoundry.pipeline.errors import ConfigError


class PairEncoder:
    """A sample -> one pair: augmented pixels, and one of its captions as token ids; an `encode` of the loader."""

    def __init__(
        self,
        image_size: int,
        context_length: int = CONTEXT_LENGTH,
        *,
        scale: tuple[float, float] = (0.9, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        horizontal_flip: float = 0.0,
        vocab_size: int | None = None,
    ):
        """Fix the augmentation and load the tokenizer.

        Args:
            image_size: side of the pixels, see `transforms.TrainTransform`.
            context_length: tokens that a caption is cut to.
            scale: share of the picture's area that a crop has.
            ratio: width / height of a crop.
            horizontal_flip: probability of mirroring.
            vocab_size: ids that the model knows; None: not checked.
        Raises:
            ConfigError: an impossible crop, or a model of another tokenizer.
        """
        self._transform = TrainTransform(image_size, scale, ratio)
        self._flip = horizontal_flip
        self._tokenizer = clip_tokenizer(context_length)
        if vocab_size is not None and vocab_size != self._tokenizer.vocab_size:
            raise ConfigError(
                f"model.text_cfg.vocab_size is {vocab_size}, but CLIP's tokenizer has {self._tokenizer.vocab_size} ids"
            )

    def __call__(self, sample: Sample, rng: np.random.Generator) -> dict[str, Any]:
        """Encode one sample.

        Returns:
            image: uint8 (3, image_size, image_size); text: `Ragged` int32, at most context_length ids; __key__: the
            sample's key.
        Raises:
            UnreadableSample: it has no caption.
        """
        pixels = self._transform(sample.picture, rng)  # of a JPEG no more is decoded than the crop needs
        if self._flip and rng.random() < self._flip:
            pixels = np.ascontiguousarray(pixels[:, :, ::-1])
        ids = self._tokenizer.encode(choose_caption(sample, rng))
        return {"image": pixels, "text": Ragged.one(ids), "__key__": sample.key}


def pad_text(batch: Batch) -> Batch:
    """Captions as one tensor (b, longest), 0 behind each; a `finish` of the loader.

    Under a causal mask, read at the end of text, padding changes neither features nor gradients.
    """
    return batch | {"text": batch["text"].padded()}
