"""The vision tower of a CLIP: a ViT (Dosovitskiy et al. 2020, arXiv 2010.11929) read at a class token, as CLIP's, or by
attention pooling, as SigLIP's (Zhai et al. 2023, arXiv 2303.15343).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmfoundry.models.attention import attention
from mmfoundry.models.transformer import MLP, Activation, ActivationConfig, Encoder, NormConfig, activation_of
from mmfoundry.pipeline.config import Config

# Shape suffixes: b = batch, n = patches, t = positions (the class token first, if there is one), D = width of the
# tower, c = channel, h = heads, d = width of a head


class VisionConfig(Config):
    """A ViT, in open_clip's keys."""

    image_size: int = Field(224, ge=1, description="side of the square input, pixels")
    patch_size: int = Field(
        16, ge=1, description="side of a square patch, pixels; divides image_size, unless pool_type is map"
    )
    width: int = Field(768, ge=1, description="width of the tower")
    layers: int = Field(12, ge=1, description="number of transformer blocks")
    head_width: int = Field(64, ge=1, description="width of an attention head; divides width")
    mlp_ratio: float = Field(4.0, gt=0, description="hidden width of a block's MLP over width")
    patch_dropout: float = Field(
        0.0, ge=0, lt=1, description="share of each picture's patches that is left out in training; FLIP: 0.5 to 0.75"
    )
    pool_type: Literal["tok", "map"] = Field(
        "tok",
        description="tok: CLIP's ViT, read at a class token; map: SigLIP's, read by attention pooling: no class token, "
        "a bias on patches, no norm before the blocks and no projection behind them",
    )
    norm_kwargs: NormConfig = Field(NormConfig(), description="of every LayerNorm")
    act_kwargs: ActivationConfig = Field(ActivationConfig(), description="of every GELU")

    @model_validator(mode="after")
    def _divides(self) -> VisionConfig:
        if self.patch_size > self.image_size:
            raise ValueError(f"patch_size {self.patch_size} is more than image_size {self.image_size}")
        # SigLIP's so400m/14 has pictures of 384 pixels: the last 6 rows and columns are not looked at
        if self.image_size % self.patch_size and self.pool_type == "tok":
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

    @property
    def mlp_hidden(self) -> int:
        """Hidden width of a block's MLP."""
        return int(self.width * self.mlp_ratio)

    @property
    def num_prefix(self) -> int:
        """Positions before the first patch: 1 where there is a class token."""
        return int(self.pool_type == "tok")


class VisionEmbeddings(nn.Module):
    """Pixels to patch vectors, the class token (if the tower has one) before them, learnt positions added."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        prefix = config.num_prefix
        self.class_embedding = nn.Parameter(torch.empty(config.width)) if prefix else None
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size, bias=not prefix)
        self.position_embedding = nn.Embedding(config.num_patches + prefix, config.width)

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed (b, 3, image_size, image_size) float pixels; (b, t, D)."""
        embedded_btD = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        if self.class_embedding is not None:
            class_b1D = self.class_embedding.expand(len(pixels), 1, -1)
            embedded_btD = torch.cat([class_b1D, embedded_btD], dim=1)
        # Called, not read: a rank that holds a part of the weights only (ZeRO-3) gathers them when a module is called.
        return embedded_btD + self.position_embedding(torch.arange(embedded_btD.shape[1], device=pixels.device))


