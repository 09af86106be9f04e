import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmfoundry.pipeline.schedules import SchedulerConfig, lr_factor


def test_cosine_is_torchs_after_a_linear_warm_up() -> None:
    """Held against torch's own schedulers in a row."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.25, end_factor=1.0, total_iters=3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=16, eta_min=0.1)
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[4])
    config = SchedulerConfig(type="cosine", warmup_steps=4, min_lr_ratio=0.1)
    for step in range(20):
        assert lr_factor(config, step, 20) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        both.step()


def test_constant_stays_at_the_peak() -> None:
    config = SchedulerConfig(type="constant", warmup_steps=2)
    assert [lr_factor(config, step, 5) for step in range(5)] == [0.5, 1.0, 1.0, 1.0, 1.0]


@given(
    kind=st.sampled_from(["cosine", "constant"]),
    warmup=st.integers(0, 50),
    floor=st.floats(0, 1),
    max_steps=st.integers(1, 50),
)
def test_never_above_the_peak_nor_below_zero(kind: str, warmup: int, floor: float, max_steps: int) -> None:
    config = SchedulerConfig(type=kind, warmup_steps=warmup, min_lr_ratio=floor)  # type: ignore[arg-type]
    factors = [lr_factor(config, step, max_steps) for step in range(max_steps)]
    assert all(0 < factor <= 1 and math.isfinite(factor) for factor in factors)
