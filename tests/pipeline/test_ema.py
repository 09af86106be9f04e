"""The moving average is that of the weights that the checkpoints hold, at every ZeRO stage, over an interruption."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmfoundry.pipeline import checkpoint
from mmfoundry.pipeline.distributed import init_runtime
from mmfoundry.pipeline.ema import averaged_weights
from mmfoundry.pipeline.metrics import read_metrics
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


@pytest.mark.parametrize(
    ("world", "stage"), [(1, 0), (2, 1), (2, 3), *(pytest.param(2, stage, marks=pytest.mark.slow) for stage in (0, 2))]
)
def test_evaluations_look_at_it_too_and_change_nothing(world: int, stage: int, tmp_path: Path) -> None:
    same = {"max_steps": 4, "ema": {"decay": DECAY}, "zero_optimization": {"stage": stage}}
    looked = trainer_config(**same, eval_steps=1, save_steps=1, keep_checkpoints=9)

    def trained(name: str, trainer: dict[str, Any], *stopped: Any) -> Any:
        arguments = (str(tmp_path / name), {"trainer": trainer, "dropout": 0.3}, *stopped)
        return train_tiny(None, *arguments) if world == 1 else run_ranks(train_tiny, world, *arguments)[0]

    assert trained("looked", looked, ("SIGTERM", 3, 0)) == 85  # the checkpoints are left
    expected = [seen["eval/norm/ema"] for seen in evaluations(tmp_path / "looked.work")]
    found, _ = averages(tmp_path / "looked.work" / "checkpoints" / "train")
    norm = torch.cat([value.double().flatten() for value in found.values()]).norm()
    assert expected[-1] == pytest.approx(float(norm), rel=1e-6)
    losses, weights = trained("looked", looked)
    seen = evaluations(tmp_path / "looked")
    assert [line["eval/step_squared/ema"] for line in seen] == [1, 4, 9, 16]
    assert [line["eval/norm/ema"] == line["eval/norm"] for line in seen] == [True, False, False, False]
    plain = trained("plain", trainer_config(**same))
    assert losses == plain[0]
    assert all(torch.equal(value, weights[name]) for name, value in plain[1].items())


def evaluations(folder: Path) -> list[dict[str, float]]:
    return [line for line in read_metrics(folder / "metrics.jsonl") if "eval/norm" in line]


def test_weights_are_what_they_are_without_it(tmp_path: Path) -> None:
    plain = train_tiny(None, str(tmp_path / "plain"), {"trainer": trainer_config(max_steps=4)})
    with_ema = train_tiny(None, str(tmp_path / "ema"), {"trainer": trainer_config(max_steps=4, ema={"decay": 0.9})})
    assert plain[0] == with_ema[0]
    for name, value in plain[1].items():
        assert torch.equal(value, with_ema[1][name])
