"""CLIP to and from transformers' `CLIPModel`: the weights have the same names, so this is mostly about configs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mmfoundry.models.clip import CLIP, ClipConfig
from mmfoundry.models.interop.build import acting_state, build, copied, ratio_of
from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.errors import ConfigError

# Ours: the exact GELU or `quick_gelu`; transformers' other names for the exact one
_ACTIVATIONS = {"quick_gelu": True, "gelu": False, "gelu_python": False}
_LAYER_NORM_EPS = 1e-5  # of every norm of ours, of open_clip and of OpenAI


def to_transformers_config(config: ClipConfig) -> dict[str, Any]:
    """The `config.json` of transformers' `CLIPModel` for one of our models, as plain values.

    The end-of-text id is written as the highest id: transformers then reads the first place of that id, which is
    where ours reads (the first place of the highest id in the caption).

    Raises:
        ConfigError: the model has a logit bias, which `CLIPModel` cannot hold, or other towers.
    """
    if config.init_logit_bias is not None:
        raise ConfigError(
            "transformers' CLIPModel has no logit bias: a model with init_logit_bias cannot be written as one"
        )
    _check_towers(config)
    vision, text = config.vision_cfg, config.text_cfg
    activation = "quick_gelu" if config.quick_gelu else "gelu"
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": config.init_logit_scale,
        "vision_config": {
            "model_type": "clip_vision_model",
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_size": vision.width,
            "intermediate_size": int(vision.width * vision.mlp_ratio),
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "projection_dim": config.embed_dim,
            "hidden_act": activation,
            "layer_norm_eps": _LAYER_NORM_EPS,
        },
        "text_config": {
            "model_type": "clip_text_model",
            "max_position_embeddings": text.context_length,
            "vocab_size": text.vocab_size,
            "hidden_size": text.width,
            "intermediate_size": int(text.width * text.mlp_ratio),
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "projection_dim": config.embed_dim,
            "hidden_act": activation,
            "layer_norm_eps": _LAYER_NORM_EPS,
            "bos_token_id": text.vocab_size - 2,
            "eos_token_id": text.vocab_size - 1,
            "pad_token_id": 0,
        },
    }


def _check_towers(config: ClipConfig) -> None:
    """Refuse what `CLIPModel` does not do.

    Raises:
        ConfigError: the key is named.
    """
    plain = ClipConfig()
    for name in ("vision_cfg", "text_cfg"):
        ours, theirs = getattr(config, name), getattr(plain, name)
        for key in ("pool_type", "norm_kwargs", "act_kwargs", "no_causal_mask", "proj_bias", "proj_type"):
            if getattr(ours, key, None) != getattr(theirs, key, None):
                raise ConfigError(f"{name}.{key}: transformers' CLIPModel has no such towers; only CLIP's and SigLIP's")


def from_transformers_config(config: Mapping[str, Any], source: str = "config.json") -> ClipConfig:
    """Our config for a `CLIPModel`'s.

    Args:
        config: `CLIPModel.config.to_dict()`, or its `config.json` with transformers' defaults filled in.
        source: named in errors.

    Raises:
        ConfigError: the model does something that ours does not (another activation, or pooling elsewhere).
    """
    vision, text = config["vision_config"], config["text_config"]
    activations = {vision["hidden_act"], text["hidden_act"]}
    if len(activations) != 1 or not activations <= _ACTIVATIONS.keys():
        raise ConfigError(f"{source}: hidden_act {sorted(activations)}: one of {sorted(_ACTIVATIONS)} for both towers")
    for name, tower in (("vision_config", vision), ("text_config", text)):
        if not math.isclose(tower["layer_norm_eps"], _LAYER_NORM_EPS):
            raise ConfigError(f"{source}: {name}.layer_norm_eps is {tower['layer_norm_eps']}, not {_LAYER_NORM_EPS}")
    # 2 is what configs before July 2023 say; transformers then pools at the highest id, as ours does
    if text["eos_token_id"] not in (2, text["vocab_size"] - 1):
        raise ConfigError(f"{source}: text_config.eos_token_id {text['eos_token_id']} is not the highest id")
    tree = {
        "embed_dim": config["projection_dim"],
        "quick_gelu": _ACTIVATIONS[vision["hidden_act"]],
        "init_logit_scale": config["logit_scale_init_value"],
        "vision_cfg": {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "width": vision["hidden_size"],
            "layers": vision["num_hidden_layers"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            "mlp_ratio": ratio_of(vision["intermediate_size"], vision["hidden_size"]),
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "width": text["hidden_size"],
            "heads": text["num_attention_heads"],
            "layers": text["num_hidden_layers"],
            "mlp_ratio": ratio_of(text["intermediate_size"], text["hidden_size"]),
        },
    }
    return parse(ClipConfig, tree, source=source)


def to_transformers_state(model: CLIP) -> dict[str, Tensor]:
    """Our weights as `CLIPModel` loads them, with the inverse temperature as it acts: held at its limit.

    Raises:
        ConfigError: the model has a logit bias, which `CLIPModel` cannot hold.
    """
    if model.logit_bias is not None:
        raise ConfigError(
            "transformers' CLIPModel has no logit bias: a model with one cannot be written as a CLIPModel"
        )
    return copied(acting_state(model))


def from_transformers(config: Mapping[str, Any], state: Mapping[str, Tensor], source: str = "checkpoint") -> CLIP:
    """Build our model from a `CLIPModel`'s config and weights; in evaluation mode, the weights copied.

    Args:
        config: `CLIPModel.config.to_dict()`.
        state: its state dict; positions saved as buffers by older versions are left out.
        source: named in errors.

    Raises:
        ConfigError: see `from_transformers_config`.
        DamagedInput: the weights do not fit the config.
    """
    return build(from_transformers_config(config, source), copied(state), source)
