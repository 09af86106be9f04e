"""Next-token loss on the answers of a conversation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from mmfoundry.models.chat import IGNORED
from mmfoundry.models.objectives import OBJECTIVES
from mmfoundry.pipeline.distributed import world_in

if TYPE_CHECKING:  # transformers takes a second to import, and a contrastive run reads this registry too
    from mmfoundry.models.vlm import VlmOutput

# Shape suffixes: s = supervised positions on this rank, V = vocabulary, b = sequences, L = positions


class AnswerTokens:
    """Mean cross-entropy of answer tokens, the mean taken over all tokens of all ranks."""

    def __call__(
        self, output: VlmOutput, batch: Mapping[str, Any], group: ProcessGroup | None = None
    ) -> dict[str, Tensor]:
        """Score the logits.

        Args:
            output: logits at the supervised positions, and the ids that should come there.
            batch: not read; part of the contract of every objective.
            group: the ranks whose tokens are counted together; None means this process alone.

        Returns:
            loss: () nats a token; its mean over ranks is the joint loss, however unevenly tokens lie on the ranks.
            token_accuracy: () share of answer tokens that score highest; its mean over ranks is the joint share.
        """
        logits_sV = output.logits_sV.to(torch.promote_types(output.logits_sV.dtype, torch.float32))
        total = torch.full((), float(len(output.target_s)), device=logits_sV.device)
        if group is not None:
            dist.all_reduce(total, group=group)
        share = world_in(group) / total.clamp(min=1)
        # A sum over no tokens keeps the graph, so that every rank takes part in the backward pass.
        nats = F.cross_entropy(logits_sV, output.target_s, reduction="sum")
        right = (logits_sV.detach().argmax(1) == output.target_s).sum()
        return {"loss": nats * share, "token_accuracy": right * share}

    def weight(self, batch: Mapping[str, Any]) -> int:
        """How many answer tokens a batch on the host has: what it counts for among others of its step."""
        return int((batch["labels"][:, 1:] != IGNORED).sum())


answer_tokens = OBJECTIVES.register("answer_tokens")(AnswerTokens())
