"""models/initialise.py against open_clip's own start, by the spread of each weight."""

import hashlib

import open_clip
import torch

from mmfoundry.models.clip import CLIP, ClipConfig
from mmfoundry.models.interop.open_clip import from_open_clip, to_open_clip_config
from tests.models.tiny import tiny_config


def test_spread_of_every_weight_is_open_clips() -> None:
    config = ClipConfig(
        embed_dim=64,
        vision_cfg={"image_size": 64, "patch_size": 8, "width": 128, "layers": 2},
        text_cfg={"context_length": 32, "vocab_size": 600, "width": 96, "heads": 2, "layers": 3},
    )
    model_cfg = to_open_clip_config(config)["model_cfg"]
    torch.manual_seed(1)
    theirs = from_open_clip(model_cfg, open_clip.CLIP(**model_cfg).state_dict()).state_dict()
    ours = CLIP.from_seed(config, 0).state_dict()
    for name, value in ours.items():
        # Of n values a standard deviation is known to about 1/sqrt(2n); five times that, for two samples
        slack = 5 / value.numel() ** 0.5
        reference = theirs[name].std(correction=0)
        torch.testing.assert_close(
            value.std(correction=0), reference, rtol=slack, atol=0, msg=lambda m, n=name: f"{n}: {m}"
        )
        if reference > 0:
            # Normal values reach past their bound of 1.8 standard deviations, uniform ones do not
            assert (value.abs().max() > 1.8 * reference) == (theirs[name].abs().max() > 1.8 * reference), name


def test_names_and_first_weights_of_a_seed_stay() -> None:
    """What a seed gave once, `untrained_clip` and finished runs count on."""
    digest = hashlib.sha256()
    for name, value in CLIP.from_seed(tiny_config(), 0).state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    assert digest.hexdigest().startswith("c698de7246d80160")
