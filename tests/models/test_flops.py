"""What a batch costs by formula, against torch's own count of what was computed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmfoundry.models.clip import CLIP, ClipConfig
from mmfoundry.models.flops import clip_work, open_clip_work, text_flops, vision_flops
from mmfoundry.models.interop.open_clip import named_config, to_open_clip_config
from mmfoundry.models.lock import lock_image_tower
from mmfoundry.models.open_clip_groups import lock_open_clip_tower
from mmfoundry.models.open_clip_model import OpenClip, OpenClipConfig
from mmfoundry.pipeline.config import parse
from tests.models.test_open_clip_transformers import config as config_of_transformers
from tests.models.tiny import tiny_clip, tiny_config, tokens
from tests.models.tiny_open_clip import KINDS
from tests.models.tiny_open_clip import config as config_of_open_clip


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


def test_open_clips_vit_costs_what_ours_does_and_its_last_block_whole() -> None:
    config = tiny_config()
    theirs = OpenClip.from_seed(parse(OpenClipConfig, {"open_clip": to_open_clip_config(config)["model_cfg"]}), 0)
    ours, batch = CLIP.from_seed(config, 0), batch_of(config, 5, 7)
    vision, text = config.vision_cfg, config.text_cfg
    left_out = sum(  # by ours, which computes one position of the last block: queries, output, attention, MLP
        (positions - 1) * 2 * width * (2 * width + 2 * positions + 2 * hidden)
        for positions, width, hidden in ((5, vision.width, vision.mlp_hidden), (7, text.width, text.mlp_hidden))
    )
    found = open_clip_work(theirs)(batch)
    assert found.flops == clip_work(ours)(batch).flops + 3 * 5 * left_out
    assert found.tokens == clip_work(ours)(batch).tokens
    for model, lock in ((ours, lock_image_tower), (theirs, lambda model: lock_open_clip_tower(model, "image"))):
        lock(model)
    left_out = 4 * 2 * vision.width * (2 * vision.width + 2 * 5 + 2 * vision.mlp_hidden)
    text_part = 6 * 2 * text.width * (2 * text.width + 2 * 7 + 2 * text.mlp_hidden)
    locked = open_clip_work(theirs)(batch).flops
    assert locked == clip_work(ours)(batch).flops + 5 * left_out + 3 * 5 * text_part


@pytest.mark.parametrize("kind", KINDS)
def test_open_clips_modules_are_counted_for_captions_of_any_length(kind: str) -> None:
    model = OpenClip.from_seed(config_of_open_clip(kind), 0)
    model.captions = kind == "coca"
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    work = open_clip_work(model)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())  # nothing was computed
    for length in (3, 7):
        side = model.config.vision_cfg.image_size
        image = torch.zeros(5, 3, side, side, dtype=torch.uint8)
        batch = {"image": image, "text": tokens([length] * 5, context=length)}
        assert work(batch).flops == pytest.approx(whole_pass(model, batch), rel=1e-9)


def test_a_text_tower_of_transformers_is_counted(tmp_path: Path) -> None:
    model = OpenClip.from_seed(config_of_transformers("tower", tmp_path), 0)
    side, length = model.config.vision_cfg.image_size, model.config.text_cfg.context_length
    image = torch.zeros(5, 3, side, side, dtype=torch.uint8)
    batch = {"image": image, "text": torch.arange(5 * length).reshape(5, length) % 9}  # 0 among them: padding
    assert open_clip_work(model)(batch).flops == pytest.approx(whole_pass(model, batch), rel=1e-9)


def whole_pass(model: OpenClip, batch: dict[str, Any]) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        torch.stack(
            [part.sum() for part in model.train()(batch) if part is not None and part.requires_grad]
        ).sum().backward()
    return counter.get_total_flops()


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
