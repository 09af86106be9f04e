"""SigLIP's vision tower to and from open_clip, where it is one of timm's, known by its name.

open_clip's config names the tower (`timm_model_name: vit_base_patch16_siglip_224`), so its sizes are asked of timm.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mmfoundry.models.interop.build import ratio_of
from mmfoundry.models.vision import VisionConfig
from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.errors import ConfigError, DamagedInput
from mmfoundry.pipeline.torchvision_ops import declare_missing_ops

SIGLIP_PREPROCESS: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "resize_mode": "squash"}
_NAME = re.compile(r"vit_\w+_patch(\d+)_siglip_(\d+)")
# How open_clip's configs put SigLIP's tower together; what else they may say
_HOW = {"timm_pool": "map", "timm_proj": "none"}
_KNOWN = {*_HOW, "timm_model_name", "timm_model_pretrained", "image_size", "patch_dropout"}
_TRUNK = "visual.trunk."
_OURS = "vision_model."
# Ours -> theirs
_PLAIN = {
    "embeddings.patch_embedding.weight": "patch_embed.proj.weight",
    "embeddings.patch_embedding.bias": "patch_embed.proj.bias",
    "post_layernorm.weight": "norm.weight",
    "post_layernorm.bias": "norm.bias",
    "head.probe": "attn_pool.latent",
    "head.layernorm.weight": "attn_pool.norm.weight",
    "head.layernorm.bias": "attn_pool.norm.bias",
    **{f"head.attention.out_proj.{kind}": f"attn_pool.proj.{kind}" for kind in ("weight", "bias")},
    **{f"head.mlp.{fc}.{kind}": f"attn_pool.mlp.{fc}.{kind}" for fc in ("fc1", "fc2") for kind in ("weight", "bias")},
}
_LAYER = {
    "self_attn.out_proj": "attn.proj",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_QKV = ("q_proj", "k_proj", "v_proj")
_POSITIONS = ("embeddings.position_embedding.weight", "pos_embed")


def timm_tower(vision_cfg: Mapping[str, Any], source: str) -> dict[str, Any] | None:
    """Our `vision_cfg` for one of open_clip's that names a SigLIP tower of timm's; None where it names none.

    Raises:
        ConfigError: it is put together in another way, or timm has no such tower.
    """
    name = str(vision_cfg.get("timm_model_name", ""))
    if not _NAME.fullmatch(name):
        return None
    for key, value in vision_cfg.items():
        if key not in _KNOWN or value != _HOW.get(key, value):
            raise ConfigError(f"{source}: vision_cfg.{key}: {value!r} is not how SigLIP's towers are put together")
    said = {key: vision_cfg[key] for key in ("image_size", "patch_dropout") if key in vision_cfg}
    tower = _sizes(name, source)
    if said.get("image_size", tower["image_size"]) != tower["image_size"]:
        raise ConfigError(f"{source}: vision_cfg.image_size is not the one of {name}, {tower['image_size']}")
    return {**tower, **said}


def timm_vision_cfg(config: VisionConfig) -> dict[str, Any]:
    """open_clip's `vision_cfg` for one of our towers with attention pooling.

    Raises:
        ConfigError: timm has none of these sizes, activation and eps.
    """
    declare_missing_ops()  # timm imports torchvision
    import timm

    wanted = config.model_copy(update={"patch_dropout": 0.0})
    for name in timm.list_models(f"vit_*_patch{config.patch_size}_siglip_{config.image_size}"):
        found = parse(VisionConfig, _sizes(name, name), source=name)
        same = wanted.model_copy(update={"mlp_ratio": found.mlp_ratio})
        if same == found and wanted.mlp_hidden == found.mlp_hidden:
            dropped = {"patch_dropout": config.patch_dropout} if config.patch_dropout else {}
            return {
                "image_size": config.image_size,
                "timm_model_name": name,
                "timm_model_pretrained": False,
                **_HOW,
                **dropped,
            }
    raise ConfigError(
        f"vision_cfg: timm, and so open_clip, has no SigLIP tower with {config.layers} layers of width {config.width}, "
        f"pictures of {config.image_size} pixels, patches of {config.patch_size}, GELU approximation "
        f"{config.act_kwargs.approximate!r}; transformers has (release: clip_formats: [transformers])"
    )


@lru_cache(maxsize=32)
def _sizes(name: str, source: str) -> dict[str, Any]:
    """Our config of one of timm's towers, read off a model without weights."""
    declare_missing_ops()  # timm imports torchvision
    import timm
    from timm.layers.activations import GELUTanh
    from timm.layers.attention_pool import AttentionPoolLatent

    if not timm.is_model(name):
        raise ConfigError(f"{source}: timm has no {name}; it may be too old: pip install -U timm")
    with torch.device("meta"):
        tower: Any = timm.create_model(name, num_classes=0, global_pool="map")
    assert isinstance(tower.attn_pool, AttentionPoolLatent)
    block = tower.blocks[0]
    width, hidden = tower.embed_dim, block.mlp.fc1.out_features
    tanh = isinstance(block.mlp.act, GELUTanh) or getattr(block.mlp.act, "approximate", "none") == "tanh"
    return {
        "image_size": tower.patch_embed.img_size[0],
        "patch_size": tower.patch_embed.patch_size[0],
        "width": width,
        "layers": len(tower.blocks),
        "head_width": width // block.attn.num_heads,
        "mlp_ratio": ratio_of(hidden, width),
        "pool_type": "map",
        "norm_kwargs": {"eps": tower.norm.eps},
        "act_kwargs": {"approximate": "tanh" if tanh else "none"},
    }


