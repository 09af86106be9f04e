"""A CLIP small enough to test with, and batches for it."""

from typing import Any

import torch
from torch import Tensor

from mmfoundry.models.clip import CLIP, ClipConfig

END = 49  # the highest id of the vocabulary ends a caption


def tiny_config(**changes: Any) -> ClipConfig:
    tree: dict[str, Any] = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 24, "layers": 3, "head_width": 8, "mlp_ratio": 2.0},
        "text_cfg": {"context_length": 9, "vocab_size": END + 1, "width": 16, "heads": 2, "layers": 2},
    }
    return ClipConfig.model_validate({**tree, **changes})


def tiny_clip(seed: int = 0, **changes: Any) -> CLIP:
    """Weights with nothing at its neutral value, so that a bias or norm that is lost or swapped shows."""
    model = CLIP.from_seed(tiny_config(**changes), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return model


SIGLIP: dict[str, Any] = {
    "embed_dim": 24,
    "init_logit_bias": -10.0,
    "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"},
    "vision_cfg": {
        "image_size": 16,
        "patch_size": 8,
        "width": 24,
        "layers": 3,
        "head_width": 8,
        "mlp_ratio": 2.0,
        "pool_type": "map",
        "norm_kwargs": {"eps": 1e-6},
        "act_kwargs": {"approximate": "tanh"},
    },
    "text_cfg": {
        "context_length": 9,
        "vocab_size": END + 1,
        "width": 16,
        "heads": 2,
        "layers": 2,
        "no_causal_mask": True,
        "pool_type": "last",
        "proj_bias": True,
        "norm_kwargs": {"eps": 1e-6},
        "act_kwargs": {"approximate": "tanh"},
    },
}


def tiny_siglip(seed: int = 0, **changes: Any) -> CLIP:
    """As `tiny_clip`, with SigLIP's towers."""
    return tiny_clip(seed, **{**SIGLIP, **changes})


def tokens(lengths: list[int], context: int = 9, seed: int = 0) -> Tensor:
    """Captions of these lengths (end token counted), zeros behind."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.zeros(len(lengths), context, dtype=torch.long)
    for row, length in zip(out, lengths, strict=True):
        row[: length - 1] = torch.randint(1, END, (length - 1,), generator=generator)
        row[length - 1] = END
    return out


def pairs(rows: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 8, (rows,), generator=generator).tolist()
    images = torch.randint(0, 256, (rows, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return {"image": images, "text": tokens(lengths, seed=seed)}
