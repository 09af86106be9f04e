"""What a batch costs by formula, against torch's own count of what was computed."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmfoundry.models.clip import CLIP, ClipConfig
from mmfoundry.models.flops import clip_work, text_flops, vision_flops
from mmfoundry.models.interop.open_clip import named_config
from tests.models.tiny import tiny_clip, tiny_config, tokens


def counted(model: CLIP, batch: dict[str, Any], backward: bool) -> int:
    """Matrix products of a pass, attention written out as such: the counter knows few kernels of CPUs."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(batch)
        if backward:
            (output.image_bD.sum() + output.text_bD.sum()).backward()
    return counter.get_total_flops()


def batch_of(config: ClipConfig, rows: int, length: int) -> dict[str, Any]:
    side = config.vision_cfg.image_size
    image = torch.zeros(rows, 3, side, side, dtype=torch.uint8, device=torch.get_default_device())
    return {"image": image, "text": tokens([length] * rows, context=length)}


@pytest.mark.parametrize("layers", [1, 3])
def test_a_step_is_what_torch_counts(layers: int) -> None:
    config = tiny_config()
    text = config.text_cfg.model_copy(update={"layers": layers})
    vision = config.vision_cfg.model_copy(update={"layers": layers})
    model = CLIP.from_seed(config.model_copy(update={"text_cfg": text, "vision_cfg": vision}), 0)
    batch = batch_of(config, 5, 7)
    assert counted(model, batch, backward=True) == clip_work(model)(batch).flops
    assert counted(model, batch, backward=False) == 5 * (vision_flops(model.config)[0] + text_flops(model.config, 7))
    assert clip_work(model)(batch).tokens == 5 * (4 + 1 + 7)


def test_a_locked_tower_has_no_backward_pass() -> None:
    model, batch = tiny_clip(), batch_of(tiny_config(), 3, 6)
    for weight in (*model.vision_model.parameters(), *model.visual_projection.parameters()):
        weight.requires_grad_(False)
    assert counted(model, batch, backward=True) == clip_work(model)(batch).flops


def test_vit_b_32_is_as_large_as_it_is_known_to_be() -> None:
    """open_clip's docs/model_profile.csv gives 14.78 GFLOPs for a pair; all positions of the last blocks among them."""
    config = named_config("ViT-B-32")
    ours = vision_flops(config)[0] + text_flops(config, 77)
    left_out = sum(
        rows * 2 * width * (width * 2 + rows_in * 2 + width * 8)
        for rows, rows_in, width in ((49, 50, 768), (76, 77, 512))
    )
    assert (ours + left_out) / 1e9 == pytest.approx(14.78, rel=1e-3)
