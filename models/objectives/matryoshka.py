"""Matryoshka: the first numbers of an embedding are an embedding of their own."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor
from torch.distributed import ProcessGroup

from mmfoundry.models.objectives import OBJECTIVES, Objective, check_pairs, needs, weighted_sum, weights_of
from mmfoundry.pipeline.config import Config

LEAST_WIDTH = 8  # of the widths by default: the paper's smallest


class Matryoshka(Config):
    """The sum of other objectives over embeddings cut to several widths (Kusupati et al. 2022, arXiv 2205.13147).

    Each cut embedding is normalised anew; scale and bias are shared, and every width counts alike unless
    `importance` says otherwise, as in the paper.
    """

    over: dict[str, float | dict[str, Any]] = Field(
        {"info_nce": 1.0}, min_length=1, description="objectives to compute at each width: name: weight"
    )
    dims: tuple[int, ...] | None = Field(
        None, min_length=1, description="widths; None: the embedding's own, halved down to 8"
    )
    importance: tuple[float, ...] | None = Field(None, description="weight of each width; None: 1 each")

    @model_validator(mode="after")
    def _consistent(self) -> Matryoshka:
        if self.dims is not None and (min(self.dims) < 1 or len(set(self.dims)) < len(self.dims)):
            raise ValueError(f"dims should be different widths of at least 1, not {list(self.dims)}")
        if self.importance is not None and len(self.importance) != len(self.dims or ()):
            raise ValueError("importance wants as many numbers as dims")
        if "matryoshka" in self.over:
            raise ValueError("over cannot have a matryoshka again")
        return self

    @cached_property
    def inner(self) -> Objective:
        """What is computed at each width."""
        return weighted_sum(self.over)

    @property
    def needs(self) -> frozenset[str]:
        """What the objectives inside need."""
        return needs(self.inner)

    def weights(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """What a batch counts for in the objectives inside."""
        return weights_of(self.inner, batch)

    def widths(self, whole: int) -> tuple[int, ...]:
        """The widths for embeddings of `whole` numbers, as asked for or by default.

        Raises:
            ValueError: one of `dims` is wider than the embedding.
        """
        if self.dims is not None:
            if max(self.dims) > whole:
                raise ValueError(f"matryoshka: dims has {max(self.dims)}, but the embeddings have {whole} numbers")
            return self.dims
        widths = [whole]
        while widths[-1] // 2 >= LEAST_WIDTH:
            widths.append(widths[-1] // 2)
        return tuple(widths)

    def __call__(self, output: Any, batch: Mapping[str, Any], group: ProcessGroup | None = None) -> dict[str, Tensor]:
        """Score the embeddings at each width.

        Args:
            output: what the objectives inside read.
            batch: handed on.
            group: the ranks that form the joint batch; None means this process alone.

        Returns:
            loss: () the weighted sum over widths; its mean over ranks is the joint loss if that holds for the
                objectives inside. The metrics of each width are named `<width>/<metric>`.
            scale: () and bias where an objective inside reads it: all widths share them.

        Raises:
            ValueError: a width is larger than the embeddings, or an objective inside refuses them.
        """
        image_bD, text_bD = check_pairs(output)
        widths = self.widths(image_bD.shape[1])
        losses: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        for width, importance in zip(widths, self.importance or (1.0,) * len(widths), strict=True):
            image, text = (F.normalize(each[:, :width], dim=1) for each in (image_bD, text_bD))
            values = self.inner(_Cut(output, image, text), batch, group)
            losses.append(importance * values["loss"])
            metrics |= {f"{width}/{name}": value.detach() for name, value in values.items()}
        total: Any = sum(losses)
        shared = {"scale": output.scale.detach()}
        if "bias" in self.needs:
            shared["bias"] = output.bias.detach()
        return {"loss": total, **shared, **metrics}


matryoshka = OBJECTIVES.register("matryoshka")(Matryoshka())


class _Cut:
    """A model's output with other embeddings; the rest is the output's own."""

    def __init__(self, output: Any, image_bD: Tensor, text_bD: Tensor) -> None:
        self._output, self.image_bD, self.text_bD = output, image_bD, text_bD

    def __getattr__(self, name: str) -> Any:
        return getattr(self._output, name)
