"""Teaching a connector the language model's vocabulary before the language model is run at all.

A language model reads its input vectors as words. So the image tokens of a tile are brought to where the words for what
it shows lie: a connector learns in seconds what takes minutes through the whole language model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from mmfoundry.models.vlm import VisionLanguageModel
from mmfoundry.pipeline.distributed import world_in

# Shape suffixes: n = tiles on this rank, t = tokens of a tile, D = width of the language model, C = names


class AlignOutput(NamedTuple):
    """What `AlignmentLoss` reads. A tuple, because ZeRO-3 looks for a module's outputs in those only.

    Attributes:
        tokens_ntD: image tokens of each tile.
        target_n: number of its name.
        names_CD: mean input vector of each name.
    """

    tokens_ntD: Tensor  # noqa: N815  (shape suffix)
    target_n: Tensor
    names_CD: Tensor  # noqa: N815


class Aligner(nn.Module):
    """A vision-language model of which only vision tower and connector are run."""

    def __init__(self, model: VisionLanguageModel, names_CD: Tensor):
        """`names_CD`: see `name_vectors`. Everything but the connector is frozen, in place."""
        super().__init__()
        model.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(True)
        self.vlm = model
        self.names_CD: Tensor
        self.register_buffer("names_CD", names_CD.detach().clone(), persistent=False)

    def forward(self, batch: Mapping[str, Any]) -> AlignOutput:
        """Image tokens of `tiles`, (n, 3, side, side) uint8, beside the names of `target`, (n,)."""
        tokens_ntD = self.vlm.image_tokens(batch["tiles"])
        return AlignOutput(tokens_ntD.float(), batch["target"].long(), self.names_CD)


@torch.no_grad()
def name_vectors(model: VisionLanguageModel, names: Sequence[Sequence[int]]) -> Tensor:
    """The mean input vector of each name, (C, D), fp32.

    Args:
        model: its language model's input vectors are read.
        names: token ids of each.
    """
    embedding = model.model.language_model.get_input_embeddings()
    rows = [embedding(torch.tensor(ids, device=model.device)).float().mean(0) for ids in names]
    return torch.stack(rows)


@dataclass(frozen=True)
class AlignmentLoss:
    """Every token of a tile is to be its name's vector: cross-entropy over all names by cosine, and squared distance.

    Names are told apart by direction; the distance brings the tokens to the scale of words.

    Attributes:
        temperature: the cosines are divided by it.
        distance_weight: of the squared distance, in units of the names' variance.
    """

    temperature: float = 0.05
    distance_weight: float = 1.0

    def __call__(
        self, output: AlignOutput, batch: Mapping[str, Any], group: ProcessGroup | None = None
    ) -> dict[str, Tensor]:
        """Score the tokens, each tile of all ranks alike.

        Returns:
            loss: () its mean over ranks is the joint loss. accuracy: () share of tiles whose own name scores highest,
            taken over the tile's tokens. distance: () squared distance, 1 for tokens that are all the names' mean.
        """
        names_CD, tokens_ntD, target_n = output.names_CD, output.tokens_ntD, output.target_n
        tokens = tokens_ntD.shape[1]
        # What all names have in common tells none of them apart.
        centre_D = names_CD.mean(0)
        centred_CD = names_CD - centre_D
        logits_ntC = F.normalize(tokens_ntD - centre_D, dim=-1) @ F.normalize(centred_CD, dim=-1).T / self.temperature
        total = torch.full((), float(len(target_n)), device=target_n.device)
        if group is not None:
            dist.all_reduce(total, group=group)
        share = world_in(group) / total
        target_nt = target_n[:, None].expand(-1, tokens)
        choice = F.cross_entropy(logits_ntC.flatten(0, 1), target_nt.flatten(), reduction="sum") / tokens * share
        variance = centred_CD.square().sum(1).mean()
        distance = (tokens_ntD - names_CD[target_nt]).square().sum() / tokens / variance * share
        return {
            "loss": choice + self.distance_weight * distance,
            "accuracy": (logits_ntC.sum(1).argmax(1) == target_n).sum() * share,
            "distance": distance.detach(),
        }

    def weight(self, batch: Mapping[str, Any]) -> int:
        """How many tiles a batch on the host has: what it counts for among others of its step."""
        return len(batch["target"])
