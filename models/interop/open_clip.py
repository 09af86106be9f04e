"""CLIP to and from open_clip's `CLIP` class: its config keys are ours, its weights fuse queries, keys and values.

SigLIP is its `CustomTextCLIP` with a vision tower of timm's, see `open_clip_siglip`.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmfoundry.models.clip import CLIP, ClipConfig
from mmfoundry.models.interop.build import acting_state, build
from mmfoundry.models.interop.open_clip_siglip import (
    SIGLIP_PREPROCESS,
    from_trunk,
    timm_tower,
    timm_vision_cfg,
    to_trunk,
)
from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.errors import ConfigError, DamagedInput, MissingInput, UnknownName
from mmfoundry.pipeline.json_file import read_json

_QKV = ("q_proj", "k_proj", "v_proj")  # the order in which open_clip stacks them

# Ours -> theirs, of whatever is only renamed; a projection is transposed as well
_PLAIN = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_model.head.weight": "text_projection.weight",
    "text_model.head.bias": "text_projection.bias",
    "logit_scale": "logit_scale",
    "logit_bias": "logit_bias",
}
_TRANSPOSED = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}
_LAYER = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
# What plain CLIPs have, which their configs need not say
_LEFT_OUT: dict[str, Any] = {
    "pool_type": None,
    "no_causal_mask": False,
    "proj_type": "linear",
    "proj_bias": False,
    "norm_kwargs": {"eps": 1e-5},
    "act_kwargs": {"approximate": "none"},
    "hf_tokenizer_name": None,
    "tokenizer_kwargs": None,
}
_TOWERS = {
    "vision_model.encoder.layers": "visual.transformer.resblocks",
    "text_model.encoder.layers": "transformer.resblocks",
}


def to_open_clip_config(config: ClipConfig) -> dict[str, Any]:
    """open_clip's `open_clip_config.json` for one of our models: `model_cfg` and `preprocess_cfg`.

    Raises:
        ConfigError: it is a SigLIP of sizes for which open_clip has no vision tower.
    """
    model_cfg = config.model_dump(mode="json", exclude={"preprocess_cfg", "max_logit_scale"})
    for name in ("vision_cfg", "text_cfg"):
        model_cfg[name] = {key: value for key, value in model_cfg[name].items() if value != _LEFT_OUT.get(key, ...)}
    if config.vision_cfg.pool_type == "map":
        model_cfg |= {"custom_text": True, "vision_cfg": timm_vision_cfg(config.vision_cfg)}
    if config.init_logit_bias is None:
        del model_cfg["init_logit_bias"]
    if not config.quick_gelu:
        del model_cfg["quick_gelu"]
    preprocess = config.preprocess_cfg.model_dump(mode="json")
    return {"model_cfg": model_cfg, "preprocess_cfg": preprocess}


def from_open_clip_config(
    model_cfg: Mapping[str, Any], preprocess_cfg: Mapping[str, Any] | None = None, source: str = "open_clip config"
) -> ClipConfig:
    """Our config for one of open_clip's.

    Args:
        model_cfg: as in open_clip's model configs.
        preprocess_cfg: its `mean`, `std` and `resize_mode` are read, if they are there.
        source: named in errors.

    Raises:
        ConfigError: the config asks for something that our CLIP does not have; the key is named.
    """
    keys = ("mean", "std", "resize_mode")
    preprocess = {key: value for key, value in (preprocess_cfg or {}).items() if key in keys}
    tree = {"preprocess_cfg": preprocess, **model_cfg}
    custom, text = tree.pop("custom_text", False), tree.get("text_cfg", {})
    if text.get("hf_tokenizer_name"):
        tree["text_cfg"] = {"tokenizer_kwargs": {}, **text}  # its default is to mend white space
    if custom and (tower := timm_tower(model_cfg.get("vision_cfg", {}), source)) is not None:
        tree |= {"vision_cfg": tower, "preprocess_cfg": SIGLIP_PREPROCESS | preprocess}
    elif custom:
        raise ConfigError(f"{source}: custom_text models are another class of open_clip, which is not supported")
    return parse(ClipConfig, tree, source=source)


def named_config(name: str) -> ClipConfig:
    """The config of one of open_clip's models by its name, e.g. ViT-B-32; read from its files, without importing it.

    Raises:
        UnknownName: open_clip has none of this name; the nearest is said.
        ConfigError: it asks for something that our CLIP does not have; the key is named.
    """
    return from_open_clip_config(named_model_cfg(name), source=f"open_clip's {name}")


def model_cfg_file(path: str | Path) -> dict[str, Any]:
    """Read a JSON file of open_clip's model keys, as `open_clip.add_model_config` takes, or an `open_clip_config.json`.

    Raises:
        ConfigError: it is not there, or not a JSON object.
    """
    try:
        found = read_json(Path(path))
    except MissingInput as error:
        raise ConfigError(f"{error}; open_clip's names have no .json at their end") from error
    except DamagedInput as error:  # a ConfigError, so that a validator's is reported with the key's dotted path
        raise ConfigError(str(error)) from error
    if not isinstance(found.get("model_cfg", found), dict):
        raise ConfigError(f"{path}: not a model config of open_clip, which is an object")
    return found


def named_model_cfg(name: str) -> dict[str, Any]:
    """open_clip's own config of one of its models; see `named_config`.

    Raises:
        UnknownName: open_clip has none of this name; the nearest is said.
    """
    spec = importlib.util.find_spec("open_clip")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = {file.stem: file for folder in folders for file in sorted(Path(folder, "model_configs").glob("*.json"))}
    if name not in files:
        near = difflib.get_close_matches(name, files, n=3)
        raise UnknownName(f"open_clip has no model {name!r}; near: {', '.join(near) or 'none'}")
    return read_json(files[name])


def to_open_clip_state(model: CLIP) -> dict[str, Tensor]:
    """Our weights as open_clip's `CLIP` loads them, with the inverse temperature as it acts: held at its limit."""
    ours = acting_state(model)
    if model.config.vision_cfg.pool_type == "map":
        text = _to_plain(model, {name: each for name, each in ours.items() if name.startswith("text_")})
        logits = {name: ours[name].clone() for name in ("logit_scale", "logit_bias") if name in ours}
        return {f"text.{name}": value for name, value in text.items()} | to_trunk(ours) | logits
    return _to_plain(model, ours)


