"""The vision tower of a CLIP: a ViT with a class token (Dosovitskiy et al. 2020, arXiv 2010.11929)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmfoundry.models.transformer import Encoder
from mmfoundry.pipeline.config import Config

# Shape suffixes: b = batch, n = patches, t = n + 1 positions (class token first), D = width of the tower, c = channel


class VisionConfig(Config):
    """A ViT, in open_clip's keys."""

    image_size: int = Field(224, ge=1, description="side of the square input, pixels")
    patch_size: int = Field(16, ge=1, description="side of a square patch, pixels; divides image_size")
    width: int = Field(768, ge=1, description="width of the tower")
    layers: int = Field(12, ge=1, description="number of transformer blocks")
    head_width: int = Field(64, ge=1, description="width of an attention head; divides width")
    mlp_ratio: float = Field(4.0, gt=0, description="hidden width of a block's MLP over width")
    patch_dropout: float = Field(
        0.0, ge=0, lt=1, description="share of each picture's patches that is left out in training; FLIP: 0.5 to 0.75"
    )

    @model_validator(mode="after")
    def _divides(self) -> VisionConfig:
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size {self.patch_size} does not divide image_size {self.image_size}")
        if self.width % self.head_width:
            raise ValueError(f"head_width {self.head_width} does not divide width {self.width}")
        return self

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return self.width // self.head_width

    @property
    def num_patches(self) -> int:
        """Number of patches in an image, the class token not counted."""
        return (self.image_size // self.patch_size) ** 2


class VisionEmbeddings(nn.Module):
    """Pixels to patch vectors, the class token before them, learnt positions added."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.class_embedding = nn.Parameter(torch.empty(config.width))
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size, bias=False)
        self.position_embedding = nn.Embedding(config.num_patches + 1, config.width)

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed (b, 3, image_size, image_size) float pixels; (b, t, D)."""
        patches_bnD = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        class_b1D = self.class_embedding.expand(len(pixels), 1, -1)
        embedded_btD = torch.cat([class_b1D, patches_bnD], dim=1)
        # Called, not read: a rank that holds a part of the weights only (ZeRO-3) gathers them when a module is called.
        return embedded_btD + self.position_embedding(torch.arange(embedded_btD.shape[1], device=pixels.device))


class VisionTower(nn.Module):
    """transformers' CLIPVisionModel, parameter for parameter."""

    def __init__(self, config: VisionConfig, *, quick_gelu: bool = False):
        super().__init__()
        self.config = config
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.width)  # transformers' spelling, kept because checkpoints have it
        self.encoder = Encoder(config.width, config.heads, config.layers, config.mlp_ratio, quick_gelu)
        self.post_layernorm = nn.LayerNorm(config.width)

    def forward(self, pixels: Tensor) -> Tensor:
        """The class token after the last block and norm.

        Args:
            pixels: (b, 3, image_size, image_size), float, normalised.

        Returns:
            (b, D); not projected, not L2-normalised.

        Raises:
            ValueError: the pictures have another size than the tower.
        """
        hidden_btD = self._embed(pixels, self.config.patch_dropout if self.training else 0.0)
        class_row_b = torch.zeros(len(pixels), dtype=torch.long, device=pixels.device)
        return self.post_layernorm(self.encoder.pooled(hidden_btD, class_row_b))

    def tokens(self, pixels: Tensor, layer: int = -1) -> Tensor:
        """Patch vectors after a block, before `post_layernorm`: transformers' `hidden_states[layer][:, 1:]`.

        Args:
            pixels: as for `forward`.
            layer: counted as transformers counts: 0 is the input of the first block, -1 the output of the last.

        Returns:
            (b, n, D), patches in row-major order.

        Raises:
            ValueError: pictures of another size, or no such layer.
        """
        layers = self.config.layers
        if not -layers - 1 <= layer <= layers:
            raise ValueError(f"layer {layer} is not in -{layers + 1}..{layers}: the tower has {layers} blocks")
        return self.encoder(self._embed(pixels), num_layers=layer % (layers + 1))[:, 1:]

    def _embed(self, pixels: Tensor, dropout: float = 0.0) -> Tensor:
        side = self.config.image_size
        if pixels.shape[1:] != (3, side, side):
            raise ValueError(f"pixels {tuple(pixels.shape)} should be (batch, 3, {side}, {side})")
        embedded_btD = self.embeddings(pixels)
        return self.pre_layrnorm(drop_patches(embedded_btD, dropout) if dropout else embedded_btD)


def drop_patches(x_btD: Tensor, share: float) -> Tensor:
    """Leave out patches at random, others in each picture (FLIP, Li et al. 2023, arXiv 2212.00794, section 3).

    Args:
        x_btD: the class token, which stays, then the patches, their positions added.
        share: of the patches, 0 to below 1; as in open_clip, `max(1, int(patches * (1 - share)))` stay.

    Returns:
        (b, 1 + patches that stay, D), the patches in no particular order.
    """
    rows, positions, width = x_btD.shape
    kept = max(1, int((positions - 1) * (1 - share)))
    chosen_bn = torch.rand(rows, positions - 1, device=x_btD.device).topk(kept, dim=1).indices + 1
    patches_bnD = x_btD.gather(1, chosen_bn[:, :, None].expand(-1, -1, width))
    return torch.cat([x_btD[:, :1], patches_bnD], dim=1)


def to_pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scale uint8 pictures to 0..1 and normalise each channel, on the device that they are on.

    Args:
        images: (b, 3, height, width), uint8, RGB.
        mean: three channel means, in 0..1.
        std: three channel standard deviations, in 0..1.

    Returns:
        float32, same shape.

    Raises:
        ValueError: the pictures are not uint8 (they may have been normalised already).
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images should be uint8, not {images.dtype}")
    # `torch.tensor(..., device=...)` would wait for all that the device has been given to do.
    mean_c11, std_c11 = (torch.tensor(each)[:, None, None].to(images.device, non_blocking=True) for each in (mean, std))
    return images.float().div_(255).sub_(mean_c11).div_(std_c11)
