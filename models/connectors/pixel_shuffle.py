"""Neighbouring patches become the channels of one token (Shi et al. 2016, arXiv 1609.05158, turned round)."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from mmfoundry.models.connectors import CONNECTORS, ConnectorConfig

# Shape suffixes: n = tiles, p = patches of a tile, t = tokens of a tile, C = vision width, D = text width


@CONNECTORS.register("pixel_shuffle")
class PixelShuffle(nn.Module):
    """Pixel shuffle, LayerNorm and a SwiGLU (Shazeer 2020, arXiv 2002.05202), as in Aya Vision (arXiv 2505.08751).

    Parameters are named and shaped as in transformers' `AyaVisionMultiModalProjector`.
    """

    def __init__(self, config: ConnectorConfig, *, patches: int, vision_width: int, text_width: int):
        super().__init__()
        side, factor = math.isqrt(patches), config.downsample_factor
        if side * side != patches or side % factor:
            raise ValueError(f"downsample_factor {factor} does not divide the side of {patches} patches")
        self.factor = factor
        self.tokens = (side // factor) ** 2
        hidden = config.hidden_width or text_width
        self.layernorm = nn.LayerNorm(vision_width * factor**2, eps=1e-6)
        self.linear_1 = nn.Linear(vision_width * factor**2, hidden)
        self.linear_2 = nn.Linear(hidden // 2, text_width)

    def forward(self, patches_npC: Tensor) -> Tensor:
        """(n, p, C), patches in reading order, to (n, t, D), tokens in reading order."""
        n, p, width = patches_npC.shape
        side, d = math.isqrt(p), self.factor
        grid = patches_npC.reshape(n, side // d, d, side // d, d, width).transpose(2, 3)
        value, gate = self.linear_1(self.layernorm(grid.reshape(n, self.tokens, d * d * width))).chunk(2, dim=-1)
        return self.linear_2(F.silu(gate) * value)