def _to_plain(model: CLIP, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights, or those of one tower, under the names of open_clip's `CLIP`."""
    theirs = {_PLAIN[name]: value.clone() for name, value in ours.items() if name in _PLAIN}
    theirs |= {_TRANSPOSED[name]: value.T.contiguous() for name, value in ours.items() if name in _TRANSPOSED}
    for our_tower, their_tower in _TOWERS.items():
        if not any(name.startswith(our_tower) for name in ours):
            continue
        for index in range(len(model.get_submodule(our_tower))):  # type: ignore[arg-type]  # a ModuleList has a length
            our_layer, their_layer = f"{our_tower}.{index}", f"{their_tower}.{index}"
            for kind in ("weight", "bias"):
                parts = [ours[f"{our_layer}.self_attn.{name}.{kind}"] for name in _QKV]
                theirs[f"{their_layer}.attn.in_proj_{kind}"] = torch.cat(parts)
                for our_name, their_name in _LAYER.items():
                    theirs[f"{their_layer}.{their_name}.{kind}"] = ours[f"{our_layer}.{our_name}.{kind}"].clone()
    return theirs


def from_open_clip(
    model_cfg: Mapping[str, Any],
    state: Mapping[str, Tensor],
    preprocess_cfg: Mapping[str, Any] | None = None,
    source: str = "open_clip checkpoint",
) -> CLIP:
    """Build our model from open_clip's config and weights; in evaluation mode, the weights copied.

    Args:
        model_cfg: as in open_clip's model configs.
        state: the state dict of open_clip's `CLIP`.
        preprocess_cfg: see `from_open_clip_config`.
        source: named in errors.

    Raises:
        ConfigError: see `from_open_clip_config`.
        DamagedInput: a weight is unknown, missing, or of another shape than the config says.
    """
    custom = model_cfg.get("custom_text", False)
    trunk = from_trunk(state, source) if custom else {}
    if custom:
        state = {name.removeprefix("text."): value for name, value in state.items() if not name.startswith("visual.")}
    renamed = {theirs: ours for ours, theirs in _PLAIN.items()}
    transposed = {theirs: ours for ours, theirs in _TRANSPOSED.items()}
    ours: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in renamed:
            ours[renamed[name]] = value.detach().clone()
        elif name in transposed:
            ours[transposed[name]] = value.detach().T.contiguous()
        elif name != "attn_mask":  # a buffer in old checkpoints
            ours |= _from_layer(name, value.detach(), source)
    ours |= trunk
    config = from_open_clip_config(model_cfg, preprocess_cfg, source)
    if "logit_bias" in ours and config.init_logit_bias is None:
        config = config.model_copy(update={"init_logit_bias": float(ours["logit_bias"])})
    for name in ("logit_scale", "logit_bias"):
        if name in ours:
            ours[name] = ours[name].reshape(())  # some checkpoints hold one value in a vector
    return build(config, ours, source)


def _from_layer(name: str, value: Tensor, source: str) -> dict[str, Tensor]:
    """A weight of one of open_clip's blocks, under our names."""
    towers = {theirs: ours for ours, theirs in _TOWERS.items()}
    match = re.fullmatch(r"(.*resblocks)\.(\d+)\.(.+?)[._](weight|bias)", name)
    if match and match[1] in towers:
        layer = f"{towers[match[1]]}.{match[2]}"
        if match[3] == "attn.in_proj":
            parts = zip(_QKV, value.chunk(3), strict=True)
            return {f"{layer}.self_attn.{ours}.{match[4]}": part.clone() for ours, part in parts}
        for ours, theirs in _LAYER.items():
            if match[3] == theirs:
                return {f"{layer}.{ours}.{match[4]}": value.clone()}
    raise DamagedInput(f"{source}: {name} is not a weight of open_clip's plain CLIP")
