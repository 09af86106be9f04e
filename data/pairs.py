"""Samples -> the pairs that contrastive training learns from; worker processes import what is here, and little else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mmfoundry.data.decode import UnreadableSample
from mmfoundry.data.gather import Batch
from mmfoundry.data.npy import NPY, read_npy
from mmfoundry.data.ragged import Ragged
from mmfoundry.data.sample import Sample
from mmfoundry.data.text import CONTEXT_LENGTH, CaptionTokenizer, choose_caption, clip_tokenizer
from mmfoundry.data.transforms import TrainTransform
from mmfoundry.pipeline.errors import ConfigError


class StoredTeacher(NamedTuple):
    """Where a sample has what a teacher said of it.

    Attributes:
        image: field of the sample's JSON with its embedding of the picture; one that ends in `.npy` names a member.
        text: the same of the captions, one vector each.
        embed_dim: numbers of an embedding; None: any.
    """

    image: str
    text: str
    embed_dim: int | None = None


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
        tokenizer: CaptionTokenizer | None = None,
        stored: Mapping[str, StoredTeacher] | None = None,
    ):
        """Fix the augmentation and load the tokenizer.

        Args:
            image_size: side of the pixels, see `transforms.TrainTransform`.
            context_length: tokens that a caption is cut to.
            scale: share of the picture's area that a crop has.
            ratio: width / height of a crop.
            horizontal_flip: probability of mirroring.
            vocab_size: ids that the model knows; None: not checked.
            tokenizer: the model's own, of that context length; None: CLIP's.
            stored: teacher -> where a sample has its embeddings.
        Raises:
            ConfigError: an impossible crop, or a model of another tokenizer.
        """
        self._transform = TrainTransform(image_size, scale, ratio)
        self._flip = horizontal_flip
        self._stored = dict(stored or {})
        self._tokenizer = tokenizer or clip_tokenizer(context_length)
        ids = self._tokenizer.vocab_size
        if tokenizer is None and vocab_size is not None and vocab_size != ids:
            raise ConfigError(f"model.text_cfg.vocab_size is {vocab_size}, but CLIP's tokenizer has {ids} ids")
        if tokenizer is not None and vocab_size is not None and vocab_size < ids:  # models may have spare ones
            raise ConfigError(f"model.text_cfg.vocab_size is {vocab_size}, but the model's tokenizer has {ids} ids")

    def __call__(self, sample: Sample, rng: np.random.Generator) -> dict[str, Any]:
        """Encode one sample.

        Returns:
            image: uint8 (3, image_size, image_size); text: `Ragged` int32, what the tokenizer encodes; __key__: the
            sample's key; of each stored teacher, teacher_image/<name> and teacher_text/<name>: float32.
        Raises:
            UnreadableSample: it has no caption, or not the embeddings that it should have.
        """
        pixels = self._transform(sample.picture, rng)  # of a JPEG no more is decoded than the crop needs
        if self._flip and rng.random() < self._flip:
            pixels = np.ascontiguousarray(pixels[:, :, ::-1])
        caption = choose_caption(sample, rng)
        pair = {"image": pixels, "text": Ragged.one(self._tokenizer.encode(caption)), "__key__": sample.key}
        for name, teacher in self._stored.items():
            image, texts = _numbers(sample, teacher.image, ndim=1), _numbers(sample, teacher.text, ndim=2)
            if len(texts) != len(sample.text):
                raise UnreadableSample(
                    "stored embeddings", f"{len(texts)} in {teacher.text}, {len(sample.text)} captions"
                )
            width = teacher.embed_dim or len(image)
            if len(image) != width or texts.shape[1] != width:
                raise UnreadableSample(
                    "stored embeddings", f"{name} has widths {len(image)} and {texts.shape[1]}, not {width}"
                )
            pair[f"teacher_image/{name}"], pair[f"teacher_text/{name}"] = image, texts[sample.text.index(caption)]
        return pair


def _numbers(sample: Sample, field: str, ndim: int) -> np.ndarray:
    """A field of the sample's JSON, or an `.npy` member, as finite float32: a vector, or vectors, one a caption."""
    if field.endswith(NPY):
        data = sample.arrays.get(field.lower())
        array = np.empty(0, np.float32) if data is None else read_npy(data, field)
    else:
        try:
            array = np.asarray(sample.meta.get(field), dtype=np.float32)
        except (TypeError, ValueError):
            array = np.empty(0, np.float32)
    array = array[None] if ndim == 2 and array.ndim == 1 else array
    if array.ndim != ndim or not array.size or not np.isfinite(array).all():
        raise UnreadableSample("stored embeddings", f"{field} is not {'a vector' if ndim == 1 else 'vectors'}")
    return array


def pad_text(batch: Batch) -> Batch:
    """Captions as one tensor (b, longest), 0 behind each; a `finish` of the loader.

    Under a causal mask, read at the end of text, padding changes neither features nor gradients. Captions of models
    that read their padding come padded from their tokenizer, all equally long.
    """
    return batch | {"text": batch["text"].padded()}
