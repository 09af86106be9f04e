import pytest
import torch
from torch import nn

from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.errors import ConfigError
from mmfoundry.pipeline.optimizers import OPTIMIZERS, OptimizerConfig, decay_groups


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


def test_every_optimizer_makes_a_quadratic_smaller() -> None:
    for name in OPTIMIZERS:
        weight = nn.Parameter(torch.full((4, 4), 3.0))
        groups = decay_groups([("weight", weight)], 0.0)
        optimizer = OPTIMIZERS[name](groups, OptimizerConfig(type=name, lr=0.1))
        for _ in range(100):
            optimizer.zero_grad()
            weight.square().sum().backward()
            optimizer.step()
        assert weight.abs().max() < 0.5, name


def test_unknown_optimizer_names_the_key_and_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"optimizer.type: unknown optimizer 'adamv'; did you mean adamw\?"):
        parse(OptimizerConfig, {"type": "adamv"}, prefix="optimizer")
    with pytest.raises(ConfigError, match=r"betas"):
        parse(OptimizerConfig, {"betas": [0.9, 1.0]})
