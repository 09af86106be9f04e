"""models/open_clip_groups.py: what is locked in open_clip's modules is what open_clip locks, or is refused."""

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import nn

from mmfoundry.models.interop.any_clip import read_clip, save_any_clip
from mmfoundry.models.open_clip_groups import Tower, group_depths, lock_open_clip_tower
from mmfoundry.models.open_clip_model import OpenClip, OpenClipConfig
from mmfoundry.pipeline.errors import ConfigError
from tests.models.test_open_clip_model import batch
from tests.models.tiny_open_clip import config, model_cfg


def learning(module: nn.Module) -> set[str]:
    return {name for name, weight in module.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("unlocked", [0, 2])
@pytest.mark.parametrize(("kind", "tower"), [("siglip", "image"), ("siglip", "text"), ("convnext", "image")])
def test_what_open_clips_own_methods_lock(kind: str, tower: Tower, unlocked: int) -> None:
    ours = OpenClip.from_seed(config(kind), 0)
    theirs: Any = open_clip.CustomTextCLIP(**{k: v for k, v in model_cfg(kind).items() if k != "custom_text"})
    if tower == "image":
        theirs.lock_image_tower(unlocked_groups=unlocked)
    else:
        theirs.lock_text_tower(unlocked_layers=unlocked)
    lock_open_clip_tower(ours, tower, unlocked)
    assert learning(ours.open_clip) == learning(theirs)
    assert {"logit_scale"} < learning(theirs) < {name for name, _ in theirs.named_parameters()}


def test_a_cocas_towers_are_locked_and_its_decoder_learns() -> None:
    coca = OpenClip.from_seed(config("coca"), 0)
    lock_open_clip_tower(coca, "text", 1)
    assert {name for name in learning(coca.open_clip) if name.startswith("text.")} == {"text.text_projection"}
    lock_open_clip_tower(coca, "image")
    coca.captions = True
    output = coca(batch(coca))
    assert not output.image_bD.requires_grad
    assert output.caption_nats_bL.requires_grad
    assert {name.partition(".")[0] for name in learning(coca.open_clip)} == {"text", "text_decoder", "logit_scale"}


def test_the_text_tower_of_a_plain_clip_is_not_its_own_module() -> None:
    model = OpenClip.from_seed(config("resnet"), 0)
    lock_open_clip_tower(model, "text")
    assert learning(model.open_clip) == {
        *(f"visual.{name}" for name, _ in model.open_clip.visual.named_parameters()),
        "logit_scale",
    }
    model.requires_grad_(True)
    depths = group_depths(model, "text")
    assert learning(model) == {name for name, _ in model.named_parameters()}  # as it was
    assert depths[id(model.open_clip.token_embedding.weight)] == 3
    assert depths[id(model.open_clip.text_projection)] == 0


@pytest.mark.parametrize("freeze", [True, False])
def test_statistics_of_batch_norms_stay_or_go_on(freeze: bool, tmp_path: Path) -> None:
    model = OpenClip.from_seed(config("resnet"), 0).train()
    lock_open_clip_tower(model, "image", freeze_bn_stats=freeze)
    before = {name: value.clone() for name, value in model.open_clip.visual.state_dict().items()}
    given = batch(model)
    output = model(given)
    assert not output.image_bD.requires_grad
    after = model.open_clip.visual.state_dict()
    changed = {name.rpartition(".")[2] for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == (set() if freeze else {"running_mean", "running_var", "num_batches_tracked"})
    save_any_clip(model, tmp_path)
    theirs = open_clip.create_model(f"local-dir:{tmp_path}", require_pretrained=True).eval()
    with torch.no_grad():
        expected = model.eval()(given).image_bD
        torch.testing.assert_close(read_clip(tmp_path)(given).image_bD, expected)
        torch.testing.assert_close(theirs.encode_image(model.pixels(given["image"]), normalize=True), expected)


@pytest.mark.parametrize(
    ("kind", "tower", "options", "message"),
    [
        ("resnet", "image", {"unlocked": 1}, "lock_image_unlocked_groups: open_clip cannot lock its ModifiedResNet"),
        ("siglip", "image", {"unlocked": 4}, "lock_image_unlocked_groups is 4: this tower has fewer groups"),
        ("siglip", "text", {"unlocked": 9}, "lock_text_unlocked_layers is 9: this tower has fewer groups"),
        ("convnext", "image", {"freeze_bn_stats": True}, "this model's image tower has no batch normalisation"),
    ],
)
def test_what_cannot_be_locked_so(kind: str, tower: Tower, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        lock_open_clip_tower(OpenClip.from_seed(config(kind), 0), tower, **options)
    assert "\n" not in str(caught.value)


def test_a_batch_norm_that_does_more_is_not_replaced() -> None:
    """open_clip 3.3.0 would: timm's BatchNormAct2d is a BatchNorm2d with the activation in it."""
    tree = model_cfg("convnext")
    tree["vision_cfg"] |= {"timm_model_name": "mobilenetv3_small_050"}
    model = OpenClip.from_seed(OpenClipConfig(open_clip=tree), 0)
    with pytest.raises(ConfigError, match=r"open_clip would replace BatchNormAct2d .* \(its activation\)"):
        lock_open_clip_tower(model, "image", freeze_bn_stats=True)
    lock_open_clip_tower(model, "image")
