"""InfoNCE: each picture picks its caption among all of the batch, and each caption its picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from mmfoundry.models.clip import ClipOutput
from mmfoundry.models.objectives import OBJECTIVES, check_pairs
from mmfoundry.pipeline.distributed import all_gather_rows, rank_in

# Shape suffixes: b = pairs on this rank, N = pairs on all ranks, D = embedding width


@OBJECTIVES.register("info_nce")
def info_nce(output: ClipOutput, batch: Mapping[str, Any], group: ProcessGroup | None = None) -> dict[str, Tensor]:
    """Symmetric InfoNCE over the joint batch of all ranks (Radford et al. 2021, arXiv 2103.00020, figure 3).

    Args:
        output: `image_bD`, `text_bD`, both L2-normalised, paired row by row, b equal on all ranks;
            `scale` (), inverse temperature already exponentiated, multiplies the cosines.
        batch: not read; part of the contract of every objective.
        group: the ranks that form the joint batch; None means this process alone.

    Returns:
        loss: () nats per pair over this rank's rows; its mean over ranks is the joint loss.
        accuracy: () fraction of this rank's images whose own caption scores highest of N.

    Raises:
        ValueError: the two embeddings differ in shape.
    """
    image_bD, text_bD = check_pairs(output)
    target_b = rank_in(group) * len(image_bD) + torch.arange(len(image_bD), device=image_bD.device)
    with torch.autocast(
        image_bD.device.type, enabled=False
    ):  # 16-bit logits at scale 100 cannot tell close pairs apart
        image_to_text_bN = output.scale * image_bD @ all_gather_rows(text_bD, group).T
        text_to_image_bN = output.scale * text_bD @ all_gather_rows(image_bD, group).T
        loss = (F.cross_entropy(image_to_text_bN, target_b) + F.cross_entropy(text_to_image_bN, target_b)) / 2
    accuracy = (image_to_text_bN.argmax(1) == target_b).float().mean()
    return {"loss": loss, "accuracy": accuracy, "scale": output.scale.detach()}
