"""The sigmoid loss of SigLIP: every picture with every caption is a yes-or-no question of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.distributed import ProcessGroup

from mmfoundry.models.clip import ClipOutput
from mmfoundry.models.objectives import OBJECTIVES, check_pairs
from mmfoundry.models.ring import Ring, spans, tile_rows
from mmfoundry.pipeline.config import Config

# Shape suffixes: b = pairs on this rank, D = embedding width, r x c = rows and columns of one tile of logits


class Siglip(Config):
    """Pairwise sigmoid loss over the joint batch of all ranks (Zhai et al. 2023, arXiv 2303.15343, algorithm 1).

    Captions travel round the ring of ranks, as in the paper's section 3.2, and logits are made in tiles and thrown
    away: memory grows with a rank's own pairs only. Each logit's gradient depends on that logit alone, so it is
    taken while the logit is there, and the backward pass computes nothing again.
    """

    tile: int | None = Field(
        None, ge=1, description="side of a tile of logits, rows; None: 1024 on a CPU, 4096 on a GPU"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"bias"})

    def __call__(
        self, output: ClipOutput, batch: Mapping[str, Any], group: ProcessGroup | None = None
    ) -> dict[str, Tensor]:
        """Score the embeddings.

        Args:
            output: as for `info_nce`, and `bias` (), added to every logit.
            batch: not read; part of the contract of every objective.
            group: the ranks that form the joint batch; None means this process alone.

        Returns:
            loss: () nats per picture, summed over all captions, over this rank's pictures; its mean over ranks is the
                joint loss. The gradient that comes back to it must be the same number on all ranks, as it is where
                losses are averaged.
            accuracy: () fraction of this rank's images whose own caption scores above all others.
            scale: () inverse temperature.
            bias: () of the logits.

        Raises:
            ValueError: the two embeddings differ in shape, or the model has no bias.
        """
        image_bD, text_bD = check_pairs(output)
        if output.bias is None:
            raise ValueError("siglip needs a bias on the logits: set the model's init_logit_bias (SigLIP: -10)")
        tile = tile_rows(self.tile, image_bD.device)
        learns = torch.is_grad_enabled()
        loss, accuracy = _Siglip.apply(image_bD, text_bD, output.scale, output.bias, group, tile, learns)
        return {"loss": loss, "accuracy": accuracy, "scale": output.scale.detach(), "bias": output.bias.detach()}


siglip = OBJECTIVES.register("siglip")(Siglip())


class _Siglip(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        image_bD: Tensor,
        text_bD: Tensor,
        scale: Tensor,
        bias: Tensor,
        group: ProcessGroup | None,
        tile: int,
        learns: bool,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(image_bD.device.type, enabled=False):
            total, accuracy, gradients = _one_round(image_bD, text_bD, scale, bias, group, tile, learns)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(accuracy)
        return total, accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (*(each * grad for each in ctx.saved_tensors), None, None, None)


def _one_round(
    image_bD: Tensor,
    text_bD: Tensor,
    scale: Tensor,
    bias: Tensor,
    group: ProcessGroup | None,
    tile: int,
    learns: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """This rank's loss and accuracy, and, if it `learns`, the gradients of images, texts, scale and bias."""
    rows = len(image_bD)
    scaled_bD = image_bD * scale
    total, bias_sum = image_bD.new_zeros(()), image_bD.new_zeros(())
    own_b, best_other_b = image_bD.new_empty(rows), image_bD.new_full((rows,), -torch.inf)
    image_sum_bD = torch.zeros_like(image_bD) if learns else None
    ring = Ring(group)
    text_sum: Callable[[], Tensor] | None = None
    for hop, block_bD in enumerate(ring.blocks(text_bD)):
        partial_bD = torch.zeros_like(text_bD) if learns else None
        for r in spans(rows, tile):
            for c in spans(rows, tile):
                # Of a pair that belongs together the logit is negated: then every question's answer is "no"
                logits_rc = torch.addmm(bias, scaled_bD[r], block_bD[c].T)
                diagonal = hop == 0 and r == c
                if diagonal:
                    own_b[r] = logits_rc.diagonal()
                    logits_rc.fill_diagonal_(-torch.inf)
                best_other_b[r] = torch.maximum(best_other_b[r], logits_rc.amax(1))
                if diagonal:
                    logits_rc.diagonal().copy_(-own_b[r])
                total += F.softplus(logits_rc).sum()
                if image_sum_bD is None or partial_bD is None:
                    continue
                pull_rc = logits_rc.sigmoid_()
                if diagonal:
                    pull_rc.diagonal().neg_()
                bias_sum += pull_rc.sum()
                image_sum_bD[r].addmm_(pull_rc, block_bD[c])
                partial_bD[c].addmm_(pull_rc.T, image_bD[r])
        if partial_bD is not None:
            if text_sum is not None:
                partial_bD += text_sum()
            text_sum = ring.pass_on(partial_bD)
    accuracy = (own_b > best_other_b).float().mean()
    if image_sum_bD is None or text_sum is None:
        return total / rows, accuracy, ()
    scale_sum = (image_bD * image_sum_bD).sum()
    share = scale / rows
    return total / rows, accuracy, (image_sum_bD * share, text_sum() * share, scale_sum / rows, bias_sum / rows)
