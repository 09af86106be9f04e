"""Every patch becomes a token, through two layers (Liu et al. 2023, arXiv 2310.03744)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mmfoundry.models.connectors import CONNECTORS, ConnectorConfig


@CONNECTORS.register("mlp")
class Mlp(nn.Module):
    """LLaVA 1.5's projector: two layers with a GELU between, over all patches.

    Parameters are named and shaped as in transformers' `LlavaMultiModalProjector`.
    """

    def __init__(self, config: ConnectorConfig, *, patches: int, vision_width: int, text_width: int):
        super().__init__()
        if config.downsample_factor != 1:
            raise ValueError("the mlp connector keeps every patch: set downsample_factor to 1, or use pixel_shuffle")
        if config.hidden_width not in (None, text_width):
            raise ValueError("the mlp connector's hidden_width is the language model's width; leave it out")
        self.tokens = patches
        self.linear_1 = nn.Linear(vision_width, text_width)
        self.linear_2 = nn.Linear(text_width, text_width)

    def forward(self, patches: Tensor) -> Tensor:
        """(n, patches, vision width) to (n, patches, text width)."""
        return self.linear_2(F.gelu(self.linear_1(patches)))
