"""info_nce.py, tiled_info_nce.py and siglip.py of models/objectives against open_clip's own losses and the formula."""

import math
from typing import Any

import pytest
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor

from mmfoundry.models.clip import ClipOutput
from mmfoundry.models.objectives import OBJECTIVES, needs, objective_with, weighted_sum
from mmfoundry.pipeline.errors import ConfigError, UnknownName

CONTRASTIVE = ("info_nce", "siglip", "tiled_info_nce")


def output(rows: int = 6, width: int = 5, bias: float | None = -2.0) -> ClipOutput:
    torch.manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(rows, width, dtype=torch.float64), dim=1) for _ in "it")
    scale, shift = torch.tensor(9.0, dtype=torch.float64), None if bias is None else torch.tensor(bias).double()
    parts = [image, text, scale, shift]
    return ClipOutput(*(part if part is None else part.requires_grad_() for part in parts))


def gradients(loss: Tensor, of: ClipOutput) -> list[Tensor]:
    parts = [part for part in (of.image_bD, of.text_bD, of.scale, of.bias) if part is not None]
    return list(torch.autograd.grad(loss, parts, materialize_grads=True))


@pytest.mark.parametrize(
    ("name", "options"), [("info_nce", {}), *(("tiled_info_nce", {"tile": tile}) for tile in (None, 1, 4, 6))]
)
def test_info_nce_is_open_clips(name: str, options: dict[str, Any]) -> None:
    ours = output(bias=None)
    values = objective_with(name, options)(ours, {}, None)
    theirs = ClipLoss()(ours.image_bD, ours.text_bD, ours.scale)
    torch.testing.assert_close(values["loss"], theirs)
    torch.testing.assert_close(gradients(values["loss"], ours), gradients(theirs, ours))


@pytest.mark.parametrize("tile", [None, 1, 4, 6])
def test_siglip_is_open_clips(tile: int | None) -> None:
    ours = output()
    values = objective_with("siglip", {"tile": tile})(ours, {}, None)
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
    for name in CONTRASTIVE:
        assert OBJECTIVES[name](apart, {})["accuracy"] == 1
    half = ClipOutput(torch.eye(4), torch.eye(4)[[0, 1, 3, 2]], torch.tensor(100.0), torch.tensor(0.0))
    assert OBJECTIVES["info_nce"](half, {})["accuracy"] == 0.5


def test_full_precision_under_autocast() -> None:
    exact = output(rows=8, width=64)
    single = ClipOutput(*(part.detach().float() for part in (exact.image_bD, exact.text_bD, exact.scale, exact.bias)))
    for name in CONTRASTIVE:
        with torch.autocast("cpu", torch.bfloat16):
            loss = OBJECTIVES[name](single, {})["loss"]
        torch.testing.assert_close(loss.double(), OBJECTIVES[name](exact, {})["loss"].detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["siglip", "tiled_info_nce"])
def test_gradients_in_full_precision_under_autocast(name: str) -> None:
    exact = output(rows=8, width=64)
    single = ClipOutput(*(part.detach().float().requires_grad_() for part in exact if part is not None))
    with torch.autocast("cpu", torch.bfloat16):
        loss = OBJECTIVES[name](single, {})["loss"]
        ours = gradients(loss, single)  # these multiply in the backward pass by themselves
    for own, wanted in zip(ours, gradients(OBJECTIVES[name](exact, {})["loss"], exact), strict=True):
        torch.testing.assert_close(own.double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_far_apart_logits_neither_overflow_nor_vanish(name: str) -> None:
    exact = output(rows=6)
    strong = exact._replace(scale=torch.tensor(3000.0, dtype=torch.float64, requires_grad=True))
    single = ClipOutput(*(part.detach().float().requires_grad_() for part in strong if part is not None))
    wanted, ours = (OBJECTIVES[name](each, {})["loss"] for each in (strong, single))
    assert wanted > 100  # exp of such logits is infinite in single precision
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-4, atol=0)
    assert all(part.isfinite().all() for part in gradients(ours, single))


def test_no_gradients_where_none_are_wanted() -> None:
    for name in CONTRASTIVE:
        with torch.no_grad():
            values = OBJECTIVES[name](output(), {})
        torch.testing.assert_close(values, {key: each.detach() for key, each in OBJECTIVES[name](output(), {}).items()})


def test_options() -> None:
    tiled = objective_with("tiled_info_nce", {"tile": 2})
    assert tiled.tile == 2  # type: ignore[attr-defined]
    assert objective_with("tiled_info_nce", {}) is OBJECTIVES["tiled_info_nce"]
    assert weighted_sum({"siglip": {"weight": 1.0, "tile": 3}}).tile == 3  # type: ignore[attr-defined]
    assert needs(weighted_sum({"info_nce": 1, "siglip": {"weight": 2}})) == {"bias"}
    assert needs(OBJECTIVES["info_nce"]) == frozenset()
    with pytest.raises(ConfigError, match=r"objectives\.siglip\.tiel is not a known key; did you mean tile"):
        weighted_sum({"siglip": {"tiel": 3}})
    with pytest.raises(ConfigError, match=r"objectives\.info_nce has no options"):
        weighted_sum({"info_nce": {"tile": 3}})
    with pytest.raises(ConfigError, match=r"objectives\.siglip: the weight should be a number"):
        weighted_sum({"siglip": {"weight": "much"}})


def test_what_is_refused() -> None:
    good = output(bias=None)
    bad = ClipOutput(good.image_bD, good.text_bD[:3], good.scale)
    for name in CONTRASTIVE:
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
