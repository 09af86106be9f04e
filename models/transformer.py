"""The pre-norm transformer that both towers of a CLIP or a SigLIP are made of, named as transformers names it.

Two ways through it: `Encoder.forward` gives every position, `Encoder.pooled` one position a sequence. CLIP reads one
position only (class token, end-of-text token), and of the last layer that position alone depends on nothing but the
keys and values of the others, so `pooled` does the last layer's queries, output projection and MLP for one row
instead of all: the same numbers, about a fifth less work in a tower of four layers.

With a `Packing`, sequences of several lengths lie one after another in (T, D), without padding: everything but the
attention works token by token and does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mmfoundry.models.attention import Packing, attention, varlen_attention
from mmfoundry.pipeline.config import Config

# Shape suffixes: b = batch, t = positions, r = positions whose output is wanted, h = heads, d = width of a head,
# D = width of the tower; packed: T = tokens of all sequences, in place of b and t

Activation = Callable[[Tensor], Tensor]


class NormConfig(Config):
    """What every LayerNorm of a tower is given, in open_clip's keys."""

    eps: float = Field(1e-5, gt=0, description="added to the variance; SigLIP: 1e-6")


class ActivationConfig(Config):
    """What every GELU of a tower is given, in open_clip's keys."""

    approximate: Literal["none", "tanh"] = Field(
        "none", description="none: the exact GELU; tanh: its approximation, as SigLIP was trained"
    )


def quick_gelu(x: Tensor) -> Tensor:
    """`x * sigmoid(1.702 x)`, what OpenAI's checkpoints were trained with."""
    return x * torch.sigmoid(1.702 * x)


def activation_of(quick: bool, config: ActivationConfig) -> Activation:
    """The activation of a tower's MLPs."""
    if quick:
        return quick_gelu
    return F.gelu if config.approximate == "none" else partial(F.gelu, approximate=config.approximate)


class SelfAttention(nn.Module):
    """Multi-head self-attention with four separate projections, so that an adapter can take any one of them.

    The projections are called as modules and never fused by hand: adapters (peft) and parameter sharding (ZeRO-3)
    act when a module is called. One matrix product for all three was measured at 1% of a step on CPU.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(
        self,
        x_btD: Tensor,
        queries_brD: Tensor | None = None,
        *,
        is_causal: bool = False,
        mask: Tensor | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """Attend from `queries_brD` (default: every position of `x_btD`) to `x_btD`; (b, r, D).

        With a packing `x_btD` is (T, D), `queries_brD` (b, D), one a sequence, there is no mask, and what is returned
        has the shape of the queries.
        """
        source_brD = x_btD if queries_brD is None else queries_brD
        if packing is not None:
            q_Thd, k_Thd, v_Thd = (
                projection(source).unflatten(-1, (self.heads, -1))
                for projection, source in ((self.q_proj, source_brD), (self.k_proj, x_btD), (self.v_proj, x_btD))
            )
            return self.out_proj(varlen_attention(q_Thd, k_Thd, v_Thd, packing, is_causal=is_causal).flatten(1))
        mixed_bhrd = attention(
            self._split(self.q_proj(source_brD)),
            self._split(self.k_proj(x_btD)),
            self._split(self.v_proj(x_btD)),
            is_causal=is_causal,
            mask=mask,
        )
        return self.out_proj(mixed_bhrd.transpose(1, 2).flatten(2))

    def _split(self, x_btD: Tensor) -> Tensor:
        return x_btD.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class MLP(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, hidden: int, activation: Activation):
        super().__init__()
        self.activation_fn = activation
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_btD: Tensor) -> Tensor:
        """Apply position by position; same shape as the input."""
        return self.fc2(self.activation_fn(self.fc1(x_btD)))


class EncoderLayer(nn.Module):
    """Pre-norm block: `x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, width: int, heads: int, mlp_hidden: int, activation: Activation, eps: float):
        super().__init__()
        self.self_attn = SelfAttention(width, heads)
        self.layer_norm1 = nn.LayerNorm(width, eps)
        self.mlp = MLP(width, mlp_hidden, activation)
        self.layer_norm2 = nn.LayerNorm(width, eps)

    def forward(
        self,
        x_btD: Tensor,
        *,
        is_causal: bool = False,
        row_b: Tensor | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """Run the block.

        Args:
            x_btD: all positions; (T, D) with a packing.
            is_causal: a position sees itself and earlier ones only.
            row_b: integer; where given, only this position of each sequence is wanted. With a packing, the place of
                each sequence's last token among all.
            packing: where the sequences lie in `x_btD`.

        Returns:
            (b, t, D), or (b, 1, D) where `row_b` is given; with a packing (T, D) and (b, D).
        """
        normed_btD = self.layer_norm1(x_btD)
        if row_b is None:
            x_btD = x_btD + self.self_attn(normed_btD, is_causal=is_causal, packing=packing)
        elif packing is not None:  # the last token sees all of its sequence, under a causal mask, too
            x_btD = x_btD[row_b] + self.self_attn(normed_btD, normed_btD[row_b], packing=packing)
        else:
            mask_b11t = None
            if is_causal:
                position_t = torch.arange(x_btD.shape[1], device=x_btD.device)
                mask_b11t = (position_t <= row_b[:, None])[:, None, None]
            x_btD = take_row(x_btD, row_b) + self.self_attn(normed_btD, take_row(normed_btD, row_b), mask=mask_b11t)
        return x_btD + self.mlp(self.layer_norm2(x_btD))


class Encoder(nn.Module):
    """A stack of blocks."""

    def __init__(self, width: int, heads: int, layers: int, mlp_hidden: int, activation: Activation, eps: float):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(width, heads, mlp_hidden, activation, eps) for _ in range(layers))

    def forward(
        self,
        x_btD: Tensor,
        *,
        is_causal: bool = False,
        num_layers: int | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """Run the first `num_layers` blocks (default: all) on every position; (b, t, D), or (T, D) with a packing."""
        for layer in self.layers[:num_layers]:
            x_btD = layer(x_btD, is_causal=is_causal, packing=packing)
        return x_btD

    def blocks(self) -> Iterator[EncoderLayer]:
        """The layers, first to last, as what they are: a ModuleList tells type checkers only that they are modules."""
        return iter(cast("list[EncoderLayer]", self.layers))

    def pooled(self, x_btD: Tensor, row_b: Tensor, *, is_causal: bool = False) -> Tensor:
        """Run all blocks and give position `row_b` of each sequence; (b, D), what `forward` gives there."""
        if len(self.layers) == 0:
            return take_row(x_btD, row_b)[:, 0]
        x_btD = self(x_btD, is_causal=is_causal, num_layers=len(self.layers) - 1)
        return self.layers[-1](x_btD, is_causal=is_causal, row_b=row_b)[:, 0]

    def last_of_each(self, x_TD: Tensor, packing: Packing, *, is_causal: bool = False) -> Tensor:
        """`pooled` of packed sequences, each read at its last token; (b, D)."""
        row_b = packing.cu_seqlens[1:] - 1
        x_TD = self(x_TD, is_causal=is_causal, num_layers=len(self.layers) - 1, packing=packing)
        return self.layers[-1](x_TD, is_causal=is_causal, row_b=row_b, packing=packing)


def take_row(x_btD: Tensor, row_b: Tensor) -> Tensor:
    """Position `row_b[i]` of sequence i, kept as a sequence of one: (b, 1, D)."""
    return x_btD[torch.arange(len(x_btD), device=x_btD.device), row_b][:, None]
