"""A vision-language model as evaluations see it: it answers questions about pictures, and foresees given answers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mmfoundry.data.decode import UnreadableSample
from mmfoundry.data.instructions import InstructionEncoder, collate
from mmfoundry.data.tiles import cut_tiles
from mmfoundry.evals.questions import Answer, Score, Talk
from mmfoundry.evals.task import Vlm
from mmfoundry.models.chat import IGNORED, IMAGE
from mmfoundry.models.clip import at_least_fp32
from mmfoundry.models.generate import answer
from mmfoundry.models.vlm import VisionLanguageModel
from mmfoundry.models.vlm_io import load_vlm, untrained_vlm
from mmfoundry.models.vlm_text import VlmText
from mmfoundry.pipeline.errors import DamagedInput
from mmfoundry.pipeline.updates import to_device

MAX_NEW_TOKENS = 8


def read_vlm(folder: str | Path, device: torch.device, untrained: bool = False) -> Vlm:
    """The model in a folder, or what it was before training, as evaluations see it.

    Raises:
        MissingInput: a file is not there; of an untrained model, also where its start is not recorded.
        DamagedInput: a file cannot be read.
    """
    model, text = (untrained_vlm if untrained else load_vlm)(folder)
    return as_vlm(model.to(device), text)


def load_answerer(folder: str | Path, device: torch.device, untrained: bool = False) -> Answer:
    """The model in a folder as something that answers; as `read_vlm`."""
    return read_vlm(folder, device, untrained).answer


def as_vlm(model: VisionLanguageModel, text: VlmText) -> Vlm:
    """A model as evaluations see it."""
    return Vlm(answerer(model, text), scorer(model, text))


def answerer(model: VisionLanguageModel, text: VlmText, max_new_tokens: int = MAX_NEW_TOKENS) -> Answer:
    """A model as something that answers."""
    cut = tiles_of(model)

    def answers(
        pictures: Sequence[NDArray[np.uint8]], questions: Sequence[str], picture_of: Sequence[int]
    ) -> list[str]:
        tiles = [cut(picture) for picture in pictures]
        with _in_eval_mode(model):
            return answer(model, text, tiles, questions, picture_of, max_new_tokens)

    return answers


def scorer(model: VisionLanguageModel, text: VlmText) -> Score:
    """A model as something that says how well it foresees answers; each is cut off nowhere."""
    encoder = instruction_encoder(model, text, max_tokens=sys.maxsize)

    @torch.no_grad()
    def score(talks: Sequence[Talk]) -> NDArray[np.float64]:
        batch = to_device(collate([_row(encoder, talk) for talk in talks]), model.device)
        with _in_eval_mode(model):
            output = model(batch)
        logits_sV = at_least_fp32(output.logits_sV)
        nats_s = F.cross_entropy(logits_sV, output.target_s, reduction="none").double()
        right_s = (logits_sV.argmax(1) == output.target_s).double()
        talk_s = (batch["labels"][:, 1:] != IGNORED).nonzero()[:, 0]
        sums = nats_s.new_zeros(len(talks), 3)
        sums.index_add_(0, talk_s, torch.stack([nats_s, torch.ones_like(nats_s), right_s], dim=1))
        found: NDArray[np.float64] = sums.cpu().numpy()
        return found

    return score


@contextmanager
def _in_eval_mode(model: VisionLanguageModel) -> Iterator[None]:
    """In the block the model is in eval mode; behind it in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _row(encoder: InstructionEncoder, talk: Talk) -> dict[str, Any]:
    try:
        return {"__key__": talk.key, **encoder.sequence(encoder.cut_tiles(talk.picture), talk.conversations)}
    except UnreadableSample as error:
        raise DamagedInput(f"sample {talk.key}: {error}; an evaluation needs every sample") from error


def instruction_encoder(model: VisionLanguageModel, text: VlmText, **options: Any) -> InstructionEncoder:
    """How pictures with questions become a model's sequences.

    Args:
        model: whose tiles.
        text: its text side.
        options: of `InstructionEncoder`: which questions, how long.
    """
    return InstructionEncoder(
        cut_tiles=tiles_of(model),
        pieces=text.settings.chat.pieces,
        encode=text.encode,
        image_text=text.image_text,
        placeholder=IMAGE,
        patch_id=text.patch_id,
        **options,
    )


def tiles_of(model: VisionLanguageModel) -> Callable[[NDArray[np.uint8]], Tensor]:
    """How a picture is cut up for a model: (H, W, 3) uint8 to (n, 3, side, side) uint8."""
    size, tiles = model.config.vision.image_size, model.config.tiles
    return partial(cut_tiles, size=size, min_tiles=tiles.min_tiles, max_tiles=tiles.max_tiles)
