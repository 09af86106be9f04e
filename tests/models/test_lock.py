"""models/lock.py and patch_dropout of models/vision.py against open_clip's own."""

import open_clip
import pytest
import torch
from open_clip.transformer import PatchDropout

from mmfoundry.models.interop.open_clip import to_open_clip_config, to_open_clip_state
from mmfoundry.models.lock import lock_image_tower, lock_text_tower
from mmfoundry.models.vision import drop_patches
from mmfoundry.pipeline.errors import ConfigError
from tests.models.tiny import pairs, tiny_clip, tiny_config

GROUPS = {"image": 5, "text": 4}  # embeddings, blocks, projection of the tiny model


@pytest.mark.parametrize(
    ("tower", "unlocked"), [(tower, count) for tower, groups in GROUPS.items() for count in range(groups + 1)]
)
def test_open_clip_locks_the_same(tower: str, unlocked: int) -> None:
    model = tiny_clip()
    record = to_open_clip_config(model.config)["model_cfg"]
    theirs = open_clip.CLIP(**record)
    if tower == "image":
        lock_image_tower(model, unlocked)
        theirs.lock_image_tower(unlocked_groups=unlocked)
    else:
        lock_text_tower(model, unlocked)
        theirs.lock_text_tower(unlocked_layers=unlocked)
    flags = {name: torch.full_like(each, float(each.requires_grad)) for name, each in model.named_parameters()}
    marked = tiny_clip()
    marked.load_state_dict(flags)  # marks instead of weights, so that the renaming to open_clip's names carries them
    ours = {name: bool(each.max()) for name, each in to_open_clip_state(marked).items() if name != "logit_scale"}
    assert ours == {name: each.requires_grad for name, each in theirs.named_parameters() if name != "logit_scale"}
    assert model.logit_scale.requires_grad


def test_a_locked_tower_gets_no_gradient() -> None:
    model = tiny_clip()
    lock_image_tower(model)
    output = model(pairs(3))
    assert not output.image_bD.requires_grad
    assert output.text_bD.requires_grad


def test_more_than_there_are() -> None:
    with pytest.raises(ConfigError, match="lock_image_unlocked_groups is 6, but this tower has 5 groups"):
        lock_image_tower(tiny_clip(), 6)
    with pytest.raises(ConfigError, match="lock_text_unlocked_layers is 5, but this tower has 4 groups"):
        lock_text_tower(tiny_clip(), 5)


@pytest.mark.parametrize(("patches", "share"), [(16, 0.5), (16, 0.75), (9, 0.3), (4, 0.99), (49, 0.1)])
def test_as_many_patches_stay_as_in_open_clip(patches: int, share: float) -> None:
    torch.manual_seed(0)
    position = torch.arange(patches + 1.0)[None, :, None].expand(64, -1, 2)
    ours, theirs = drop_patches(position, share), PatchDropout(share).train()(position)
    assert ours.shape == theirs.shape
    assert (ours[:, 0] == 0).all()
    kept = ours[:, 1:, 0].long()
    assert (kept > 0).all()
    assert all(len(set(row)) == len(row) for row in kept.tolist())
    counts = torch.bincount(kept.flatten(), minlength=patches + 1)[1:].float() / 64
    expected = kept.shape[1] / patches
    assert (counts - expected).abs().max() < 5 * (expected * (1 - expected) / 64) ** 0.5 + 1e-6  # none is preferred


def test_patches_are_dropped_in_training_only() -> None:
    vision = {**tiny_config().vision_cfg.model_dump(), "image_size": 32}
    whole = tiny_clip(vision_cfg=vision)
    dropping = tiny_clip(vision_cfg={**vision, "patch_dropout": 0.5})
    pixels = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(dropping.eval().encode_image(pixels), whole.eval().encode_image(pixels), rtol=0, atol=0)
    seen = []
    dropping.vision_model.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    assert whole.train().vision_model.tokens(pixels).shape == (4, 16, 24)
    tokens = dropping.train().vision_model.tokens(pixels)  # what a language model reads is whole
    torch.testing.assert_close(tokens, whole.vision_model.tokens(pixels))
    torch.manual_seed(3)
    first = dropping.encode_image(pixels)
    torch.manual_seed(3)
    torch.testing.assert_close(dropping.encode_image(pixels), first, rtol=0, atol=0)  # as a gradient cache replays it
    assert not torch.allclose(first, whole.encode_image(pixels))
    assert seen == [17, 9, 9]
