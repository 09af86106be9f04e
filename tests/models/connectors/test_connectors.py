"""Connectors against transformers' projectors, and every registered one against the contract."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AyaVisionConfig, CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers.models.aya_vision.modeling_aya_vision import AyaVisionMultiModalProjector
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from mmfoundry.models.connectors import CONNECTORS, ConnectorConfig

PATCHES, VISION, TEXT = 36, 10, 16
CONFIGS = {
    "pixel_shuffle": ConnectorConfig(type="pixel_shuffle", downsample_factor=3),
    "mlp": ConnectorConfig(type="mlp", downsample_factor=1),
}


def build(config: ConnectorConfig) -> nn.Module:
    return CONNECTORS[config.type](config, patches=PATCHES, vision_width=VISION, text_width=TEXT)


def reference(config: ConnectorConfig) -> nn.Module:
    towers: dict[str, Any] = {
        "vision_config": CLIPVisionConfig(hidden_size=VISION, num_attention_heads=2),
        "text_config": LlamaConfig(hidden_size=TEXT, num_attention_heads=2),
    }
    if config.type == "mlp":
        return LlavaMultiModalProjector(LlavaConfig(**towers))
    hidden = {"alignment_intermediate_size": config.hidden_width or TEXT}
    return AyaVisionMultiModalProjector(AyaVisionConfig(**towers, **hidden, downsample_factor=config.downsample_factor))


@pytest.mark.parametrize(
    "config",
    [*CONFIGS.values(), CONFIGS["pixel_shuffle"].model_copy(update={"downsample_factor": 2, "hidden_width": 18})],
)
def test_same_as_transformers(config: ConnectorConfig) -> None:
    ours, theirs = build(config), reference(config)
    for weight in ours.parameters():
        nn.init.normal_(weight, std=0.5)
    theirs.load_state_dict(ours.state_dict())
    patches = torch.randn(2, PATCHES, VISION)
    expected = theirs(patches).reshape(2, -1, TEXT)
    torch.testing.assert_close(ours(patches), expected)
    assert ours.tokens == expected.shape[1]


def test_every_connector_has_a_row() -> None:
    assert sorted(CONNECTORS) == sorted(CONFIGS)


@pytest.mark.parametrize("factor", [4, 5])
def test_pixel_shuffle_must_divide(factor: int) -> None:
    with pytest.raises(ValueError, match=f"downsample_factor {factor} does not divide"):
        build(ConnectorConfig(downsample_factor=factor))


@pytest.mark.parametrize("change", [{"downsample_factor": 2}, {"downsample_factor": 1, "hidden_width": 8}])
def test_mlp_refuses_what_it_has_not(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="mlp connector"):
        build(ConnectorConfig(type="mlp", **change))
