"""What a released model is made of, in words, for its card."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from mmfoundry.models.interop.any_clip import AnyClip
from mmfoundry.models.open_clip_model import OpenClip
from mmfoundry.models.vision import VisionConfig
from mmfoundry.models.vlm import VisionLanguageModel
from mmfoundry.pipeline.json_file import read_json


def clip_facts(model: AnyClip) -> dict[str, str]:
    """Sizes of a CLIP."""
    if isinstance(model, OpenClip):
        tree, module = model.config.open_clip, model.open_clip
        tower = tree["vision_cfg"].get("timm_model_name") or type(module.visual).__name__
        return {
            "parameters": _count(model),
            "class": f"open_clip's {type(module).__name__}",
            "vision tower": f"{tower}, pictures of {model.config.vision_cfg.image_size} pixels",
            "text tower": f"{model.config.text_cfg.context_length} tokens at most",
            "joint embedding": f"width {tree['embed_dim']}",
        }
    text = model.config.text_cfg
    return {
        "parameters": _count(model),
        "vision tower": _tower(model.config.vision_cfg),
        "text tower": f"{text.layers} layers of width {text.width}, {text.context_length} tokens at most",
        "joint embedding": f"width {model.config.embed_dim}",
    }


def vlm_facts(model: VisionLanguageModel) -> dict[str, str]:
    """Sizes of a vision-language model."""
    config, language = model.config, model.config.language_model
    tiles = config.tiles
    count = f"{tiles.min_tiles} to {tiles.max_tiles}" if tiles.min_tiles < tiles.max_tiles else f"{tiles.max_tiles}"
    cut = "the whole picture" if tiles.max_tiles == 1 else f"{count} tiles and the whole picture"
    depth, width = language.get("num_hidden_layers"), language.get("hidden_size")
    return {
        "parameters": _count(model),
        "vision tower": f"{_tower(config.vision)}; its layer {config.vision_layer} is read",
        "connector": f"{config.connector.type}, {model.tokens_per_tile} tokens a tile",
        "tiles": cut,
        "language model": f"{language.get('model_type')}, {depth} layers of width {width}",
    }


def adapter_facts(folder: Path) -> dict[str, str]:
    """Size and places of an adapter in peft's format."""
    config = read_json(folder / "adapter_config.json")
    modules = config["target_modules"]
    places = modules if isinstance(modules, str) else ", ".join(sorted(modules))
    return {"rank": str(config["r"]), "alpha": f"{config['lora_alpha']:g}", "layers": f"`{places}`".replace("|", "\\|")}


def _tower(vision: VisionConfig) -> str:
    size = f"pictures of {vision.image_size} pixels, patches of {vision.patch_size}"
    return f"{vision.layers} layers of width {vision.width}, {size}"


def _count(model: nn.Module) -> str:
    return f"{sum(weight.numel() for weight in model.parameters()):,}"
