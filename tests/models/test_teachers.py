"""Teachers beside any loss, through the engine: cut into chunks or not, on one process or two, it is the joint loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, DistillClipLoss, SigLipLoss
from torch import Tensor
from torch.distributed import ProcessGroup

from mmfoundry.models.clip import CLIP
from mmfoundry.models.objectives import weighted_sum
from mmfoundry.models.teachers import Taught
from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.distributed import all_reduce_sum, init_runtime, rank_in, world_in
from mmfoundry.pipeline.engine import Engine
from mmfoundry.pipeline.engine_config import EngineConfig
from mmfoundry.pipeline.optimizers import decay_groups
from tests.models.tiny import pairs, tiny_clip
from tests.ranks import run_ranks

ROWS = 8
FEATURES, WEIGHT, STORED_SCALE = 0.25, 0.5, 30.0
TEACHERS = {"online": ["big"], "stored": ["kept"], "both": ["big", "kept"]}


def student() -> CLIP:
    return tiny_clip(0, init_logit_bias=-3.0)


def joint_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    stored = {f"teacher_{kind}/kept": torch.randn(ROWS, 12, generator=generator) for kind in ("image", "text")}
    return pairs(ROWS) | stored


def taught(contrastive: str, which: str) -> Taught:
    distillation = {"weight": WEIGHT, "features": FEATURES, "teachers": dict.fromkeys(TEACHERS[which], 1.0)}
    online = {"big": tiny_clip(1)} if "big" in TEACHERS[which] else {}
    return Taught(weighted_sum({contrastive: 1.0, "distillation": distillation}), online, {"kept": STORED_SCALE})


def through_the_engine(
    group: ProcessGroup | None, cases: list[tuple[str, str, int | None]]
) -> list[tuple[float, list[Tensor]]]:
    """For each case the joint loss and its gradient for each weight."""
    found = []
    for contrastive, which, chunk in cases:
        model = student()
        config = parse(EngineConfig, {"train_batch_size": ROWS, "grad_cache_chunk_size": chunk})
        engine = Engine(
            config,
            model,
            taught(contrastive, which),
            lambda groups: torch.optim.AdamW(groups, lr=0.1),
            decay_groups(model.named_parameters(), 0.0),
            init_runtime(),
        )
        mine = {name: value[rank_in(group) :: world_in(group)] for name, value in joint_batch().items()}
        loss = all_reduce_sum({"loss": engine.accumulate(mine)["loss"]}, group)["loss"] / world_in(group)
        found.append((loss, [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]))
        engine.close()
    return found


def with_open_clips(contrastive: str, which: str) -> tuple[float, list[Tensor]]:
    """The same from open_clip's losses over the joint batch, in one pass."""
    model, batch = student(), joint_batch()
    out = model(batch)
    loss = SigLipLoss()(*out[:4]) if contrastive == "siglip" else ClipLoss()(*out[:3])
    said = []
    if "big" in TEACHERS[which]:
        with torch.no_grad():
            said.append(tuple(tiny_clip(1).eval()(batch)[:3]))
    if "kept" in TEACHERS[which]:
        stored: Any = (F.normalize(batch[f"teacher_{kind}/kept"], dim=1) for kind in ("image", "text"))
        said.append((*stored, torch.tensor(STORED_SCALE)))
    for image, text, scale in said:
        similar = DistillClipLoss()(*out[:3], image, text, scale)[1]
        apart = ((out.image_bD - image).square().sum(1) + (out.text_bD - text).square().sum(1)).mean() / 2
        loss = loss + WEIGHT * (similar + FEATURES * apart) / len(said)
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return loss.item(), [each for each in gradients if each is not None]


CASES = [
    ("siglip", "online", None),
    ("siglip", "online", 2),
    ("siglip", "stored", None),
    ("siglip", "stored", 2),
    ("siglip", "both", 2),
    ("tiled_info_nce", "both", 2),
]


@pytest.mark.parametrize("world", [1, 2])
def test_siglip_and_the_gradient_cache_go_with_teachers(world: int) -> None:
    per_rank = run_ranks(through_the_engine, world, CASES) if world > 1 else [through_the_engine(None, CASES)]
    for case, (contrastive, which, chunk) in enumerate(CASES):
        expected_loss, expected = with_open_clips(contrastive, which)
        assert max(float(each.abs().max()) for each in expected) > 1e-2
        for found in per_rank:
            loss, gradients = found[case]
            assert loss == pytest.approx(expected_loss, rel=1e-5), (contrastive, which, chunk)
            kept = [each for each in gradients if each.abs().max() > 0 or contrastive == "siglip"]
            assert len(kept) == len(expected)
            for one, other in zip(kept, expected, strict=True):
                # fp32 sums in another order; a key's bias has no gradient but rounding
                assert (one - other).norm() <= 1e-5 * other.norm() + 1e-6, (contrastive, which, chunk, one, other)
