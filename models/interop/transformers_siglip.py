"""SigLIP to and from transformers' `SiglipModel`: the weights have the same names, so this is mostly about configs.

Checkpoints of SigLIP 2 with a fixed resolution are `SiglipModel`s, too. Those with pictures of any shape (NaFlex) are
`Siglip2Model`s, which are another model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmfoundry.models.clip import CLIP, ClipConfig
from mmfoundry.models.interop.build import acting_state, build, copied, ratio_of
from mmfoundry.models.text import TextConfig
from mmfoundry.models.vision import VisionConfig
from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.errors import ConfigError

_SCALARS = ("logit_scale", "logit_bias")  # vectors of one in `SiglipModel`
# transformers' names for the GELUs
_ACTIVATIONS = {"gelu_pytorch_tanh": "tanh", "gelu_new": "tanh", "gelu": "none", "gelu_python": "none"}
_NAMES = {"tanh": "gelu_pytorch_tanh", "none": "gelu"}
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)


def is_siglip(config: ClipConfig) -> bool:
    """Whether `SiglipModel` is what represents a model: both towers, and the projection, are SigLIP's."""
    text = config.text_cfg
    return (
        config.vision_cfg.pool_type == "map"
        and not config.quick_gelu
        and (text.no_causal_mask, text.pool_type, text.proj_bias) == (True, "last", True)
    )


def to_siglip_config(config: ClipConfig) -> dict[str, Any]:
    """The `config.json` of transformers' `SiglipModel` for one of our models, as plain values.

    Raises:
        ConfigError: the model is none.
    """
    if not is_siglip(config):
        raise ConfigError(
            "transformers' SiglipModel wants vision_cfg.pool_type: map, and text_cfg.no_causal_mask, pool_type: last, "
            "proj_bias; no class of transformers has these towers"
        )
    text = config.text_cfg
    return {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "vision_config": to_siglip_vision_config(config.vision_cfg),
        "text_config": {
            "model_type": "siglip_text_model",
            "max_position_embeddings": text.context_length,
            "vocab_size": text.vocab_size,
            "num_attention_heads": text.heads,
            "projection_size": config.embed_dim,
            **_common(text),
        },
    }


def to_siglip_vision_config(config: VisionConfig) -> dict[str, Any]:
    """The config of transformers' `SiglipVisionModel` for one of our vision towers, as plain values."""
    return {
        "model_type": "siglip_vision_model",
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_attention_heads": config.heads,
        **_common(config),
    }


def _common(config: VisionConfig | TextConfig) -> dict[str, Any]:
    """What both towers' configs have."""
    return {
        "hidden_size": config.width,
        "intermediate_size": config.mlp_hidden,
        "num_hidden_layers": config.layers,
        "hidden_act": _NAMES[config.act_kwargs.approximate],
        "layer_norm_eps": config.norm_kwargs.eps,
    }


def from_siglip_config(config: Mapping[str, Any], source: str = "config.json") -> ClipConfig:
    """Our config for a `SiglipModel`'s; pictures are normalised and squashed as SigLIP's are.

    Args:
        config: `SiglipModel.config.to_dict()`, or its `config.json` with transformers' defaults filled in.
        source: named in errors.

    Raises:
        ConfigError: the model does something that ours does not; the key is named.
    """
    vision, text = config["vision_config"], config["text_config"]
    for name, tower in (("vision_config", vision), ("text_config", text)):
        if tower["hidden_act"] not in _ACTIVATIONS:
            raise ConfigError(f"{source}: {name}.hidden_act {tower['hidden_act']!r}: not one of {[*_ACTIVATIONS]}")
    if not vision["vision_use_head"]:
        raise ConfigError(f"{source}: vision_config.vision_use_head is false: without its head there is no embedding")
    if vision["num_channels"] != 3:
        raise ConfigError(f"{source}: vision_config.num_channels is {vision['num_channels']}, not 3")
    tree = {
        "embed_dim": text["projection_size"],
        "init_logit_scale": math.log(10),  # the paper's start; a checkpoint has its own
        "init_logit_bias": -10.0,
        "preprocess_cfg": {"mean": SIGLIP_MEAN, "std": SIGLIP_STD, "resize_mode": "squash"},
        "vision_cfg": {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            "pool_type": "map",
            **_from_common(vision),
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "heads": text["num_attention_heads"],
            "no_causal_mask": True,
            "pool_type": "last",
            "proj_bias": True,
            **_from_common(text),
        },
    }
    return parse(ClipConfig, tree, source=source)


def _from_common(tower: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "width": tower["hidden_size"],
        "layers": tower["num_hidden_layers"],
        "mlp_ratio": ratio_of(tower["intermediate_size"], tower["hidden_size"]),
        "act_kwargs": {"approximate": _ACTIVATIONS[tower["hidden_act"]]},
        "norm_kwargs": {"eps": tower["layer_norm_eps"]},
    }


def to_siglip_state(model: CLIP) -> dict[str, Tensor]:
    """Our weights as `SiglipModel` loads them, with the inverse temperature as it acts; no bias is one of zero.

    Raises:
        ConfigError: the model is none; see `to_siglip_config`.
    """
    to_siglip_config(model.config)
    state = copied(acting_state(model))
    state.setdefault("logit_bias", torch.zeros_like(state["logit_scale"]))
    return state | {name: state[name].reshape(1) for name in _SCALARS}


def from_siglip(config: Mapping[str, Any], state: Mapping[str, Tensor], source: str = "checkpoint") -> CLIP:
    """Build our model from a `SiglipModel`'s config and weights; in evaluation mode, the weights copied.

    Args:
        config: `SiglipModel.config.to_dict()`.
        state: its state dict; positions saved as buffers by older versions are left out.
        source: named in errors.

    Raises:
        ConfigError: see `from_siglip_config`.
        DamagedInput: the weights do not fit the config.
    """
    weights = copied(state)
    weights |= {name: weights[name].reshape(()) for name in _SCALARS if name in weights}
    return build(from_siglip_config(config, source), weights, source)
