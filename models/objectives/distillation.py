"""Distillation: the student's similarities, or its embeddings, become those of one or several teachers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor
from torch.distributed import ProcessGroup

from mmfoundry.models.objectives import OBJECTIVES, check_pairs
from mmfoundry.pipeline.config import Config
from mmfoundry.pipeline.distributed import all_gather_rows

# Shape suffixes: b = pairs on this rank, N = pairs on all ranks, D = embedding width, E = a teacher's width

# Of a batch: what each teacher gives of its pairs, (b, E) each, and its inverse temperature, ()
TEACHER_IMAGE, TEACHER_TEXT, TEACHER_SCALE = "teacher_image/", "teacher_text/", "teacher_scale/"


class Distillation(Config):
    """Learn from teachers' embeddings of the same pairs: their similarity matrices, the embeddings themselves, or both.

    `similarity` is the cross-entropy of the student's softmax over the joint batch against the teacher's, both ways
    (open_clip's DistillClipLoss; TinyCLIP, arXiv 2309.12314; MobileCLIP, arXiv 2311.17049); it holds rows of logits
    for each teacher, as `info_nce` does. `features` is the squared distance between unit embeddings (CLIP-KD,
    arXiv 2307.12732), which wants a teacher of the student's width.
    """

    similarity: float = Field(1.0, ge=0, description="weight of the similarity matrices' cross-entropy")
    features: float = Field(0.0, ge=0, description="weight of the squared distance between embeddings")
    teachers: dict[str, float] | None = Field(
        None, min_length=1, description="teacher: weight, divided by their sum; None: all that there are, alike"
    )
    scale: float = Field(100.0, gt=0, description="inverse temperature of teachers that have none of their own")
    needs: ClassVar[frozenset[str]] = frozenset({"teachers"})

    @model_validator(mode="after")
    def _something(self) -> Distillation:
        if not self.similarity and not self.features:
            raise ValueError("similarity and features are both 0")
        return self

    def __call__(self, output: Any, batch: Mapping[str, Any], group: ProcessGroup | None = None) -> dict[str, Tensor]:
        """Compare the student with its teachers.

        Args:
            output: `image_bD`, `text_bD`, L2-normalised, and `scale` ().
            batch: for each teacher `teacher_image/<name>` and `teacher_text/<name>`, (b, E), of any length; and
                `teacher_scale/<name>`, (), where it is not `scale`.
            group: the ranks that form the joint batch; None means this process alone.

        Returns:
            loss: () its mean over ranks is the joint loss.
            similarity: () nats per pair, mean over teachers; only where it has a weight.
            features: () mean squared distance, mean over teachers; only where it has a weight.
            scale: () inverse temperature of the student.

        Raises:
            ValueError: a teacher's embeddings are not in the batch, do not pair with the student's, or are of another
                width where features are compared.
        """
        image_bD, text_bD = check_pairs(output)
        weights = self._weights(batch)
        parts: dict[str, Tensor] = {}
        with torch.autocast(image_bD.device.type, enabled=False):
            said = {name: _said(batch, name, image_bD) for name in weights}
            if self.features:
                distances = [weights[name] * _distance(output, *said[name], name) for name in said]
                parts["features"] = torch.stack(distances).sum()
            if self.similarity:
                student = [rows.log_softmax(1) for rows in _logits(image_bD, text_bD, output.scale, group)]
                losses = []
                for name, (image_bE, text_bE) in said.items():
                    scale = batch.get(f"{TEACHER_SCALE}{name}", self.scale)
                    teacher = [rows.softmax(1) for rows in _logits(image_bE, text_bE, scale, group)]
                    nats = [-(own * their).sum(1).mean() for own, their in zip(student, teacher, strict=True)]
                    losses.append(weights[name] * (nats[0] + nats[1]) / 2)
                parts["similarity"] = torch.stack(losses).sum()
        factors = {"similarity": self.similarity, "features": self.features}
        loss = torch.stack([factors[name] * part for name, part in parts.items()]).sum()
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}, "scale": output.scale.detach()}

    def _weights(self, batch: Mapping[str, Any]) -> dict[str, float]:
        there = [key.removeprefix(TEACHER_IMAGE) for key in batch if key.startswith(TEACHER_IMAGE)]
        wanted = self.teachers or dict.fromkeys(there, 1.0)
        missing = sorted(set(wanted) - set(there))
        if missing or not wanted:
            raise ValueError(
                f"distillation: no embeddings of {', '.join(missing) or 'any teacher'} in the batch; "
                f"there are: {', '.join(sorted(there)) or 'none'}"
            )
        total = sum(wanted.values())
        return {name: weight / total for name, weight in wanted.items()}


def _said(batch: Mapping[str, Any], name: str, like: Tensor) -> tuple[Tensor, Tensor]:
    """A teacher's unit embeddings of the pairs, without a gradient."""
    image, text = (batch[f"{kind}{name}"].detach().to(like.dtype) for kind in (TEACHER_IMAGE, TEACHER_TEXT))
    if image.shape != text.shape or len(image) != len(like):
        raise ValueError(
            f"distillation: {name} gives images {tuple(image.shape)} and texts {tuple(text.shape)} "
            f"for {len(like)} pairs"
        )
    return F.normalize(image, dim=1), F.normalize(text, dim=1)


def _distance(output: Any, image: Tensor, text: Tensor, name: str) -> Tensor:
    if image.shape != output.image_bD.shape:
        raise ValueError(
            f"distillation: {name}'s embeddings have {image.shape[1]} numbers, the student's "
            f"{output.image_bD.shape[1]}: features can only be compared at one width; "
            "use similarity, or the teacher's embed_dim"
        )
    return ((output.image_bD - image).square().sum(1) + (output.text_bD - text).square().sum(1)).mean() / 2


def _logits(image: Tensor, text: Tensor, scale: Tensor | float, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Rows of this rank's pictures and of its captions against all of the other kind; (b, N) each."""
    return scale * image @ all_gather_rows(text, group).T, scale * text @ all_gather_rows(image, group).T


distillation = OBJECTIVES.register("distillation")(Distillation())
