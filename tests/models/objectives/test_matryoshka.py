"""models/objectives/matryoshka.py against the sum of the objectives at each width, written out."""

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss

from mmfoundry.models.clip import ClipOutput
from mmfoundry.models.objectives import OBJECTIVES, needs, objective_with, weighted_sum
from mmfoundry.pipeline.errors import ConfigError, UnknownName
from tests.models.objectives.test_contrastive import gradients, output


def cut(of: ClipOutput, width: int) -> ClipOutput:
    image, text = (F.normalize(each[:, :width], dim=1) for each in (of.image_bD, of.text_bD))
    return of._replace(image_bD=image, text_bD=text)


def test_the_sum_over_widths() -> None:
    ours = output(rows=6, width=16)
    values = objective_with("matryoshka", {"dims": [16, 4, 3], "importance": [1, 0.5, 2]})(ours, {})
    theirs = sum(weight * ClipLoss()(*cut(ours, width)[:3]) for width, weight in ((16, 1), (4, 0.5), (3, 2)))
    torch.testing.assert_close(values["loss"], theirs)
    torch.testing.assert_close(gradients(values["loss"], ours), gradients(theirs, ours))
    torch.testing.assert_close(values["4/loss"], ClipLoss()(*cut(ours, 4)[:3]).detach())
    assert not any(value.requires_grad for name, value in values.items() if name != "loss")
    assert values["scale"] == values["4/scale"] == ours.scale  # as every other objective logs it
    assert "bias" not in values


def test_over_several_objectives() -> None:
    ours = output(rows=6, width=16)
    inside = {"tiled_info_nce": {"weight": 0.5, "tile": 2}, "siglip": 2.0}
    values = weighted_sum({"matryoshka": {"weight": 3.0, "dims": [8], "over": inside}})(ours, {})
    expected = 3 * weighted_sum(inside)(cut(ours, 8), {})["loss"]
    torch.testing.assert_close(gradients(values["loss"], ours), gradients(expected, ours))
    assert values["matryoshka/bias"] == ours.bias
    assert needs(objective_with("matryoshka", {"over": inside})) == {"bias"}


def test_widths_by_default() -> None:
    matryoshka = OBJECTIVES["matryoshka"]
    assert matryoshka.widths(512) == (512, 256, 128, 64, 32, 16, 8)  # type: ignore[attr-defined]
    assert matryoshka.widths(5) == (5,)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": [4, 4]}, "different widths"),
        ({"dims": [0]}, "different widths"),
        ({"dims": [4, 2], "importance": [1]}, "as many numbers as dims"),
        ({"over": {"matryoshka": 1}}, "cannot have a matryoshka again"),
        ({"over": {}}, "objectives.matryoshka.over"),
    ],
)
def test_what_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        objective_with("matryoshka", options)


def test_what_is_refused_later() -> None:
    with pytest.raises(ValueError, match="dims has 9, but the embeddings have 5 numbers"):
        objective_with("matryoshka", {"dims": [9]})(output(), {})
    with pytest.raises(UnknownName, match="did you mean info_nce"):
        needs(objective_with("matryoshka", {"over": {"infonce": 1}}))
