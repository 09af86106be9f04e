"""stages/averages.py: the models beside the last weights are the means that they say they are."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mmfoundry.models.io import load_clip
from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.distributed import init_runtime
from mmfoundry.pipeline.errors import ConfigError
from mmfoundry.pipeline.metrics import read_metrics
from mmfoundry.pipeline.stage import run_stage
from mmfoundry.stages.pretrain import STAGE, PretrainConfig
from tests.ranks import run_ranks
from tests.stages.test_pretrain import shards, tree  # noqa: F401  (a fixture)


def changed(shards: Path, soup: dict[str, Any]) -> dict[str, Any]:  # noqa: F811
    config = tree(shards, soup=soup, text_groups=3)
    config["trainer"] |= {"max_steps": 12, "save_steps": 4, "keep_checkpoints": 3, "ema": {"decay": 0.9}}
    return config


def run(group: Any, config: dict[str, Any], output: str) -> dict[str, float]:
    return run_stage(STAGE, parse(PretrainConfig, config), Path(output), init_runtime()).manifest.metrics


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([value.flatten() for value in load_clip(folder).state_dict().values()])


def test_uniform_soup_and_moving_average_lie_among_the_weights(shards: Path, tmp_path: Path) -> None:  # noqa: F811
    metrics = run(None, changed(shards, {"checkpoints": 3}), str(tmp_path / "out"))
    assert metrics["soup_members"] == 3
    last, soup, ema = (weights(tmp_path / "out" / each) for each in (".", "soup", "ema"))
    start = torch.cat(
        [
            v.flatten()
            for v in load_clip(tmp_path / "out").from_seed(load_clip(tmp_path / "out").config, 3).state_dict().values()
        ]
    )
    for mean in (soup, ema):
        assert 0 < float((mean - last).norm()) < float((start - last).norm())
    lines = list(read_metrics(tmp_path / "out" / "metrics.jsonl"))
    for name in (
        "grad_norm/vision_model",
        "param_norm/text_model",
        "tokens_per_second",
        "tflops_per_device",
        "memory_gb",
    ):
        assert lines[-1][name] > 0


@pytest.mark.parametrize("world", [1, 2])
def test_greedy_soup_is_never_worse_than_the_best_checkpoint(shards: Path, tmp_path: Path, world: int) -> None:  # noqa: F811
    soup = {"type": "greedy", "checkpoints": 3, "data": str(shards), "samples": 64 * world}
    arguments = (changed(shards, soup), str(tmp_path / "out"))
    for metrics in [run(None, *arguments)] if world == 1 else run_ranks(run, world, *arguments):
        assert 1 <= metrics["soup_members"] <= 3
        assert metrics["soup_loss"] <= metrics["best_member_loss"]
    load_clip(tmp_path / "out" / "soup")


@pytest.mark.parametrize(
    ("soup", "error"),
    [
        ({"checkpoints": 4}, "soup.checkpoints wants trainer.keep_checkpoints to be 4 or more"),
        ({"checkpoints": 2, "type": "greedy"}, "greedy needs data"),
    ],
)
def test_what_cannot_be_mixed_is_refused(shards: Path, soup: dict[str, Any], error: str) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match=error):
        parse(PretrainConfig, changed(shards, soup))
