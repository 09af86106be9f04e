"""Connectors: from a vision tower's patches to a language model's input vectors, one file each, chosen by name.

A connector is a class built as `Connector(config, patches=..., vision_width=..., text_width=...)`, a module from
(n, patches, vision_width) to (n, tokens, text_width), with an attribute `tokens`: how many vectors a tile becomes.
"""

from __future__ import annotations

from typing import Protocol

from pydantic import Field
from torch import Tensor, nn

from mmfoundry.pipeline.config import Config
from mmfoundry.pipeline.registry import Registry


class ConnectorConfig(Config):
    """Which connector, and its size."""

    type: str = Field("pixel_shuffle", description="name in the registry: `mmfoundry list connector`")
    downsample_factor: int = Field(
        2, ge=1, description="patches along a side that become one token; 1: every patch is a token"
    )
    hidden_width: int | None = Field(
        None, ge=2, description="width between the two projections; null: the language model's width"
    )


class Connector(Protocol):
    """A class of the registry."""

    def __call__(self, config: ConnectorConfig, *, patches: int, vision_width: int, text_width: int) -> nn.Module:
        """Build it: `patches` is the number a tile gives (a square), the widths are those of its input and output."""
        ...


CONNECTORS: Registry[Connector] = Registry("connector", package="mmfoundry.models.connectors")


class TokenCount(Protocol):
    """What a built connector says of itself."""

    tokens: int

    def __call__(self, patches: Tensor) -> Tensor:
        """(n, patches, vision_width) to (n, tokens, text_width)."""
        ...
