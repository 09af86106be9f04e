"""CoCa: a contrastive loss and captioning, by one model in one pass (Yu et al. 2022, arXiv 2205.01917)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from pydantic import Field, model_validator
from torch import Tensor
from torch.distributed import ProcessGroup

from mmfoundry.models.objectives import OBJECTIVES, Objective, needs, weighted_sum, weights_of
from mmfoundry.models.objectives.captioning import captioning
from mmfoundry.pipeline.config import Config


class Coca(Config):
    """A contrastive objective plus captioning; weights are named and chosen as open_clip's CoCaLoss has them."""

    clip_loss_weight: float = Field(1.0, ge=0, description="weight of the contrastive part; 0: not computed")
    caption_loss_weight: float = Field(2.0, gt=0, description="weight of the captioning part")
    contrastive: dict[str, float | dict[str, Any]] = Field(
        {"info_nce": 1.0}, min_length=1, description="objectives on the embeddings: name: weight"
    )

    @model_validator(mode="after")
    def _captions_once(self) -> Coca:
        if {"coca", "captioning"} & set(self.contrastive):
            raise ValueError("contrastive cannot have the captioning part again")
        return self

    @cached_property
    def inner(self) -> Objective:
        """The contrastive part."""
        return weighted_sum(self.contrastive)

    @property
    def needs(self) -> frozenset[str]:
        """What both parts need."""
        return needs(captioning) | (needs(self.inner) if self.clip_loss_weight else frozenset())

    def weights(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """What a batch counts for in the parts that do not count by pairs."""
        return weights_of(self.inner, batch) | captioning.weights(batch)

    def __call__(self, output: Any, batch: Mapping[str, Any], group: ProcessGroup | None = None) -> dict[str, Tensor]:
        """Score embeddings and captions.

        Args:
            output: what captioning and the objectives of `contrastive` read.
            batch: handed on.
            group: the ranks that form the joint batch; None means this process alone.

        Returns:
            loss: () the weighted sum; its mean over ranks is the joint loss.
            caption_loss: () nats a token.
            token_accuracy: () share of tokens that score highest.
            contrastive_loss: () and the contrastive part's other metrics under their own names.

        Raises:
            ValueError: the model writes no captions, or a part refuses its output.
        """
        caption = captioning(output, batch, group)
        loss = self.caption_loss_weight * caption["loss"]
        metrics = {"caption_loss": caption["loss"].detach(), "token_accuracy": caption["token_accuracy"]}
        if self.clip_loss_weight:
            values = self.inner(output, batch, group)
            loss = loss + self.clip_loss_weight * values["loss"]
            named = {name: value.detach() for name, value in values.items() if name != "loss"}
            metrics |= {"contrastive_loss": values["loss"].detach()} | named
        return {"loss": loss, **metrics}


coca = OBJECTIVES.register("coca")(Coca())
