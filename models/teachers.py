"""Teachers that look at each batch while the student learns, for the distillation objective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mmfoundry.models.interop.any_clip import AnyClip, AnyClipConfig
from mmfoundry.models.objectives import Objective, needs, weights_of
from mmfoundry.models.objectives.distillation import TEACHER_IMAGE, TEACHER_SCALE, TEACHER_TEXT
from mmfoundry.pipeline.errors import ConfigError

CHUNK_ROWS = 256  # pairs that a teacher looks at together; its activations are not kept


class Taught:
    """An objective that reads what teachers say of the batch, beside what is stored in it.

    Teachers are no part of the student: they are not trained, saved, or shared out by ZeRO.
    """

    def __init__(self, objective: Objective, online: Mapping[str, AnyClip], scales: Mapping[str, float] | None = None):
        """Freeze the teachers.

        Args:
            objective: what is asked, for example `distillation` or a sum with it.
            online: name -> model that embeds each batch.
            scales: inverse temperatures of the teachers whose embeddings are stored.
        """
        self._objective, self._scales = objective, dict(scales or {})
        self._online = {name: teacher.requires_grad_(False).eval() for name, teacher in online.items()}
        self.needs = needs(objective)

    def __call__(self, output: Any, batch: Mapping[str, Any], group: ProcessGroup | None = None) -> dict[str, Tensor]:
        """Let the teachers embed the batch, then ask the objective."""
        device = output.image_bD.device
        scales = {f"{TEACHER_SCALE}{name}": torch.full((), each, device=device) for name, each in self._scales.items()}
        return self._objective(output, {**batch, **scales, **self._embed(batch, device)}, group)

    def weights(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """What a batch counts for in the objective's parts."""
        return weights_of(self._objective, batch)

    @torch.no_grad()
    def _embed(self, batch: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
        said: dict[str, Tensor] = {}
        for name, teacher in self._online.items():
            teacher.to(device)
            pieces = [
                teacher({"image": image, "text": text})
                for image, text in zip(batch["image"].split(CHUNK_ROWS), batch["text"].split(CHUNK_ROWS), strict=True)
            ]
            said[f"{TEACHER_IMAGE}{name}"] = torch.cat([piece.image_bD for piece in pieces])
            said[f"{TEACHER_TEXT}{name}"] = torch.cat([piece.text_bD for piece in pieces])
            said[f"{TEACHER_SCALE}{name}"] = pieces[0].scale
        return said


def check_teacher(name: str, teacher: AnyClipConfig, student: AnyClipConfig) -> None:
    """Refuse a teacher that cannot read the student's batches.

    Raises:
        ConfigError: its pictures have another size, its vocabulary is another, or its captions are shorter.
    """
    own = [config.text_cfg.hf_tokenizer_name for config in (teacher, student)]
    if (own[0] is None) != (own[1] is None):
        raise ConfigError(f"teachers.{name}: its captions are split by another tokenizer; they read the same batch")
    pairs: list[tuple[str, int | None, int | None]] = [
        ("vision_cfg.image_size", teacher.vision_cfg.image_size, student.vision_cfg.image_size),
        ("text_cfg.vocab_size", teacher.text_cfg.vocab_size, student.text_cfg.vocab_size),
    ]
    for key, theirs, ours in pairs:
        if theirs != ours:
            raise ConfigError(f"teachers.{name}: its {key} is {theirs}, the student's {ours}; they read the same batch")
    if teacher.text_cfg.context_length < student.text_cfg.context_length:
        raise ConfigError(
            f"teachers.{name}: it reads captions of {teacher.text_cfg.context_length} tokens, the student of "
            f"{student.text_cfg.context_length}: set model.text_cfg.context_length to the shorter"
        )
