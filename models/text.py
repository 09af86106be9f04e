"""The text tower of a CLIP: a causal transformer read at the end-of-text token (Radford et al. 2021), or, as SigLIP's,
one that sees all of its fixed length, padding too, and is read at the last position (Zhai et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmfoundry.models.attention import Packing
from mmfoundry.models.transformer import ActivationConfig, Encoder, NormConfig, activation_of
from mmfoundry.pipeline.config import Config

# Shape suffixes: b = batch, L = positions of a caption, D = width of the tower, T = tokens of all captions


class TokenizerConfig(Config):
    """What is done to a caption before `hf_tokenizer_name` reads it, in open_clip's keys."""

    clean: Literal["whitespace", "lower", "canonicalize"] = Field(
        "whitespace",
        description="all mend broken Unicode and HTML escapes; lower: to lower case; canonicalize: no punctuation, too",
    )
    strip_sep_token: bool = Field(
        False, description="0 in place of the token that separates sentences, as CLIPA's towers read captions"
    )


class TextConfig(Config):
    """A text transformer, in open_clip's keys."""

    context_length: int = Field(77, ge=2, description="longest caption, tokens, start and end tokens counted")
    vocab_size: int = Field(49408, ge=3, description="number of token ids; the highest is the end-of-text token")
    width: int = Field(512, ge=1, description="width of the tower")
    heads: int = Field(8, ge=1, description="number of attention heads; divides width")
    layers: int = Field(12, ge=1, description="number of transformer blocks")
    mlp_ratio: float = Field(4.0, gt=0, description="hidden width of a block's MLP over width")
    no_causal_mask: bool = Field(False, description="every position sees all others, padding among them; SigLIP: true")
    pool_type: Literal["argmax", "last"] = Field(
        "argmax", description="what is read: argmax: the end-of-text token; last: the last position, as SigLIP"
    )
    proj_type: Literal["linear", "none"] = Field(
        "linear", description="none: what is read is the embedding, so that width is embed_dim"
    )
    proj_bias: bool = Field(False, description="the projection has a bias, as SigLIP's")
    norm_kwargs: NormConfig = Field(NormConfig(), description="of every LayerNorm")
    act_kwargs: ActivationConfig = Field(ActivationConfig(), description="of every GELU")
    hf_tokenizer_name: str | None = Field(
        None, description="folder or hub id with the files of transformers' tokenizer; null: CLIP's byte-pair encoding"
    )
    tokenizer_kwargs: TokenizerConfig | None = Field(
        None, description="for hf_tokenizer_name; null: captions go to the tokenizer as they are"
    )

    @model_validator(mode="after")
    def _divides(self) -> TextConfig:
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} do not divide width {self.width}")
        if self.hf_tokenizer_name is None and self.tokenizer_kwargs is not None:
            raise ValueError("tokenizer_kwargs is for a tokenizer of transformers: give hf_tokenizer_name")
        if self.proj_bias and self.proj_type == "none":
            raise ValueError("proj_bias is of a projection, but proj_type is none")
        return self

    @property
    def mlp_hidden(self) -> int:
        """Hidden width of a block's MLP."""
        return int(self.width * self.mlp_ratio)

    @property
    def reads_padding(self) -> bool:
        """Whether what follows a caption's end matters, so that captions must not be cut behind it."""
        return self.no_causal_mask or self.pool_type == "last"


