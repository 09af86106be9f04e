"""The text tower of a CLIP: a causal transformer read at the end-of-text token (Radford et al. 2021)."""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmfoundry.models.transformer import Encoder
from mmfoundry.pipeline.config import Config

# Shape suffixes: b = batch, L = positions of a caption, D = width of the tower


class TextConfig(Config):
    """A causal text transformer, in open_clip's keys."""

    context_length: int = Field(77, ge=2, description="longest caption, tokens, start and end tokens counted")
    vocab_size: int = Field(49408, ge=3, description="number of token ids; the highest is the end-of-text token")
    width: int = Field(512, ge=1, description="width of the tower")
    heads: int = Field(8, ge=1, description="number of attention heads; divides width")
    layers: int = Field(12, ge=1, description="number of transformer blocks")
    mlp_ratio: float = Field(4.0, gt=0, description="hidden width of a block's MLP over width")

    @model_validator(mode="after")
    def _divides(self) -> TextConfig:
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} do not divide width {self.width}")
        return self


class TextEmbeddings(nn.Module):
    """Token ids to vectors, learnt positions added."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.context_length, config.width)

    def forward(self, tokens_bL: Tensor) -> Tensor:
        """Embed token ids; (b, L, D)."""
        position_L = torch.arange(tokens_bL.shape[1], device=tokens_bL.device)
        return self.token_embedding(tokens_bL) + self.position_embedding(position_L)


class TextTower(nn.Module):
    """transformers' CLIPTextModel, parameter for parameter."""

    def __init__(self, config: TextConfig, *, quick_gelu: bool = False):
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config.width, config.heads, config.layers, config.mlp_ratio, quick_gelu)
        self.final_layer_norm = nn.LayerNorm(config.width)

    def forward(self, tokens_bL: Tensor) -> Tensor:
        """The end-of-text position after the last block and norm.

        Args:
            tokens_bL: integer ids, at most context_length of them a row; what follows the end of text is ignored.

        Returns:
            (b, D); not projected, not L2-normalised.

        Raises:
            ValueError: the captions are longer than the tower's context.
        """
        length, limit = tokens_bL.shape[1], self.config.context_length
        if length > limit:
            raise ValueError(f"captions of {length} tokens, but context_length is {limit}")
        if tokens_bL.device.type == "cpu":  # on a GPU the length would have to be waited for: the loader trims there
            tokens_bL = trim(tokens_bL)
        hidden_bLD = self.encoder.pooled(self.embeddings(tokens_bL), end_of_text(tokens_bL), is_causal=True)
        return self.final_layer_norm(hidden_bLD)


def end_of_text(tokens_bL: Tensor) -> Tensor:
    """Position of the end-of-text token: the first place of the highest id, as open_clip and OpenAI have it; (b,)."""
    return tokens_bL.argmax(dim=-1)


def trim(tokens_bL: Tensor) -> Tensor:
    """Cut a batch behind its longest caption.

    Under a causal mask, read at the end of text, the positions behind it change neither features nor gradients.
    """
    return tokens_bL[:, : int(end_of_text(tokens_bL).max()) + 1] if len(tokens_bL) else tokens_bL
