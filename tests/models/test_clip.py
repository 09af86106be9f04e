"""models/clip.py, vision.py and text.py: what is particular to ours; equality with the peers is in interop/."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmfoundry.models.clip import CLIP
from mmfoundry.models.text import trim
from mmfoundry.models.vision import to_pixels
from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.errors import ConfigError
from tests.models.tiny import END, pairs, tiny_clip, tiny_config, tokens


def features_and_gradients(model: CLIP, features: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(features.shape, generator=generator, dtype=features.dtype)
    weights = [each for each in model.parameters() if each.requires_grad]
    gradients = torch.autograd.grad(features, weights, direction, allow_unused=True, materialize_grads=True)
    return [features, *gradients]


def every_position(model: CLIP, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Image and text features computed at every position of every layer, then read at one."""
    vision, text = model.vision_model, model.text_model
    hidden = vision.encoder(vision.pre_layrnorm(vision.embeddings(model.pixels(batch["image"]))))
    image = model.visual_projection(vision.post_layernorm(hidden)[:, 0])
    hidden = text.final_layer_norm(text.encoder(text.embeddings(batch["text"]), is_causal=True))
    end = (batch["text"] == END).int().argmax(1)
    return F.normalize(image, dim=-1), F.normalize(model.text_projection(hidden[torch.arange(len(end)), end]), dim=-1)


def test_last_layer_for_one_row_is_the_whole_last_layer() -> None:
    model, batch = tiny_clip().double(), pairs(6)
    image, text = every_position(model, batch)
    ours = [
        features_and_gradients(model, each)
        for each in (model.encode_image(model.pixels(batch["image"])), model.encode_text(batch["text"]))
    ]
    whole = [features_and_gradients(model, each) for each in (image, text)]
    assert max(part.abs().max() for part in ours[1][1:]) > 1e-3
    torch.testing.assert_close(ours, whole, rtol=1e-9, atol=1e-12)


def test_what_follows_the_end_of_text_cannot_matter() -> None:
    model = tiny_clip().double()
    batch = tokens([4, 6, 2, 5])
    trimmed = features_and_gradients(model, model.encode_text(batch))
    assert trim(batch).shape == (4, 6)
    noisy = batch.clone()
    for row, length in zip(noisy, [4, 6, 2, 5], strict=True):
        row[length:] = torch.randint(1, END, (len(row) - length,))
    noisy[1, 8] = END  # keeps this batch at its full length: the first place of the highest id counts
    assert trim(noisy).shape == (4, 6)
    torch.testing.assert_close(features_and_gradients(model, model.encode_text(noisy)), trimmed, rtol=0, atol=0)
    untrimmed = features_and_gradients(model, every_position(model, {**pairs(4), "text": noisy})[1])
    torch.testing.assert_close(untrimmed, trimmed, rtol=1e-9, atol=1e-12)


def test_a_caption_reads_alike_in_any_batch() -> None:
    model = tiny_clip().double()
    batch = tokens([4, 9, 2, 5])
    one_by_one = torch.cat([model.encode_text(row[None]) for row in batch])
    torch.testing.assert_close(model.encode_text(batch), one_by_one)


def test_output() -> None:
    output = tiny_clip()(pairs(5))
    assert output.image_bD.shape == output.text_bD.shape == (5, 12)
    torch.testing.assert_close(output.image_bD.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(output.text_bD.norm(dim=1), torch.ones(5))
    assert output.bias is None
    torch.testing.assert_close(CLIP.from_seed(tiny_config(), 0).scale(), torch.tensor(1 / 0.07))


def test_sixteen_bit_towers_give_fp32_embeddings() -> None:
    model, batch = tiny_clip(init_logit_bias=-10.0).bfloat16(), pairs(5)
    output = model(batch)
    assert {output.image_bD.dtype, output.text_bD.dtype, output.scale.dtype, output.bias.dtype} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        output = tiny_clip()(batch)
    assert {output.image_bD.dtype, output.text_bD.dtype, output.scale.dtype} == {torch.float32}
    torch.testing.assert_close(output.image_bD.norm(dim=1), torch.ones(5))


def test_scale_is_held_in_the_forward_pass() -> None:
    model = tiny_clip()
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    torch.testing.assert_close(model.scale(), torch.tensor(100.0))
    assert model.logit_scale.item() == 9.0
    free = tiny_clip(max_logit_scale=None)
    with torch.no_grad():
        free.logit_scale.fill_(5.0)
    torch.testing.assert_close(free.scale(), torch.tensor(math.exp(5)))


def test_pixels_as_torchvision_has_them() -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 3, 16, 16)
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    channels = [(images[:, c].float() / 255 - mean[c]) / std[c] for c in range(3)]
    torch.testing.assert_close(to_pixels(images, mean, std), torch.stack(channels, 1))
    with pytest.raises(ValueError, match="uint8"):
        to_pixels(images.float(), mean, std)


@pytest.mark.parametrize("layer", [0, 1, 3, -1, -2, -4])
def test_vision_tokens(layer: int) -> None:
    model = tiny_clip()
    pixels = model.pixels(pairs(2)["image"])
    vision = model.vision_model
    states = [vision.pre_layrnorm(vision.embeddings(pixels))]
    for block in vision.encoder.layers:
        states.append(block(states[-1]))
    torch.testing.assert_close(model.vision_tokens(pixels, layer), states[layer][:, 1:])


def test_wrong_shapes_are_named() -> None:
    model = tiny_clip()
    with pytest.raises(ValueError, match=r"\(2, 3, 8, 16\) should be \(batch, 3, 16, 16\)"):
        model.encode_image(torch.zeros(2, 3, 8, 16))
    with pytest.raises(ValueError, match="captions of 10 tokens, but context_length is 9"):
        model.encode_text(torch.zeros(2, 10, dtype=torch.long))
    with pytest.raises(ValueError, match="the tower has 3 blocks"):
        model.vision_tokens(torch.zeros(2, 3, 16, 16), 4)
    with pytest.raises(ConfigError, match="vision_cfg: patch_size 7 does not divide image_size 16"):
        parse(type(model.config), {"vision_cfg": {"image_size": 16, "patch_size": 7}})


def test_same_seed_same_weights_and_no_trace() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, other = (CLIP.from_seed(tiny_config(), seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["text_projection.weight"], other["text_projection.weight"])


def test_what_does_not_decay() -> None:
    model = tiny_clip(init_logit_bias=-10.0)
    exempt = model.no_weight_decay()
    decays = {name for name, _ in model.named_parameters()} - exempt
    block = "encoder.layers.0"
    for tower in ("vision_model", "text_model"):
        assert f"{tower}.embeddings.position_embedding.weight" in exempt
        assert {f"{tower}.{block}.layer_norm1.weight", f"{tower}.{block}.mlp.fc1.bias"} <= exempt
        assert {f"{tower}.{block}.mlp.fc1.weight", f"{tower}.{block}.self_attn.q_proj.weight"} <= decays
    assert {"logit_scale", "logit_bias", "vision_model.embeddings.class_embedding"} <= exempt
    assert {"text_model.embeddings.token_embedding.weight", "visual_projection.weight"} <= decays
