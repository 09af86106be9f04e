"""The moving average is that of the weights that the checkpoints hold, at every ZeRO stage, over an interruption."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmfoundry.pipeline import checkpoint
from mmfoundry.pipeline.distributed import init_runtime
from mmfoundry.pipeline.ema import averaged_weights
from tests.pipeline.tiny_training import train_tiny, trainer_config
from tests.ranks import run_ranks

DECAY = 0.4


def averages(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """As the newest checkpoint has them, and made anew from every checkpoint's weights."""
    found = checkpoint.newest(folder, init_runtime(), lambda text: None)
    assert found is not None
    expected: dict[str, torch.Tensor] = {}
    for step in range(1, found.step + 1):
        weights = load_file(folder / f"step-{step:06d}" / "model.safetensors")
        keeps = min(DECAY, step / (9 + step)) if expected else 0.0
        expected = {name: keeps * expected.get(name, value) + (1 - keeps) * value for name, value in weights.items()}
    return averaged_weights(found), expected


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_it_averages_the_weights(stage: int, tmp_path: Path) -> None:
    trainer = trainer_config(
        ema={"decay": DECAY}, max_steps=8, save_steps=1, keep_checkpoints=9, zero_optimization={"stage": stage}
    )
    # told to stop twice, on one process and then on two: the work folder, with its checkpoints, is left
    for step in (3, 6):
        arguments = (str(tmp_path / "out"), {"trainer": trainer}, ("SIGTERM", step, 0))
        codes = [train_tiny(None, *arguments)] if stage == 0 or step == 3 else run_ranks(train_tiny, 2, *arguments)
        assert set(codes) == {85}
    found, expected = averages(tmp_path / "out.work" / "checkpoints" / "train")
    assert "calls" in expected  # a buffer, which has no average
    assert found.keys() == expected.keys() - {"calls"}
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_weights_are_what_they_are_without_it(tmp_path: Path) -> None:
    plain = train_tiny(None, str(tmp_path / "plain"), {"trainer": trainer_config(max_steps=4)})
    with_ema = train_tiny(None, str(tmp_path / "ema"), {"trainer": trainer_config(max_steps=4, ema={"decay": 0.9})})
    assert plain[0] == with_ema[0]
    for name, value in plain[1].items():
        assert torch.equal(value, with_ema[1][name])