def to_trunk(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The vision tower's weights as open_clip's `CustomTextCLIP` with a SigLIP tower of timm's has them."""
    tower = {name.removeprefix(_OURS): value for name, value in ours.items() if name.startswith(_OURS)}
    theirs = {_PLAIN[name]: value.clone() for name, value in tower.items() if name in _PLAIN}
    theirs[_POSITIONS[1]] = tower[_POSITIONS[0]].clone()[None]
    width = len(tower["post_layernorm.weight"])
    for kind in ("weight", "bias"):
        query, key_value = tower[f"head.attention.in_proj_{kind}"].split([width, 2 * width])
        theirs |= {f"attn_pool.q.{kind}": query.clone(), f"attn_pool.kv.{kind}": key_value.clone()}
        index = 0
        while (layer := f"encoder.layers.{index}") + ".layer_norm1.weight" in tower:
            parts = [tower[f"{layer}.self_attn.{name}.{kind}"] for name in _QKV]
            theirs[f"blocks.{index}.attn.qkv.{kind}"] = torch.cat(parts)
            for our_name, their_name in _LAYER.items():
                theirs[f"blocks.{index}.{their_name}.{kind}"] = tower[f"{layer}.{our_name}.{kind}"].clone()
            index += 1
    return {_TRUNK + name: value for name, value in theirs.items()}


def from_trunk(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The vision tower's weights under our names; those of other parts are left out.

    Raises:
        DamagedInput: a weight of the vision tower is unknown, or half of a pair is missing.
    """
    renamed = {theirs: ours for ours, theirs in _PLAIN.items()}
    ours: dict[str, Tensor] = {}
    for full, value in state.items():
        name = full.removeprefix(_TRUNK)
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)
        if not full.startswith("visual."):
            continue
        if name in renamed:
            ours[renamed[name]] = value.detach().clone()
        elif name == _POSITIONS[1]:
            ours[_POSITIONS[0]] = value.detach()[0].clone()
        elif pooled := re.fullmatch(r"attn_pool\.q\.(weight|bias)", name):
            other = state.get(f"{_TRUNK}attn_pool.kv.{pooled[1]}")
            if other is None:
                raise DamagedInput(f"{source}: {_TRUNK}attn_pool.kv.{pooled[1]} is missing")
            ours[f"head.attention.in_proj_{pooled[1]}"] = torch.cat([value.detach(), other.detach()])
        elif block:
            ours |= _from_block(f"encoder.layers.{block[1]}", block[2], block[3], value.detach(), f"{source}: {full}")
        elif not name.startswith("attn_pool.kv."):
            raise DamagedInput(f"{source}: {full} is not a weight of a SigLIP tower of timm's")
    return {_OURS + name: value for name, value in ours.items()}


def _from_block(layer: str, part: str, kind: str, value: Tensor, source: str) -> dict[str, Tensor]:
    if part == "attn.qkv":
        parts = zip(_QKV, value.chunk(3), strict=True)
        return {f"{layer}.self_attn.{name}.{kind}": each.clone() for name, each in parts}
    for ours, theirs in _LAYER.items():
        if part == theirs:
            return {f"{layer}.{ours}.{kind}": value.clone()}
    raise DamagedInput(f"{source} is not a weight of a SigLIP tower of timm's")
