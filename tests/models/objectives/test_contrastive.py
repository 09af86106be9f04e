"""models/objectives/info_nce.py and siglip.py against open_clip's own losses, and against the formula."""

import math

import pytest
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor

from mmfoundry.models.clip import ClipOutput
from mmfoundry.models.objectives import OBJECTIVES, weighted_sum
from mmfoundry.pipeline.errors import UnknownName


def output(rows: int = 6, width: int = 5, bias: float | None = -2.0) -> ClipOutput:
    torch.manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(rows, width, dtype=torch.float64), dim=1) for _ in "it")
    scale, shift = torch.tensor(9.0, dtype=torch.float64), None if bias is None else torch.tensor(bias).double()
    parts = [image, text, scale, shift]
    return ClipOutput(*(part if part is None else part.requires_grad_() for part in parts))


def gradients(loss: Tensor, of: ClipOutput) -> list[Tensor]:
    parts = [part for part in (of.image_bD, of.text_bD, of.scale, of.bias) if part is not None]
    return list(torch.autograd.grad(loss, parts, materialize_grads=True))


def test_info_nce_is_open_clips() -> None:
    ours = output(bias=None)
    values = OBJECTIVES["info_nce"](ours, {}, None)
    theirs = ClipLoss()(ours.image_bD, ours.text_bD, ours.scale)
    torch.testing.assert_close(values["loss"], theirs)
    torch.testing.assert_close(gradients(values["loss"], ours), gradients(theirs, ours))


def test_siglip_is_open_clips() -> None:
    ours = output()
    values = OBJECTIVES["siglip"](ours, {}, None)
    theirs = SigLipLoss()(ours.image_bD, ours.text_bD, ours.scale, ours.bias)
    torch.testing.assert_close(values["loss"], theirs)
    torch.testing.assert_close(gradients(values["loss"], ours), gradients(theirs, ours))


def test_known_values() -> None:
    same = torch.ones(4, 3) / math.sqrt(3)  # all alike: the best that can be said is 1 in 4
    alike = ClipOutput(same, same, torch.tensor(7.0), torch.tensor(0.0))
    torch.testing.assert_close(OBJECTIVES["info_nce"](alike, {})["loss"], torch.tensor(math.log(4)))
    apart = ClipOutput(torch.eye(4), torch.eye(4), torch.tensor(100.0), torch.tensor(-50.0))
    assert OBJECTIVES["info_nce"](apart, {})["loss"] < 1e-6
    assert OBJECTIVES["siglip"](apart, {})["loss"] < 1e-6
    for name in ("info_nce", "siglip"):
        assert OBJECTIVES[name](apart, {})["accuracy"] == 1
    half = ClipOutput(torch.eye(4), torch.eye(4)[[0, 1, 3, 2]], torch.tensor(100.0), torch.tensor(0.0))
    assert OBJECTIVES["info_nce"](half, {})["accuracy"] == 0.5


def test_full_precision_under_autocast() -> None:
    exact = output(rows=8, width=64)
    single = ClipOutput(*(part.detach().float() for part in (exact.image_bD, exact.text_bD, exact.scale, exact.bias)))
    for name in ("info_nce", "siglip"):
        with torch.autocast("cpu", torch.bfloat16):
            loss = OBJECTIVES[name](single, {})["loss"]
        torch.testing.assert_close(loss.double(), OBJECTIVES[name](exact, {})["loss"].detach(), rtol=1e-5, atol=0)


def test_what_is_refused() -> None:
    good = output(bias=None)
    bad = ClipOutput(good.image_bD, good.text_bD[:3], good.scale)
    for name in ("info_nce", "siglip"):
        with pytest.raises(ValueError, match=r"images \(6, 5\) and texts \(3, 5\) must pair"):
            OBJECTIVES[name](bad, {})
    with pytest.raises(ValueError, match="init_logit_bias"):
        OBJECTIVES["siglip"](good, {})


def test_weighted_sum() -> None:
    ours = output()
    assert weighted_sum({"siglip": 1.0}) is OBJECTIVES["siglip"]
    parts = {name: OBJECTIVES[name](ours, {}) for name in ("info_nce", "siglip")}
    values = weighted_sum({"info_nce": 0.5, "siglip": 2.0})(ours, {}, None)
    expected = 0.5 * parts["info_nce"]["loss"] + 2 * parts["siglip"]["loss"]
    torch.testing.assert_close(values["loss"], expected)
    torch.testing.assert_close(gradients(values["loss"], ours), gradients(expected, ours))
    assert values["siglip/loss"] == parts["siglip"]["loss"]
    assert not any(value.requires_grad for name, value in values.items() if name != "loss")
    with pytest.raises(UnknownName, match="did you mean info_nce"):
        weighted_sum({"infonce": 1.0})
    with pytest.raises(ValueError, match="at least one"):
        weighted_sum({})
    with pytest.raises(ValueError, match="answer_tokens weighs its micro-batches"):
        weighted_sum({"info_nce": 1.0, "answer_tokens": 1.0})
