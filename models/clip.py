"""CLIP: two towers, one embedding space (Radford et al. 2021, arXiv 2103.00020); SigLIP is one with other towers.

Configs use open_clip's keys; module and parameter names are those of transformers' `CLIPModel` and `SiglipModel`, so
that their checkpoints load by name and adapters made on one load on the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmfoundry.models.initialise import init_text_tower, init_vision_tower
from mmfoundry.models.text import TextConfig, TextTower
from mmfoundry.models.vision import VisionConfig, VisionTower, to_pixels
from mmfoundry.pipeline.config import Config

# Shape suffixes: b = pairs on this rank, L = positions of a caption, D = width of the joint embedding


class PreprocessConfig(Config):
    """How pixels become the vision tower's input, in open_clip's keys."""

    mean: tuple[float, float, float] = Field(
        (0.48145466, 0.4578275, 0.40821073), description="mean of each channel, pixels in 0..1; OpenAI's by default"
    )
    std: tuple[float, float, float] = Field(
        (0.26862954, 0.26130258, 0.27577711), description="standard deviation of each channel, pixels in 0..1"
    )
    resize_mode: Literal["shortest", "squash"] = Field(
        "shortest",
        description="how evaluations fit a picture: shortest: the shortest side, then the centre square; squash: "
        "both sides, as SigLIP; training draws a crop and squashes that",
    )


class ClipConfig(Config):
    """A CLIP, in the keys of open_clip's model configs."""

    embed_dim: int = Field(512, ge=1, description="width of the joint embedding")
    vision_cfg: VisionConfig = Field(default_factory=VisionConfig, description="vision tower")
    text_cfg: TextConfig = Field(default_factory=TextConfig, description="text tower")
    preprocess_cfg: PreprocessConfig = Field(default_factory=PreprocessConfig, description="pixel normalisation")
    quick_gelu: bool = Field(False, description="x * sigmoid(1.702 x), as OpenAI trained, in place of the exact GELU")
    init_logit_scale: float = Field(
        math.log(1 / 0.07), description="natural logarithm of the inverse temperature at the start"
    )
    init_logit_bias: float | None = Field(
        None, description="added to every logit, at the start (SigLIP: -10); None: the model has no bias"
    )
    max_logit_scale: float | None = Field(
        100.0, gt=0, description="the inverse temperature is held at or below this; None: not held"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> ClipConfig:
        if self.vision_cfg.pool_type == "map" and self.vision_cfg.width != self.embed_dim:
            raise ValueError(
                f"embed_dim {self.embed_dim} is not vision_cfg.width {self.vision_cfg.width}: where pool_type is map, "
                "nothing is projected behind it"
            )
        if self.text_cfg.proj_type == "none" and self.text_cfg.width != self.embed_dim:
            raise ValueError(
                f"text_cfg.proj_type is none, but width {self.text_cfg.width} is not embed_dim {self.embed_dim}"
            )
        if self.quick_gelu and "tanh" in (self.vision_cfg.act_kwargs.approximate, self.text_cfg.act_kwargs.approximate):
            raise ValueError("quick_gelu and act_kwargs.approximate are two activations: leave one out")
        return self


class ClipOutput(NamedTuple):
    """What a contrastive objective reads. A tuple, because ZeRO-3 looks for a module's outputs in those only.

    Attributes:
        image_bD: L2-normalised picture embeddings, at least fp32.
        text_bD: L2-normalised caption embeddings, paired with `image_bD` row by row.
        scale: (), inverse temperature; multiplies the cosines.
        bias: (), added to the logits; None where the model has none.
    """

    image_bD: Tensor  # noqa: N815  (shape suffix)
    text_bD: Tensor  # noqa: N815
    scale: Tensor
    bias: Tensor | None = None


class CLIP(nn.Module):
    """A CLIP with transformers' parameter names.

    A projection is None where its tower has a head of its own, as SigLIP's do, or nothing behind its last norm.
    """

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.config = config
        vision, text, width = config.vision_cfg, config.text_cfg, config.embed_dim
        self.text_model = TextTower(text, embed_dim=width, quick_gelu=config.quick_gelu)
        self.vision_model = VisionTower(vision, quick_gelu=config.quick_gelu)
        self.visual_projection = nn.Linear(vision.width, width, bias=False) if vision.pool_type == "tok" else None
        plain = text.proj_type == "linear" and not text.proj_bias
        self.text_projection = nn.Linear(text.width, width, bias=False) if plain else None
        self.logit_scale = nn.Parameter(torch.tensor(config.init_logit_scale))
        self.logit_bias: nn.Parameter | None = None
        if config.init_logit_bias is not None:
            self.logit_bias = nn.Parameter(torch.tensor(config.init_logit_bias))
        init_vision_tower(self.vision_model, self.visual_projection)
        init_text_tower(self.text_model, self.text_projection)

    @classmethod
    def from_seed(cls, config: ClipConfig, seed: int) -> CLIP:
        """An untrained model: the same weights for the same seed, the caller's random state left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(config)

    def forward(self, batch: Mapping[str, Any]) -> ClipOutput:
        """Embed a batch of pairs.

        Args:
            batch: `image`, (b, 3, side, side), uint8; `text`, (b, L), integer token ids.
        """
        return ClipOutput(
            image_bD=self.encode_image(self.pixels(batch["image"])),
            text_bD=self.encode_text(batch["text"]),
            scale=self.scale(),
            bias=None if self.logit_bias is None else at_least_fp32(self.logit_bias),
        )

    def pixels(self, images: Tensor) -> Tensor:
        """Normalise (b, 3, side, side) uint8 pictures as this model wants them, in its dtype."""
        preprocess = self.config.preprocess_cfg
        dtype = self.vision_model.embeddings.patch_embedding.weight.dtype
        return to_pixels(images, preprocess.mean, preprocess.std).to(dtype)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Embed normalised float pixels (b, 3, side, side); (b, D), L2-normalised, at least fp32."""
        return _embedding(self.vision_model(pixels), self.visual_projection)

    def encode_text(self, tokens_bL: Tensor) -> Tensor:
        """Embed token ids (b, L); (b, D), L2-normalised, at least fp32."""
        return _embedding(self.text_model(tokens_bL), self.text_projection)

    def vision_tokens(self, pixels: Tensor, layer: int = -1) -> Tensor:
        """Patch vectors (b, patches, width) of the vision tower after a block; see `VisionTower.tokens`."""
        return self.vision_model.tokens(pixels, layer)

    def scale(self) -> Tensor:
        """The inverse temperature, (), at least fp32, held at `config.max_logit_scale`.

        Held here and not in the parameter: an optimizer that keeps an fp32 copy would undo a clamp on the parameter.
        """
        return inverse_temperature(self.logit_scale, self.config.max_logit_scale)

    def repeated_blocks(self) -> list[nn.Module]:
        """The layers of both towers: what can be compiled or computed twice one by one."""
        return [*self.vision_model.encoder.blocks(), *self.text_model.encoder.blocks()]

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that should not decay: norms, biases, positions, class token or probe, scale."""
        embeddings = (self.vision_model.embeddings, self.text_model.embeddings)
        spared = {id(each.position_embedding.weight) for each in embeddings}
        if self.vision_model.head is not None:
            spared.add(id(self.vision_model.head.probe))
        return {name for name, each in self.named_parameters() if each.ndim < 2 or id(each) in spared}


def _embedding(pooled: Tensor, projection: nn.Linear | None) -> Tensor:
    """A tower's output in the joint space, L2-normalised, at least fp32."""
    return F.normalize(at_least_fp32(pooled if projection is None else projection(pooled)), dim=-1)


def inverse_temperature(logit_scale: Tensor, limit: float | None) -> Tensor:
    """The exponential of its stored logarithm, at least fp32, held at `limit`; None: not held."""
    log_scale = at_least_fp32(logit_scale)
    if limit is not None:
        log_scale = log_scale.clamp(max=math.log(limit))
    return log_scale.exp()


def at_least_fp32(x: Tensor) -> Tensor:
    """Widen 16-bit values to fp32; wider ones stay as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
