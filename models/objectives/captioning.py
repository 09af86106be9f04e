"""Captioning: foresee each token of a caption from the picture and the tokens before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from mmfoundry.models.objectives import OBJECTIVES, weight_in
from mmfoundry.models.open_clip_model import PAD, CaptionedOutput
from mmfoundry.pipeline.distributed import world_in

NAME = "captioning"


class Captioning:
    """Mean cross-entropy of captions' tokens, the mean taken over all tokens of all ranks (CoCa, arXiv 2205.01917)."""

    needs: ClassVar[frozenset[str]] = frozenset({"captions"})

    def __call__(
        self, output: CaptionedOutput, batch: Mapping[str, Any], group: ProcessGroup | None = None
    ) -> dict[str, Tensor]:
        """Join what the model says of each token.

        Args:
            output: `caption_nats_bL`, `caption_right_bL` and `caption_said_bL` of a model with a text decoder.
            batch: the micro-batch's weight is read, where a step has several; see `weight_in`.
            group: the ranks whose tokens are counted together; None means this process alone.

        Returns:
            loss: () nats a token; its mean over ranks is the joint loss, however unevenly tokens lie on the ranks.
            token_accuracy: () share of tokens that score highest; its mean over ranks is the joint share.

        Raises:
            ValueError: the model has no text decoder, or was not asked for it.
        """
        if not hasattr(output, "caption_nats_bL"):
            raise ValueError("captioning needs a model that writes captions: a CoCa with `captions` set")
        nats_bL = output.caption_nats_bL
        total = output.caption_said_bL.sum().to(nats_bL.dtype)
        if group is not None:
            dist.all_reduce(total, group=group)
        share = world_in(group) / total.clamp(min=1) * weight_in(batch, NAME)
        return {"loss": nats_bL.sum() * share, "token_accuracy": output.caption_right_bL.sum() * share}

    def weights(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """How many tokens a batch on the host has to foresee; pairs, in other parts of a loss, count alike."""
        return {NAME: float((batch["text"][:, 1:] != PAD).sum())}


captioning = Captioning()
OBJECTIVES.register(NAME)(captioning)
