"""A user's own DeepSpeed JSON, and what is told to DeepSpeed besides: offloading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmfoundry.pipeline.config import ConfigError, parse
from mmfoundry.pipeline.engine_config import EngineConfig, deepspeed_config, engines_in, zero_stage
from mmfoundry.pipeline.errors import MissingInput
from mmfoundry.pipeline.trainer_config import TrainerConfig
from tests.pipeline.tiny_training import TinyConfig, train_tiny, trainer_config
from tests.ranks import run_ranks

# As transformers' documentation gives it for ZeRO-3 with offloading, values filled in or "auto"
THEIRS: dict[str, Any] = {
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": [0.9, 0.98], "eps": "auto", "weight_decay": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": 12345,
        "stage3_prefetch_bucket_size": "auto",
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": True,
    "comms_logger": {"enabled": True},
}


def settings(tmp_path: Path, theirs: Any, **changes: Any) -> dict[str, Any]:
    path = tmp_path / "ds.json"
    path.write_text(theirs if isinstance(theirs, str) else json.dumps(theirs))
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}}
    ours = {"train_batch_size": 64, "max_steps": 3, "zero_optimization": zero, "deepspeed": str(path)}
    return deepspeed_config(parse(TrainerConfig, ours | changes), 2)


@pytest.mark.parametrize(
    ("theirs", "says"),
    [
        ({"bf16": True}, "bf16 is true, but DeepSpeed has a section there"),
        ({"zero_optimization": 2}, "zero_optimization is 2, but DeepSpeed has a section there"),
        ({"optimizer": "AdamW"}, 'optimizer is "AdamW", but DeepSpeed has a section there'),
        ({"timers": None}, "timers is null, but DeepSpeed has a section there"),
        ({"steps_per_print": {"x": 1}}, "steps_per_print is a section, but DeepSpeed has a plain value there"),
        ({"gradient_clipping": {"x": 1}}, "gradient_clipping is a section, but DeepSpeed has a plain value there"),
    ],
)
def test_what_has_another_shape_than_deepspeeds_is_named(tmp_path: Path, theirs: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        settings(tmp_path, theirs)


@pytest.mark.parametrize(
    ("key", "near"),
    [("zero_optimisation", "zero_optimization"), ("gradient_cliping", "gradient_clipping"), ("shceduler", "scheduler")],
)
def test_what_deepspeed_would_pass_over_is_named(tmp_path: Path, key: str, near: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key} is not a key of DeepSpeed's.*did you mean {near}\?"):
        settings(tmp_path, {key: {}})


def test_what_it_adds_is_taken(tmp_path: Path) -> None:
    found = settings(tmp_path, THEIRS)
    assert found["comms_logger"] == {"enabled": True}
    assert found["wall_clock_breakdown"] is True
    zero = found["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["overlap_comm"], zero["sub_group_size"]) == (12345, True, 1e9)
    assert zero["stage3_prefetch_bucket_size"] == 50_000_000  # ours
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert found["gradient_clipping"] == 1.0
    assert "optimizer" not in found  # agreed with, and made here
    assert found["fp16"] == {"enabled": False}


@pytest.mark.parametrize(
    ("theirs", "text"),
    [
        ({"train_batch_size": 32}, "train_batch_size is 32, but train_batch_size makes it 64"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps is 4, but train_micro_batch_size_per_gpu m"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5, but gradient_clipping makes it 1.0"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage is 2, but zero_optimization.stage makes it 3"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, 'offload_param.device is "cpu"'),
        ({"bf16": {"enabled": True}}, "bf16.enabled is true, but precision makes it false"),
        ({"optimizer": {"type": "Lamb"}}, 'optimizer.type is "Lamb", but optimizer.type makes it "adamw"'),
        ({"optimizer": {"params": {"lr": 3}}}, "optimizer.params.lr is 3, but optimizer.lr makes it 0.001"),
        ({"optimizer": {"params": {"bias_correction": False}}}, "optimizer.params.bias_correction is not known here"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler is not for DeepSpeed to do here: use scheduler"),
        ({"amp": {"enabled": True}}, "amp is not for DeepSpeed to do here: use precision"),
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
    ],
)  # fmt: skip
def test_what_it_contradicts_is_named(theirs: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        settings(tmp_path, theirs)
    assert text in str(error.value)
    assert "ds.json" in str(error.value)


def test_a_file_may_name_muon_as_it_is_here(tmp_path: Path) -> None:
    muon = {"optimizer": {"type": "muon", "momentum": 0.9}}
    theirs = {"type": "Muon", "params": {"lr": 0.001, "momentum": 0.9}}
    assert "optimizer" not in settings(tmp_path, {"optimizer": theirs}, **muon)
    theirs["params"] = {"momentum": 0.95}
    with pytest.raises(ConfigError, match=r"optimizer.params.momentum is 0.95, but optimizer.momentum makes it 0.9"):
        settings(tmp_path, {"optimizer": theirs}, **muon)


def test_only_adamw_may_stay_on_the_device_in_part(tmp_path: Path) -> None:
    """There, DeepSpeed 0.19.8 has an AdamW of its own take the place of any optimizer."""
    theirs = {"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}}
    assert settings(tmp_path, theirs)["zero_optimization"]["offload_optimizer"]["ratio"] == 0.5
    with pytest.raises(ConfigError, match=r"offload_optimizer.ratio is 0.5, but optimizer.type lion makes it 1.0"):
        settings(tmp_path, theirs, optimizer={"type": "lion"})


def test_every_contradiction_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train_batch_size is 32.*; zero_optimization\.stage is 1"):
        settings(tmp_path, {"train_batch_size": 32, "zero_optimization": {"stage": 1}})
    with pytest.raises(ConfigError, match="loss_scale_window is 1000, but the loss scale here has 2000"):
        settings(tmp_path, THEIRS | {"fp16": {"enabled": True, "loss_scale_window": 1000}}, precision="fp16")
    assert settings(tmp_path, {"amp": {"enabled": False}})["train_batch_size"] == 64
    with pytest.raises(MissingInput, match=r"nowhere\.json: no such file"):
        deepspeed_config(EngineConfig(train_batch_size=2, deepspeed="nowhere.json"), 1)


def test_phases_of_a_stage_are_found() -> None:
    config = TinyConfig.model_validate({"trainer": trainer_config()})
    assert [(key, type(engine)) for key, engine in engines_in(config)] == [("trainer", TrainerConfig)]


@pytest.mark.parametrize(
    ("zero", "text"),
    [
        ({"stage": 0, "offload_optimizer": {"device": "cpu"}}, "offload_optimizer needs stage 1, 2 or 3"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "offload_param needs stage 3"),
        ({"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}, "nvme needs stage 3"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, "device nvme needs it"),
    ],
)
def test_offloading_that_cannot_be_is_refused(zero: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        parse(EngineConfig, {"train_batch_size": 2, "zero_optimization": zero})


CPU = {"device": "cpu"}


@pytest.mark.parametrize(
    ("world", "zero"),
    [
        (1, {"stage": 2, "offload_optimizer": CPU}),
        (2, {"stage": 1, "offload_optimizer": CPU}),
        (2, {"stage": 2, "offload_optimizer": CPU}),
        (2, {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU}),
    ],
)
def test_offloaded_is_the_joint_run_and_resumes(world: int, zero: dict[str, Any], tmp_path: Path) -> None:
    joint = train_tiny(None, str(tmp_path / "joint"), {"trainer": trainer_config()})
    assert not isinstance(joint, int | str)
    config = {"trainer": trainer_config(zero_optimization=zero)}
    assert zero_stage(TinyConfig.model_validate(config).trainer, world) == zero["stage"]
    out = str(tmp_path / "out")

    def runs(*args: Any) -> list[Any]:
        return run_ranks(train_tiny, world, *args) if world > 1 else [train_tiny(None, *args)]

    assert runs(out, config, ("SIGTERM", 4, 0)) == [85] * world
    for run in runs(out, config):
        assert not isinstance(run, int | str), run
        torch.testing.assert_close(run[0], joint[0], rtol=1e-5, atol=1e-5)
        for name in joint[1].keys() - {"calls"}:
            torch.testing.assert_close(run[1][name], joint[1][name], rtol=1e-5, atol=2e-6)
