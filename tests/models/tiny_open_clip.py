"""open_clip models small enough to test with, which our own towers cannot express."""

from __future__ import annotations

from typing import Any

from mmfoundry.models.open_clip_model import OpenClipConfig

CONTEXT = 9


def model_cfg(kind: str, vocab_size: int = 50, context_length: int = CONTEXT) -> dict[str, Any]:
    """open_clip's config of one of `KINDS`."""
    text: dict[str, Any] = {"context_length": context_length, "vocab_size": vocab_size, "width": 16, "heads": 2}
    text["layers"] = 2
    vision: dict[str, Any] = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8}
    tree: dict[str, Any] = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    if kind == "resnet":
        vision |= {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "patch_size": None}
    elif kind == "convnext":
        tree["vision_cfg"] = {"timm_model_name": "convnext_atto", "image_size": 32, "timm_pool": "avg"}
        tree |= {"custom_text": True, "init_logit_bias": -10.0}
    elif kind == "siglip":  # without its tokenizer
        text |= {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
        vision |= {"pool_type": "avg", "final_ln_after_pool": True}
        tree |= {"custom_text": True, "init_logit_bias": -10.0}
    else:
        assert kind == "coca"
        pool = {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 3, "output_tokens": True}
        vision |= pool
        text |= {"embed_cls": True, "output_tokens": True}
        tree["multimodal_cfg"] = {"context_length": context_length, "width": 16, "heads": 2, "layers": 2}
        tree["custom_text"] = True
    return tree


KINDS = ("resnet", "convnext", "siglip", "coca")


def config(kind: str, **changes: Any) -> OpenClipConfig:
    return OpenClipConfig.model_validate({"open_clip": model_cfg(kind), **changes})
