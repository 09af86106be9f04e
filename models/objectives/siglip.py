"""The sigmoid loss of SigLIP: every picture with every caption is a yes-or-no question of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from mmfoundry.models.clip import ClipOutput
from mmfoundry.models.objectives import OBJECTIVES
from mmfoundry.pipeline.distributed import all_gather_rows, rank_in

# Shape suffixes: b = pairs on this rank, N = pairs on all ranks, D = embedding width


@OBJECTIVES.register("siglip")
def siglip(output: ClipOutput, batch: Mapping[str, Any], group: ProcessGroup | None = None) -> dict[str, Tensor]:
    """Pairwise sigmoid loss over the joint batch of all ranks (Zhai et al. 2023, arXiv 2303.15343, algorithm 1).

    Args:
        output: as for `info_nce`, and `bias` (), added to every logit.
        batch: not read; part of the contract of every objective.
        group: the ranks that form the joint batch; None means this process alone.

    Returns:
        loss: () nats per picture, summed over the N captions, over this rank's pictures; its mean over ranks is the
            joint loss.
        accuracy: () fraction of this rank's images whose own caption scores highest of N.
        scale: () inverse temperature.
        bias: () of the logits.

    Raises:
        ValueError: the two embeddings differ in shape, or the model has no bias.
    """
    image_bD, text_bD = output.image_bD, output.text_bD
    if image_bD.shape != text_bD.shape:
        raise ValueError(f"images {tuple(image_bD.shape)} and texts {tuple(text_bD.shape)} must pair row by row")
    if output.bias is None:
        raise ValueError("siglip needs a bias on the logits: set the model's init_logit_bias (SigLIP: -10)")
    target_b = rank_in(group) * len(image_bD) + torch.arange(len(image_bD), device=image_bD.device)
    with torch.autocast(image_bD.device.type, enabled=False):
        logits_bN = output.scale * image_bD @ all_gather_rows(text_bD, group).T + output.bias
        sign_bN = 2 * F.one_hot(target_b, logits_bN.shape[1]).to(logits_bN.dtype) - 1
        loss = -F.logsigmoid(sign_bN * logits_bN).sum(dim=1).mean()
    accuracy = (logits_bN.argmax(1) == target_b).float().mean()
    return {"loss": loss, "accuracy": accuracy, "scale": output.scale.detach(), "bias": output.bias.detach()}