class TextEmbeddings(nn.Module):
    """Token ids to vectors, learnt positions added."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.context_length, config.width)

    def forward(self, tokens_bL: Tensor, position_bL: Tensor | None = None) -> Tensor:
        """Embed token ids at these positions, any shape (default: row by row, from 0); that shape and D."""
        if position_bL is None:
            position_bL = torch.arange(tokens_bL.shape[1], device=tokens_bL.device)
        return self.token_embedding(tokens_bL) + self.position_embedding(position_bL)


class TextTower(nn.Module):
    """transformers' CLIPTextModel, or SiglipTextModel where `proj_bias` is set, parameter for parameter."""

    def __init__(self, config: TextConfig, *, embed_dim: int, quick_gelu: bool = False):
        """`embed_dim`: width of the joint embedding, for the projection that has a bias and so is this tower's head."""
        super().__init__()
        self.config = config
        self.groups = 1  # of captions of like length, which go through the tower one group after the other
        self.packed = False  # captions go through the tower one after another, without padding, in place of groups
        eps = config.norm_kwargs.eps
        activation = activation_of(quick_gelu, config.act_kwargs)
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config.width, config.heads, config.layers, config.mlp_hidden, activation, eps)
        self.final_layer_norm = nn.LayerNorm(config.width, eps)
        self.head = nn.Linear(config.width, embed_dim) if config.proj_bias else None

    def forward(self, tokens_bL: Tensor) -> Tensor:
        """The position that is read, after the last block and norm.

        Args:
            tokens_bL: integer ids, at most context_length of them a row; what follows the end of text is ignored,
                unless the tower reads its padding: then each row has context_length of them.

        Returns:
            (b, D), or (b, embed_dim) where the tower has a head; not L2-normalised.

        Raises:
            ValueError: the captions are longer than the tower's context, or shorter and their padding would be read.
        """
        length, limit = tokens_bL.shape[1], self.config.context_length
        if length > limit:
            raise ValueError(f"captions of {length} tokens, but context_length is {limit}")
        if self.config.reads_padding:
            if length < limit:
                raise ValueError(f"captions of {length} tokens, but this tower reads their padding: pad to {limit}")
            return self._read(tokens_bL)
        if self.packed and len(tokens_bL):
            return self._read_packed(tokens_bL)
        if self.groups > 1 and len(tokens_bL) > 1:
            return by_length(self._read, tokens_bL, end_of_text(tokens_bL) + 1, self.groups)
        if tokens_bL.device.type == "cpu":  # on a GPU the length would have to be waited for: the loader trims there
            tokens_bL = trim(tokens_bL)
        return self._read(tokens_bL)

    def trimmed(self, tokens_bL: Tensor) -> Tensor:
        """A batch without the padding that this tower does not read."""
        return tokens_bL if self.config.reads_padding else trim(tokens_bL)

    def _read(self, tokens_bL: Tensor) -> Tensor:
        row_b = end_of_text(tokens_bL)
        if self.config.pool_type == "last":
            row_b = torch.full_like(row_b, tokens_bL.shape[1] - 1)
        causal = not self.config.no_causal_mask
        return self._finished(self.encoder.pooled(self.embeddings(tokens_bL), row_b, is_causal=causal))

    def _finished(self, hidden_bD: Tensor) -> Tensor:
        hidden_bD = self.final_layer_norm(hidden_bD)
        return hidden_bD if self.head is None else self.head(hidden_bD)

    def _read_packed(self, tokens_bL: Tensor) -> Tensor:
        """What `_read` gives, captions laid one after another, shortest first, so that equal lengths are neighbours."""
        lengths_b, order_b = (end_of_text(tokens_bL) + 1).sort(stable=True)
        packing = Packing.of(lengths_b.tolist(), tokens_bL.device)  # waits for the device, if there is one
        row_T = torch.repeat_interleave(lengths_b, output_size=sum(packing.lengths))
        position_T = torch.arange(len(row_T), device=row_T.device) - packing.cu_seqlens[row_T]
        hidden_TD = self.embeddings(tokens_bL[order_b[row_T], position_T], position_T)
        return self._finished(self.encoder.last_of_each(hidden_TD, packing, is_causal=True))[order_b.argsort()]


def end_of_text(tokens_bL: Tensor) -> Tensor:
    """Position of the end-of-text token: the first place of the highest id, as open_clip and OpenAI have it; (b,)."""
    return tokens_bL.argmax(dim=-1)


def by_length(read: Callable[[Tensor], Tensor], tokens_bL: Tensor, lengths_b: Tensor, groups: int) -> Tensor:
    """What a tower reads, captions of like length together, each group cut behind its longest.

    Args:
        read: the tower: (rows, length) to (rows, D).
        tokens_bL: integer ids.
        lengths_b: of each caption, tokens; what follows does not matter.
        groups: how many; see `length_groups`.

    Returns:
        (b, D), in the order of `tokens_bL`.
    """
    order_b = lengths_b.argsort(stable=True)
    parts, start = [], 0
    for rows, length in length_groups(lengths_b.tolist(), groups):  # waits for the device, if there is one
        parts.append(read(tokens_bL[order_b[start : start + rows], :length]))
        start += rows
    return torch.cat(parts)[order_b.argsort()]


def length_groups(lengths: Sequence[int], groups: int) -> list[tuple[int, int]]:
    """Cut captions, sorted by length, into groups such that as few positions as can be are padding.

    The number of groups follows from the number of captions alone, so that ranks with equally many make equally many
    passes, as ZeRO-3 needs.

    Args:
        lengths: of each caption, tokens, in any order.
        groups: how many, at least 1.

    Returns:
        Of each group, shortest captions first, how many there are and how long the longest is.
    """
    groups = min(groups, len(lengths))
    rows = np.bincount(lengths)
    upto = np.cumsum(rows)  # captions of at most this length
    ends = np.flatnonzero(rows)
    # least[i]: fewest positions that hold all captions of length ends[i] or less in the groups so far
    least, before = upto[ends] * ends, []
    for _ in range(groups - 1):
        cost_ij = least[None, :] + (upto[ends][:, None] - upto[ends][None, :]) * ends[:, None]  # cut behind ends[j]
        cost_ij[np.triu_indices(len(ends))] = np.iinfo(np.int64).max  # nothing would be left for the last group
        before.append((cut := cost_ij.argmin(axis=1), better := cost_ij.min(axis=1) < least))
        least = np.where(better, cost_ij[np.arange(len(ends)), cut], least)
    found, index = [], len(ends) - 1
    for cut, better in reversed(before):
        if better[index]:
            found.append((int(upto[ends[index]] - upto[ends[cut[index]]]), int(ends[index])))
            index = int(cut[index])
    found = [(int(upto[ends[index]]), int(ends[index])), *reversed(found)]
    while len(found) < groups:  # fewer lengths than groups: halve the largest
        largest = max(range(len(found)), key=lambda each: found[each][0])
        count, length = found[largest]
        found[largest : largest + 1] = [(count // 2, length), (count - count // 2, length)]
    return found


def trim(tokens_bL: Tensor) -> Tensor:
    """Cut a batch behind its longest caption.

    Under a causal mask, read at the end of text, the positions behind it change neither features nor gradients.
    """
    return tokens_bL[:, : int(end_of_text(tokens_bL).max()) + 1] if len(tokens_bL) else tokens_bL
