import math
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.errors import ConfigError
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


@pytest.mark.parametrize("shape", ["1-sqrt", "linear"])
def test_warmup_stable_decay_rises_stays_and_falls(shape: Literal["1-sqrt", "linear"]) -> None:
    config = SchedulerConfig(
        type="warmup_stable_decay", warmup_steps=2, decay_steps=4, decay_shape=shape, min_lr_ratio=0.2
    )
    factors = [lr_factor(config, step, 10) for step in range(10)]
    assert factors[:7] == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    done = [0.5, 0.7071067811865476, 0.8660254037844386] if shape == "1-sqrt" else [0.25, 0.5, 0.75]
    assert factors[7:] == pytest.approx([1 - 0.8 * each for each in done])


def test_steps_of_decay_belong_to_warmup_stable_decay() -> None:
    for tree in ({"type": "warmup_stable_decay"}, {"type": "cosine", "decay_steps": 3}):
        with pytest.raises(ConfigError, match=r"decay_steps \(above 0\) and type: warmup_stable_decay go together"):
            parse(SchedulerConfig, tree)


@given(
    kind=st.sampled_from(["cosine", "constant", "warmup_stable_decay"]),
    warmup=st.integers(0, 50),
    floor=st.floats(0, 1),
    max_steps=st.integers(1, 50),
)
def test_never_above_the_peak_nor_below_zero(kind: str, warmup: int, floor: float, max_steps: int) -> None:
    decay = 7 if kind == "warmup_stable_decay" else 0
    config = SchedulerConfig(type=kind, warmup_steps=warmup, min_lr_ratio=floor, decay_steps=decay)  # type: ignore[arg-type]
    factors = [lr_factor(config, step, max_steps) for step in range(max_steps)]
    assert all(0 < factor <= 1 and math.isfinite(factor) for factor in factors)
