"""Every optimizer of the registry learns, resumes, and says where it cannot be used; groups of parameters."""

from pathlib import Path

import pytest
import torch
from torch import nn

from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.errors import PREEMPTED_EXIT_CODE, ConfigError
from mmfoundry.pipeline.optimizers import OPTIMIZERS, OptimizerConfig, build_optimizer, decay_groups
from tests.pipeline.tiny_training import train_tiny, trainer_config
from tests.ranks import run_ranks


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.position = nn.Parameter(torch.ones(4, 3))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def test_vectors_scalars_and_declared_parameters_are_not_decayed() -> None:
    model = Model()
    decayed, spared = decay_groups(model.named_parameters(), 0.2, no_decay={"position"}, lr_scale=0.5)
    assert [p is model.linear.weight for p in decayed["params"]] == [True]
    assert {id(p) for p in spared["params"]} == {id(model.linear.bias), id(model.position), id(model.scale)}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.2, 0.0)
    assert decayed["lr_scale"] == spared["lr_scale"] == 0.5


def test_an_empty_group_is_left_out() -> None:
    model = nn.Linear(2, 2, bias=False)
    assert len(decay_groups(model.named_parameters(), 0.1)) == 1
    assert decay_groups(model.requires_grad_(False).named_parameters(), 0.1) == []


def test_a_declared_name_must_exist() -> None:
    with pytest.raises(ValueError, match=r"positoin"):
        decay_groups(Model().named_parameters(), 0.1, no_decay={"positoin"})


# A learning rate that takes each from 3 to near 0 in a hundred steps without decay.
RATES = {"adamw": 0.1, "lion": 0.1, "adan": 0.1, "lamb": 0.1, "muon": 0.3, "sgd_sai": 0.03}
STATES_PER_NUMBER = {"adamw": 2, "lion": 1, "adan": 4, "lamb": 2, "muon": 1, "sgd_sai": 1}


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_makes_a_quadratic_smaller(name: str) -> None:
    weight = nn.Parameter(torch.full((4, 4), 3.0) + 0.1 * torch.eye(4))
    optimizer = build_optimizer(decay_groups([("weight", weight)], 0.0), OptimizerConfig(type=name, lr=RATES[name]))
    for _ in range(100):
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()
    assert weight.abs().max() < 1
    kept = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor) and value.ndim]
    assert len(kept) == STATES_PER_NUMBER[name]


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_cut_off_run_goes_on_bit_for_bit_with_every_optimizer(name: str, tmp_path: Path) -> None:
    optimizer = {"type": name, "lr": 0.01, "weight_decay": 0.1}
    config = {"trainer": trainer_config(optimizer=optimizer, max_steps=6)}
    losses, weights = train_tiny(None, str(tmp_path / "whole"), config)
    assert train_tiny(None, str(tmp_path / "cut"), config, ("SIGTERM", 2, 0)) == PREEMPTED_EXIT_CODE
    resumed_losses, resumed = train_tiny(None, str(tmp_path / "cut"), config)
    assert resumed_losses == losses
    for key, value in weights.items():
        assert torch.equal(resumed[key], value), key


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_agrees_at_every_zero_stage(name: str, stage: int, tmp_path: Path) -> None:
    trainer = trainer_config(optimizer={"type": name, "lr": 3e-3, "weight_decay": 0.1}, max_steps=5)
    _, expected = train_tiny(None, str(tmp_path / "one"), {"trainer": trainer})
    cut_up = {"trainer": trainer | {"zero_optimization": {"stage": stage}}}
    for _, weights in run_ranks(train_tiny, 2, str(tmp_path / "two"), cut_up):
        for key, value in weights.items():
            if key != "calls":
                # lion's sign may turn on a rounding of a gradient near zero; nothing here is that near
                torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)


def test_muon_orthogonalises_matrices_only() -> None:
    model = Model()
    optimizer = build_optimizer(
        decay_groups(model.named_parameters(), 0.0, {"position"}), OptimizerConfig(type="muon", lr=0.5)
    )
    before = model.linear.weight.detach().clone()
    (model.linear(torch.randn(7, 3)).square().sum() + (model.position * torch.randn(4, 3)).sum()).backward()
    optimizer.step()
    change = (before - model.linear.weight.detach()) / (0.5 * 0.2 * 3**0.5)
    torch.testing.assert_close(torch.linalg.svdvals(change), torch.ones(2), rtol=0.3, atol=0.0)  # Newton-Schulz in bf16
    # Adam's first step has one size whatever the gradient; with Nesterov momentum 1 + 0.9 times the rate
    torch.testing.assert_close((model.position.detach() - 1).abs(), torch.full((4, 3), 0.95), rtol=1e-2, atol=0.0)


def test_sgd_sai_scales_with_the_first_gradient_alone() -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    optimizer = build_optimizer(
        decay_groups([("weight", weight)], 0.0), OptimizerConfig(type="sgd_sai", lr=0.1, momentum=0.0)
    )
    first, second = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    ratio = first.norm() / first.std()
    for grad in (first, second):
        weight.grad = grad.clone()
        optimizer.step()
    torch.testing.assert_close(weight.detach(), -0.1 * ratio * (first + second), rtol=1e-5, atol=1e-6)


def test_betas_and_momentum_fit_the_optimizer() -> None:
    assert OptimizerConfig(type="adan").betas == (0.98, 0.92, 0.99)
    assert OptimizerConfig(type="lion").betas == (0.9, 0.99)
    assert parse(OptimizerConfig, OptimizerConfig(type="muon").model_dump()) == OptimizerConfig(type="muon")
    with pytest.raises(ConfigError, match=r"adan has 3 betas, not 2"):
        parse(OptimizerConfig, {"type": "adan", "betas": [0.9, 0.98]})
    with pytest.raises(ConfigError, match=r"adamw has no momentum"):
        parse(OptimizerConfig, {"momentum": 0.9})


def test_unknown_optimizer_names_the_key_and_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"optimizer.type: unknown optimizer 'adamv'; did you mean adamw\?"):
        parse(OptimizerConfig, {"type": "adamv"}, prefix="optimizer")
    with pytest.raises(ConfigError, match=r"betas"):
        parse(OptimizerConfig, {"betas": [0.9, 1.0]})
