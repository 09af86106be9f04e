"""A vision-language model as evaluations see it: pictures and questions in, answers out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mmfoundry.data.tiles import cut_tiles
from mmfoundry.evals.questions import Answer
from mmfoundry.models.generate import answer
from mmfoundry.models.vlm import VisionLanguageModel
from mmfoundry.models.vlm_io import load_vlm, untrained_vlm
from mmfoundry.models.vlm_text import VlmText

MAX_NEW_TOKENS = 8


def load_answerer(folder: str | Path, device: torch.device, untrained: bool = False) -> Answer:
    """The model in a folder, or what it was before training, as something that answers.

    Raises:
        MissingInput: a file is not there; of an untrained model, also where its start is not recorded.
        DamagedInput: a file cannot be read.
    """
    model, text = (untrained_vlm if untrained else load_vlm)(folder)
    return answerer(model.to(device), text)


def answerer(model: VisionLanguageModel, text: VlmText, max_new_tokens: int = MAX_NEW_TOKENS) -> Answer:
    """A model as something that answers."""
    size, tiles = model.config.vision.image_size, model.config.tiles

    def answers(
        pictures: Sequence[NDArray[np.uint8]], questions: Sequence[str], picture_of: Sequence[int]
    ) -> list[str]:
        cut = [cut_tiles(picture, size, tiles.min_tiles, tiles.max_tiles) for picture in pictures]
        was_training = model.training
        model.eval()
        try:
            return answer(model, text, cut, questions, picture_of, max_new_tokens)
        finally:
            model.train(was_training)

    return answers
