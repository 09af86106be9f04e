"""models/objectives/distillation.py against open_clip's own, and models/teachers.py."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import DistillClipLoss
from torch import Tensor

from mmfoundry.models.clip import ClipOutput
from mmfoundry.models.objectives import OBJECTIVES, needs, objective_with, weighted_sum
from mmfoundry.models.teachers import Taught, check_teacher
from mmfoundry.pipeline.errors import ConfigError
from tests.models.objectives.test_contrastive import gradients, output
from tests.models.tiny import pairs, tiny_clip, tiny_config


def teacher(name: str, width: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(6, width, generator=generator, dtype=torch.float64) for _ in "it")
    return {f"teacher_image/{name}": image, f"teacher_text/{name}": text}


def open_clips(student: ClipOutput, batch: dict[str, Tensor], name: str, scale: float) -> Tensor:
    image, text = (F.normalize(batch[f"teacher_{kind}/{name}"], dim=1) for kind in ("image", "text"))
    return DistillClipLoss()(*student[:3], image, text, scale)[1]


def test_similarity_is_open_clips() -> None:
    ours, batch = output(), teacher("a", 3, 1)
    values = objective_with("distillation", {"scale": 11.0})(ours, batch)
    theirs = open_clips(ours, batch, "a", 11.0)
    torch.testing.assert_close(values["loss"], theirs)
    torch.testing.assert_close(values["similarity"], theirs.detach())
    torch.testing.assert_close(gradients(values["loss"], ours), gradients(theirs, ours))


def test_several_teachers_of_several_widths() -> None:
    ours, batch = output(), teacher("a", 3, 1) | teacher("b", 7, 2) | {"teacher_scale/b": torch.tensor(4.0).double()}
    values = objective_with("distillation", {"scale": 11.0, "teachers": {"a": 1, "b": 3}})(ours, batch)
    expected = open_clips(ours, batch, "a", 11.0) / 4 + open_clips(ours, batch, "b", 4.0) * 3 / 4
    torch.testing.assert_close(values["loss"], expected)
    alone = objective_with("distillation", {"teachers": {"b": 1}})(ours, batch)["loss"]
    torch.testing.assert_close(alone, open_clips(ours, batch, "b", 4.0))


def test_features() -> None:
    ours, batch = output(), teacher("a", 5, 1)
    values = objective_with("distillation", {"features": 2.0, "similarity": 0.0})(ours, batch)
    image, text = (F.normalize(batch[f"teacher_{kind}/a"], dim=1) for kind in ("image", "text"))
    cosines = ((ours.image_bD * image).sum(1) + (ours.text_bD * text).sum(1)) / 2
    torch.testing.assert_close(values["loss"], 2 * (2 - 2 * cosines).mean())
    same = batch | {"teacher_image/a": ours.image_bD * 3, "teacher_text/a": ours.text_bD}
    assert objective_with("distillation", {"features": 1.0, "similarity": 0.0})(ours, same)["loss"] < 1e-12


def test_an_online_teacher_is_asked_and_stays_as_it_is() -> None:
    student, teaching, batch = tiny_clip(0), tiny_clip(1), pairs(6)
    objective = Taught(weighted_sum({"info_nce": 1.0, "distillation": 0.5}), {"big": teaching})
    assert needs(objective) == {"teachers"}
    values = objective(student(batch), batch)
    with torch.no_grad():
        said = teaching(batch)
    out = student(batch)
    contrastive, distilled = DistillClipLoss()(*out[:3], *said[:3])
    torch.testing.assert_close(values["loss"], contrastive + 0.5 * distilled)
    values["loss"].backward()
    assert all(weight.grad is None and not weight.requires_grad for weight in teaching.parameters())
    assert all(weight.grad is not None for weight in student.parameters())


def test_stored_teachers_have_a_scale_of_their_own() -> None:
    ours, batch = output(), teacher("a", 3, 1)
    values = Taught(OBJECTIVES["distillation"], {}, {"a": 6.0})(ours, batch)
    torch.testing.assert_close(values["loss"], open_clips(ours, batch, "a", 6.0))


@pytest.mark.parametrize(
    ("options", "batch", "message"),
    [
        ({}, {}, "no embeddings of any teacher in the batch; there are: none"),
        ({"teachers": {"b": 1}}, teacher("a", 3, 1), "no embeddings of b in the batch; there are: a"),
        ({"features": 1.0}, teacher("a", 3, 1), "a's embeddings have 3 numbers, the student's 5"),
        ({}, {"teacher_image/a": torch.ones(6, 2), "teacher_text/a": torch.ones(4, 2)}, r"texts \(4, 2\) for 6 pairs"),
    ],
)
def test_what_is_refused(options: dict[str, Any], batch: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objective_with("distillation", options)(output(), batch)


def test_teachers_must_read_the_same_batches() -> None:
    student = tiny_config()
    check_teacher("big", student, student)
    vision, text = (getattr(student, name).model_dump() for name in ("vision_cfg", "text_cfg"))
    for changes, message in (
        ({"vision_cfg": vision | {"image_size": 32}}, "image_size is 32, the student's 16"),
        ({"text_cfg": text | {"vocab_size": 60}}, "vocab_size is 60, the student's 50"),
        ({"text_cfg": text | {"context_length": 5}}, "captions of 5 tokens, the student of 9"),
    ):
        with pytest.raises(ConfigError, match=f"teachers.big: .*{message}"):
            check_teacher("big", tiny_config(**changes), student)
    with pytest.raises(ConfigError, match="both 0"):
        objective_with("distillation", {"similarity": 0})