class ProbeAttention(nn.Module):
    """Attention from a few learnt queries, with the fused parameters of PyTorch's `MultiheadAttention`.

    It has none but its own parameters and a module that is called, as sharded parameters (ZeRO-3) need it.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))  # queries, keys, values
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, queries_brD: Tensor, x_btD: Tensor) -> Tensor:
        """Attend from queries to positions; (b, r, D)."""
        width = x_btD.shape[-1]
        query_weight, key_value_weight = self.in_proj_weight.split([width, 2 * width])
        query_bias, key_value_bias = self.in_proj_bias.split([width, 2 * width])
        q_brD = F.linear(queries_brD, query_weight, query_bias)
        k_btD, v_btD = F.linear(x_btD, key_value_weight, key_value_bias).chunk(2, dim=-1)
        split = [each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (q_brD, k_btD, v_btD)]
        return self.out_proj(attention(*split).transpose(1, 2).flatten(2))


class AttentionPooling(nn.Module):
    """SigLIP's head: a learnt probe attends to all positions, then an MLP (MAP; Lee et al. 2019, arXiv 1810.00825).

    transformers' SiglipMultiheadAttentionPoolingHead, parameter for parameter.
    """

    def __init__(self, config: VisionConfig, activation: Activation):
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, config.width))
        self.attention = ProbeAttention(config.width, config.heads)
        self.layernorm = nn.LayerNorm(config.width, config.norm_kwargs.eps)
        self.mlp = MLP(config.width, config.mlp_hidden, activation)

    def forward(self, x_btD: Tensor) -> Tensor:
        """Pool all positions into one vector, (b, D)."""
        pooled_b1D = self.attention(self.probe.expand(len(x_btD), -1, -1), x_btD)
        return (pooled_b1D + self.mlp(self.layernorm(pooled_b1D)))[:, 0]


class VisionTower(nn.Module):
    """transformers' CLIPVisionModel, or SiglipVisionModel where `pool_type` is map, parameter for parameter."""

    def __init__(self, config: VisionConfig, *, quick_gelu: bool = False):
        super().__init__()
        self.config = config
        eps = config.norm_kwargs.eps
        activation = activation_of(quick_gelu, config.act_kwargs)
        self.embeddings = VisionEmbeddings(config)
        # transformers' spelling, kept because checkpoints have it
        self.pre_layrnorm = nn.LayerNorm(config.width, eps) if config.pool_type == "tok" else nn.Identity()
        self.encoder = Encoder(config.width, config.heads, config.layers, config.mlp_hidden, activation, eps)
        self.post_layernorm = nn.LayerNorm(config.width, eps)
        self.head = AttentionPooling(config, activation) if config.pool_type == "map" else None

    def forward(self, pixels: Tensor) -> Tensor:
        """The class token, or all positions pooled by the head, after the last block and norm.

        Args:
            pixels: (b, 3, image_size, image_size), float, normalised.

        Returns:
            (b, D); not projected, not L2-normalised.

        Raises:
            ValueError: the pictures have another size than the tower.
        """
        hidden_btD = self._embed(pixels, self.config.patch_dropout if self.training else 0.0)
        if self.head is not None:
            return self.head(self.post_layernorm(self.encoder(hidden_btD)))
        class_row_b = torch.zeros(len(pixels), dtype=torch.long, device=pixels.device)
        return self.post_layernorm(self.encoder.pooled(hidden_btD, class_row_b))

    def tokens(self, pixels: Tensor, layer: int = -1) -> Tensor:
        """Patch vectors after a block, before `post_layernorm`: transformers' `hidden_states[layer]`, no class token.

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
        return self.encoder(self._embed(pixels), num_layers=layer % (layers + 1))[:, self.config.num_prefix :]

    def _embed(self, pixels: Tensor, dropout: float = 0.0) -> Tensor:
        side = self.config.image_size
        if pixels.shape[1:] != (3, side, side):
            raise ValueError(f"pixels {tuple(pixels.shape)} should be (batch, 3, {side}, {side})")
        embedded_btD = self.embeddings(pixels)
        if dropout:
            embedded_btD = drop_patches(embedded_btD, dropout, self.config.num_prefix)
        return self.pre_layrnorm(embedded_btD)


def drop_patches(x_btD: Tensor, share: float, prefix: int = 1) -> Tensor:
    """Leave out patches at random, others in each picture (FLIP, Li et al. 2023, arXiv 2212.00794, section 3).

    Args:
        x_btD: the class token, which stays, then the patches, their positions added.
        share: of the patches, 0 to below 1; as in open_clip, `max(1, int(patches * (1 - share)))` stay.
        prefix: positions before the first patch: 0 where there is no class token.

    Returns:
        (b, prefix + patches that stay, D), the patches in no particular order.
    """
    rows, positions, width = x_btD.shape
    kept = max(1, int((positions - prefix) * (1 - share)))
    chosen_bn = torch.rand(rows, positions - prefix, device=x_btD.device).topk(kept, dim=1).indices + prefix
    patches_bnD = x_btD.gather(1, chosen_bn[:, :, None].expand(-1, -1, width))
    return torch.cat([x_btD[:, :prefix], patches_bnD], dim=1)


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
