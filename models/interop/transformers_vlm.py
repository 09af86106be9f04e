"""Our vision-language models as folders that transformers' `Auto` classes load with none of our code.

`pixel_shuffle` becomes `AyaVisionForConditionalGeneration` with `AyaVisionProcessor`, `mlp` becomes
`LlavaForConditionalGeneration` with `LlavaProcessor`; both with a `CLIPVisionModel` or `SiglipVisionModel` tower.
Weights have the same names on both sides, so this is about configs and the processor.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mmfoundry.models.chat import IMAGE, TILE
from mmfoundry.models.clip import ClipConfig
from mmfoundry.models.interop.transformers_clip import to_transformers_config
from mmfoundry.models.interop.transformers_siglip import to_siglip_vision_config
from mmfoundry.models.language import without_bars
from mmfoundry.models.vlm import VisionLanguageModel, VlmConfig
from mmfoundry.models.vlm_text import VlmText
from mmfoundry.pipeline.errors import ConfigError
from mmfoundry.pipeline.torchvision_ops import declare_missing_ops

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


def save_for_transformers(model: VisionLanguageModel, text: VlmText, folder: str | Path) -> None:
    """Write a folder that `AutoModelForImageTextToText` and `AutoProcessor` load.

    Raises:
        ConfigError: no class of transformers represents the model; why is said.
    """
    theirs, processor = to_transformers(model), to_processor(model, text)
    with without_bars():
        theirs.save_pretrained(folder)
        processor.save_pretrained(folder)


def to_transformers(model: VisionLanguageModel) -> PreTrainedModel:
    """The same model as a class of transformers, which shares no weights with it; in evaluation mode.

    Raises:
        ConfigError: its connector has no class there.
    """
    from transformers import AyaVisionForConditionalGeneration, LlavaForConditionalGeneration
    from transformers.initialization import no_init_weights

    config = to_transformers_vlm_config(model.config)
    kind = LlavaForConditionalGeneration if config.model_type == "llava" else AyaVisionForConditionalGeneration
    with no_init_weights():
        theirs: Any = kind(config)
    theirs.to(model.lm_head.weight.dtype)
    ours: dict[str, Tensor] = model.state_dict()
    theirs.load_state_dict(ours)
    theirs.tie_weights()
    ends = [config.text_config.eos_token_id, theirs.generation_config.eos_token_id]
    theirs.generation_config.eos_token_id = next((end for end in ends if end is not None), None)
    return theirs.eval()


def to_transformers_vlm_config(config: VlmConfig) -> Any:
    """`AyaVisionConfig` or `LlavaConfig` for one of our models.

    Raises:
        ConfigError: its connector has no class there.
    """
    from transformers import AutoConfig, AyaVisionConfig, LlavaConfig

    text_config = AutoConfig.for_model(**config.language_model)
    common: dict[str, Any] = {
        "vision_config": _vision_config(config),
        "text_config": text_config,
        "image_token_index": config.patch_token_id,
        "vision_feature_layer": config.vision_layer,
        "vision_feature_select_strategy": _patches_of(config),
        "tie_word_embeddings": bool(getattr(text_config, "tie_word_embeddings", False)),
    }
    if config.connector.type == "pixel_shuffle":
        hidden = config.connector.hidden_width or text_config.hidden_size
        common["alignment_intermediate_size"] = hidden  # read by the projector, though not among the config's fields
        return AyaVisionConfig(
            **common, downsample_factor=config.connector.downsample_factor, adapter_layer_norm_eps=1e-6
        )
    if config.connector.type == "mlp":
        if config.tiles.max_tiles > 1:
            raise ConfigError(
                "LlavaForConditionalGeneration has no tiles: set tiles.max_tiles to 1 for an mlp connector"
            )
        return LlavaConfig(**common, projector_hidden_act="gelu", image_seq_length=config.vision.num_patches)
    raise ConfigError(
        f"transformers has no class for the connector {config.connector.type!r}; it has pixel_shuffle, mlp"
    )


def _vision_config(config: VlmConfig) -> Any:
    """`CLIPVisionConfig` or `SiglipVisionConfig` for a model's vision tower."""
    from transformers import CLIPVisionConfig, SiglipVisionConfig

    vision = config.vision
    if vision.pool_type == "map":
        return SiglipVisionConfig(**to_siglip_vision_config(vision))
    clip = to_transformers_config(ClipConfig(vision_cfg=vision, quick_gelu=config.quick_gelu))
    return CLIPVisionConfig(**{**clip["vision_config"], "projection_dim": vision.width})


def _patches_of(config: VlmConfig) -> str:
    """How transformers tells patches from other positions: all of them, or all but a class token."""
    return "default" if config.vision.num_prefix else "full"


def to_processor(model: VisionLanguageModel, text: VlmText) -> ProcessorMixin:
    """Pictures and chats to what the released model reads.

    Raises:
        ConfigError: a picture's text cannot be written by transformers' processor.
    """
    declare_missing_ops()  # the image processor imports torchvision
    from transformers import AyaVisionProcessor, CLIPImageProcessor, GotOcr2ImageProcessor, LlavaProcessor

    config, image = model.config, model.config.image
    side = config.vision.image_size
    pixels: dict[str, Any] = {
        "size": {"height": side, "width": side},
        "image_mean": list(config.preprocess.mean),
        "image_std": list(config.preprocess.std),
    }
    chat = config.chat.jinja()
    if config.connector.type == "mlp":
        if image.start or image.end or image.whole_tag:
            raise ConfigError(
                "LlavaProcessor writes nothing around image tokens: image.start, image.whole_tag, image.end must be ''"
            )
        # Its placeholder is the image token itself; a class token is counted and taken away again.
        return LlavaProcessor(
            CLIPImageProcessor(**pixels, do_center_crop=False),
            text.tokenizer,
            patch_size=config.vision.patch_size,
            vision_feature_select_strategy=_patches_of(config),
            num_additional_image_tokens=config.vision.num_prefix,
            image_token=image.patch_token,
            chat_template=chat.replace(IMAGE, image.patch_token),
        )
    return AyaVisionProcessor(
        GotOcr2ImageProcessor(
            **pixels, crop_to_patches=True, min_patches=config.tiles.min_tiles, max_patches=config.tiles.max_tiles
        ),
        text.tokenizer,
        patch_size=config.vision.patch_size,
        img_size=side,
        downsample_factor=config.connector.downsample_factor,
        image_token=IMAGE,
        start_of_img_token=image.start,
        end_of_img_token=image.end,
        img_patch_token=image.patch_token,
        tile_token=TILE,
        tile_global_token=image.whole_tag,
        chat_template=chat,
    )
