"""InfoNCE for batches whose logits do not fit into memory: computed tile by tile, the ranks in a ring."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.distributed import ProcessGroup

from mmfoundry.models.clip import ClipOutput
from mmfoundry.models.objectives import OBJECTIVES, check_pairs
from mmfoundry.models.ring import Ring, spans, tile_rows
from mmfoundry.pipeline.config import Config

# Shape suffixes: b = pairs on this rank, D = embedding width, r x c = rows and columns of one tile of logits


class TiledInfoNCE(Config):
    """InfoNCE in memory that grows with a rank's own pairs only, whatever the number of ranks.

    The loss and gradients of `info_nce` (Radford et al. 2021), with logits made in tiles and thrown away, as in Inf-CL
    (Cheng et al. 2024, arXiv 2410.17243). Captions travel round the ring of ranks; each tile serves its rows (pictures)
    and its columns (captions), whose sums travel along, so every logit is computed once forward and once backward:
    half of what `info_nce` multiplies in the forward pass.
    """

    tile: int | None = Field(
        None, ge=1, description="side of a tile of logits, rows; None: 1024 on a CPU, 4096 on a GPU"
    )

    def __call__(
        self, output: ClipOutput, batch: Mapping[str, Any], group: ProcessGroup | None = None
    ) -> dict[str, Tensor]:
        """Score the embeddings.

        Args:
            output: as for `info_nce`.
            batch: not read; part of the contract of every objective.
            group: the ranks that form the joint batch; None means this process alone.

        Returns:
            loss: () nats per pair over this rank's rows; its mean over ranks is the joint loss. The gradient that
                comes back to it must be the same number on all ranks, as it is where losses are averaged.
            accuracy: () fraction of this rank's images whose own caption scores above all others.
            scale: () inverse temperature.

        Raises:
            ValueError: the two embeddings differ in shape.
        """
        image_bD, text_bD = check_pairs(output)
        tile = tile_rows(self.tile, image_bD.device)
        loss, accuracy = _TiledInfoNCE.apply(image_bD, text_bD, output.scale, group, tile)
        return {"loss": loss, "accuracy": accuracy, "scale": output.scale.detach()}


tiled_info_nce = OBJECTIVES.register("tiled_info_nce")(TiledInfoNCE())


class _TiledInfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, image_bD: Tensor, text_bD: Tensor, scale: Tensor, group: ProcessGroup | None, tile: int
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(image_bD.device.type, enabled=False):
            sums = _online_sums(image_bD * scale, text_bD, group, tile)
        row_b, column_b, own_b, best_other_b = sums
        ctx.save_for_backward(image_bD, text_bD, scale, row_b, column_b)
        ctx.group, ctx.tile = group, tile  # type: ignore[attr-defined]
        loss = ((row_b + column_b) / 2 - own_b).mean()
        accuracy = (own_b > best_other_b).float().mean()
        ctx.mark_non_differentiable(accuracy)
        return loss, accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        image_bD, text_bD, scale, row_b, column_b = ctx.saved_tensors
        with torch.autocast(image_bD.device.type, enabled=False):
            # Sums over tiles of (softmax by row + softmax by column - 2 on the diagonal) times the other side
            image_sum_bD, text_sum_bD = _pulls(
                image_bD * scale, image_bD, text_bD, row_b, column_b, ctx.group, ctx.tile
            )
            share = grad / (2 * len(image_bD))
            grad_scale = (image_bD * image_sum_bD).sum() * share
        return image_sum_bD * (scale * share), text_sum_bD * (scale * share), grad_scale, None, None


def _online_sums(
    scaled_bD: Tensor, text_bD: Tensor, group: ProcessGroup | None, tile: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of this rank's pictures, the log-sum-exp over all captions; of its captions, that over all pictures; both (b,).

    Then the logit of each own pair, and each picture's best logit with a caption that is not its own.
    """
    rows = len(scaled_bD)
    row_b, column_b = (scaled_bD.new_full((rows,), -torch.inf) for _ in range(2))
    own_b, best_other_b = scaled_bD.new_empty(rows), scaled_bD.new_full((rows,), -torch.inf)
    ring = Ring(group)
    for hop, block_bD in enumerate(ring.blocks(text_bD)):
        for r in spans(rows, tile):
            for c in spans(rows, tile):
                logits_rc = scaled_bD[r] @ block_bD[c].T
                if hop == 0 and r == c:
                    own_b[r] = logits_rc.diagonal()
                    logits_rc.fill_diagonal_(-torch.inf)
                    best_r = torch.maximum(best_other_b[r], logits_rc.amax(1))
                    logits_rc.diagonal().copy_(own_b[r])
                else:
                    best_r = torch.maximum(best_other_b[r], logits_rc.amax(1))
                best_other_b[r] = best_r
                row_b[r] = torch.logaddexp(row_b[r], logits_rc.logsumexp(1))
                column_b[c] = torch.logaddexp(column_b[c], logits_rc.logsumexp(0))
        column_b = ring.pass_on(column_b)()  # the sums belong to the block: after the last hop they are home
    return row_b, column_b, own_b, best_other_b


def _pulls(
    scaled_bD: Tensor,
    image_bD: Tensor,
    text_bD: Tensor,
    row_b: Tensor,
    column_b: Tensor,
    group: ProcessGroup | None,
    tile: int,
) -> tuple[Tensor, Tensor]:
    """The logits' gradients, times 2b, multiplied with captions (for pictures) and pictures (for captions); (b, D)."""
    rows = len(scaled_bD)
    image_sum_bD = torch.zeros_like(image_bD)
    ring = Ring(group)
    text_sum: Any = lambda: None  # noqa: E731
    for hop, block_bD in enumerate(ring.blocks(text_bD)):
        partial_bD = torch.zeros_like(text_bD)
        for r in spans(rows, tile):
            for c in spans(rows, tile):
                logits_rc = scaled_bD[r] @ block_bD[c].T
                pull_rc = (logits_rc - row_b[r, None]).exp_()
                pull_rc += logits_rc.sub_(column_b[c]).exp_()
                if hop == 0 and r == c:
                    pull_rc.diagonal().sub_(2)
                image_sum_bD[r].addmm_(pull_rc, block_bD[c])
                partial_bD[c].addmm_(pull_rc.T, image_bD[r])
        if hop > 0:
            partial_bD += text_sum()
        text_sum = ring.pass_on(partial_bD)
        column_b = ring.pass_on(column_b)()
    return image_sum_bD, text_sum()
