"""Every objective on several ranks against one process with the joint batch."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from mmfoundry.models.chat import IGNORED
from mmfoundry.models.objectives import OBJECTIVES, objective_with
from mmfoundry.pipeline.distributed import rank_in
from tests.ranks import run_ranks

# float64, so only the order of the sums differs; an objective that must compute in fp32 says so here, and why
TOLERANCE = {"answer_tokens": (1e-5, 1e-7)}  # scores of a large vocabulary are widened to fp32, not further
EXACT = (1e-10, 1e-12)
KINDS = ("image", "text")


class TinyModel(nn.Module):
    """Fills every field that any objective reads."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text, self.vocabulary = nn.Linear(7, 5), nn.Linear(9, 5), nn.Linear(6, 11)
        self.log_scale, self.bias = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(-3.0))

    def forward(self, batch: dict[str, Tensor]) -> SimpleNamespace:
        labels_bL = batch["labels"][:, 1:]
        supervised_bL = labels_bL != IGNORED
        words = self.vocabulary(batch["hidden"][:, :-1])
        nats = nn.functional.cross_entropy(words.flatten(0, 1), labels_bL.flatten(), reduction="none")
        return SimpleNamespace(
            image_bD=nn.functional.normalize(self.image(batch["image"]), dim=-1),
            text_bD=nn.functional.normalize(self.text(batch["text"]), dim=-1),
            scale=self.log_scale.exp(),
            bias=self.bias,
            logits_sV=words[supervised_bL],
            target_s=labels_bL[supervised_bL],
            caption_nats_bL=nats.view_as(labels_bL),
            caption_right_bL=words.argmax(-1) == labels_bL,
            caption_said_bL=supervised_bL,
        )


def joint_batch(rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(0, 11, (rows, 8), generator=generator)
    # Answers of 0 to 6 tokens, the longest ones on one rank: a mean over a rank's own tokens would show
    answer = (torch.arange(rows) % 4) * 2
    labels[torch.arange(8) < 8 - answer[:, None]] = IGNORED
    batch = {"image": normal(rows, 7), "text": normal(rows, 9), "hidden": normal(rows, 8, 6), "labels": labels}
    teachers = {f"teacher_{kind}/{name}": normal(rows, width) for name, width in (("a", 5), ("b", 3)) for kind in KINDS}
    return batch | teachers


def values_and_grads(
    group: ProcessGroup | None, name: str, world: int, options: dict[str, Any] | None = None
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """This rank's values, and its gradient for each weight; every rank builds the same model and joint batch."""
    torch.manual_seed(0)
    model = TinyModel().double()
    batch = {key: value[rank_in(group) :: world] for key, value in joint_batch(rows=12).items()}
    values: dict[str, Any] = objective_with(name, options or {})(model(batch), batch, group)
    gradients = torch.autograd.grad(values["loss"], list(model.parameters()), materialize_grads=True)
    return {key: value.detach() for key, value in values.items()}, list(gradients)


# Options beside the defaults: tiles that do not divide a rank's rows, several parts
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "tiled_info_nce": [{"tile": 2}],
    "siglip": [{"tile": 2}],
    "distillation": [{"features": 0.5, "teachers": {"a": 1.0}}],
    "coca": [{"contrastive": {"siglip": {"tile": 2}}, "clip_loss_weight": 0.5}, {"clip_loss_weight": 0.0}],
    "matryoshka": [{"dims": [5, 2], "over": {"tiled_info_nce": 1.0, "siglip": 0.5}}],
}
CASES = [(name, options) for name in sorted(OBJECTIVES) for options in ({}, *OPTIONS.get(name, []))]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_ranks_agree_with_one_process(name: str, options: dict[str, Any], world: int) -> None:
    values, gradients = values_and_grads(None, name, world=1, options=options)
    assert max(part.abs().max() for part in gradients) > 1e-3  # a constant loss would agree with itself
    per_rank = run_ranks(values_and_grads, world, name, world, options)  # gloo, one process a rank
    rtol, atol = TOLERANCE.get(name, EXACT)
    mean_loss = torch.stack([own["loss"] for own, _ in per_rank]).mean()
    torch.testing.assert_close(mean_loss, values["loss"], rtol=rtol, atol=atol)
    for part, own in zip(gradients, zip(*(own for _, own in per_rank), strict=True), strict=True):
        torch.testing.assert_close(torch.stack(own).mean(0), part, rtol=rtol, atol=atol)
    for key, value in values.items():  # metrics are counts and copies, in fp32
        torch.testing.assert_close(torch.stack([own[key] for own, _ in per_rank]).mean(), value, rtol=1e-6, atol=0)
