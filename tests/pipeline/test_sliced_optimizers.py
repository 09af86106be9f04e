"""Optimizers that look at whole tensors make the updates of stage 0 whatever ZeRO leaves of the tensors on a rank."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.distributed import init_runtime, rank_in, world_in
from mmfoundry.pipeline.engine import Engine
from mmfoundry.pipeline.engine_config import EngineConfig, zero_stage
from mmfoundry.pipeline.errors import ConfigError
from mmfoundry.pipeline.optimizers import OptimizerConfig, build_optimizer, decay_groups, looks_at_whole_tensors
from mmfoundry.pipeline.slices import Cut, Partition, Shares, Slice
from mmfoundry.pipeline.trainer_config import TrainerConfig
from tests.pipeline.tiny_training import train_tiny, trainer_config
from tests.ranks import run_ranks

RATES = {"lamb": 0.05, "muon": 0.05, "sgd_sai": 5.0}
NAMES = sorted(RATES)
ROWS = 12
CPU = {"device": "cpu"}
SLOW = pytest.mark.slow


class Tower(nn.Module):
    """Matrices of odd sizes, so that every cut goes through some of them; a kernel, a frozen one, one without use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.patches = nn.Conv2d(3, 7, 2)
        self.layers = nn.ModuleList(nn.Linear(fan_in, fan_out) for fan_in, fan_out in pairwise([7, 13, 13, 5, 11]))
        self.frozen = nn.Linear(11, 11).requires_grad_(False)
        self.position = nn.Parameter(torch.randn(1, 7))
        self.unused = nn.Parameter(torch.randn(5, 3))
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, batch: dict[str, Any]) -> Tensor:
        hidden = self.patches(batch["x"]).flatten(1) + self.position
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        return self.frozen(hidden) * self.scale


def mean_square(output: Tensor, batch: dict[str, Any], group: ProcessGroup | None) -> dict[str, Tensor]:
    return {"loss": (output.float() - batch["y"]).square().mean()}


def groups_of(model: Tower) -> list[dict[str, Any]]:
    """The lower half at a quarter of the rate; among the rest, what is no hidden matrix."""
    named = dict(model.named_parameters())
    lower = {name for name in named if name.startswith(("patches", "layers.0"))}
    upper = named.keys() - lower - {"unused"}
    groups = decay_groups(((n, named[n]) for n in named if n in lower), 0.1, lr_scale=0.25)
    groups += decay_groups(((n, named[n]) for n in named if n in upper), 0.1, {"position"})
    return [*groups, {"params": [model.unused], "weight_decay": 0.2, "matrices": False}]


def train_tower(group: ProcessGroup | None, name: str, changes: dict[str, Any], steps: int = 5) -> dict[str, Tensor]:
    model = Tower()
    trained = parse(EngineConfig, {"train_batch_size": ROWS, "gradient_clipping": 0.1} | changes)
    optimizer = OptimizerConfig(type=name, lr=RATES[name])
    runtime = init_runtime()
    stage = zero_stage(trained, runtime.world_size)
    engine = Engine(
        trained, model, mean_square, lambda each: build_optimizer(each, optimizer, stage), groups_of(model), runtime
    )
    if trained.precision == "fp16":
        engine.restore_loss_scale(1024.0, 0)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        x, y = torch.randn(ROWS, 3, 2, 2, generator=generator), torch.randn(ROWS, 11, generator=generator)
        micro = trained.micro_batches(world_in(group))[0]
        mine = {"x": x[rank_in(group) :: world_in(group)], "y": y[rank_in(group) :: world_in(group)]}
        for start in range(0, len(mine["x"]), micro):
            engine.accumulate({key: value[start : start + micro] for key, value in mine.items()})
        engine.step(1.0 / (1 + step))
    engine.close()
    return {key: value.detach().clone() for key, value in model.named_parameters()}


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Rounding only: sums in another order, over five steps."""
    assert found.keys() == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(
            value, expected[key], rtol=1e-5, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.fixture(scope="module")
def at_stage_0() -> dict[str, dict[str, Tensor]]:
    """What one process makes of the whole tensors, by optimizer."""
    found = {name: train_tower(None, name, {}) for name in NAMES}
    before = dict(Tower().named_parameters())
    for weights in found.values():
        matrices = [key for key in weights if key.endswith(".weight")]
        still = {key for key in matrices if (weights[key] - before[key].detach()).abs().max() < 1e-3}
        assert still == {"frozen.weight"}
    return found


PLAIN: list[tuple[dict[str, Any], dict[str, Any]]] = [({"stage": stage}, {}) for stage in (1, 2, 3)]
WITH_MORE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"stage": 2}, {"train_micro_batch_size_per_gpu": 2}),
    ({"stage": 3}, {"grad_cache_chunk_size": 3}),
    ({"stage": 1, "offload_optimizer": CPU}, {}),
    ({"stage": 3, "offload_optimizer": CPU, "offload_param": CPU}, {"train_micro_batch_size_per_gpu": 3}),
]


@pytest.mark.parametrize(
    ("name", "zero", "more"),
    [
        *((name, *each) for name in NAMES for each in PLAIN),
        *(("muon", *each) for each in WITH_MORE),
        *(pytest.param(name, *each, marks=SLOW) for name in ("lamb", "sgd_sai") for each in WITH_MORE),
    ],
)
def test_two_ranks_make_the_updates_of_stage_0(
    name: str, zero: dict[str, Any], more: dict[str, Any], at_stage_0: dict[str, dict[str, Tensor]]
) -> None:
    for weights in run_ranks(train_tower, 2, name, more | {"zero_optimization": zero}):
        assert_alike(weights, at_stage_0[name])


@SLOW
@pytest.mark.parametrize("world", [3, 4])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_more_ranks_make_the_updates_of_stage_0(
    name: str, stage: int, world: int, at_stage_0: dict[str, dict[str, Tensor]]
) -> None:
    for weights in run_ranks(train_tower, world, name, {"zero_optimization": {"stage": stage}}):
        assert_alike(weights, at_stage_0[name])


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_one_process_that_offloads_makes_the_updates_of_stage_0(
    name: str, stage: int, at_stage_0: dict[str, dict[str, Tensor]]
) -> None:
    zero = {"stage": stage, "offload_optimizer": CPU}
    assert_alike(train_tower(None, name, {"zero_optimization": zero}), at_stage_0[name])


@pytest.mark.parametrize(
    ("name", "precision"), [("muon", "bf16"), ("muon", "fp16"), ("lamb", "fp16"), ("sgd_sai", "bf16")]
)
def test_low_precision_has_the_updates_of_stage_0_on_as_many_ranks(name: str, precision: str) -> None:
    expected = run_ranks(train_tower, 2, name, {"precision": precision})[0]
    for stage in (1, 3):
        changes = {"precision": precision, "zero_optimization": {"stage": stage}}
        assert_alike(run_ranks(train_tower, 2, name, changes)[1], expected)


def tiny(name: str, stage: int, **changes: Any) -> dict[str, Any]:
    optimizer = {"type": name, "lr": 0.02, "weight_decay": 0.1}
    return {"trainer": trainer_config(optimizer=optimizer, zero_optimization={"stage": stage}, **changes)}


def states(out: Path) -> dict[str, Tensor]:
    """Those in the newest checkpoint of a run that was told to stop."""
    return load_file(max(out.with_name("out.work").glob("checkpoints/train/step-*")) / "optimizer.safetensors")


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_holds_the_states_of_stage_0(name: str, stage: int, tmp_path: Path) -> None:
    stop = ("SIGTERM", 3, 0)
    ema = {"ema": {"decay": 0.5}}
    assert train_tiny(None, str(tmp_path / "whole" / "out"), tiny(name, 0, **ema), stop) == 85
    assert run_ranks(train_tiny, 2, str(tmp_path / "cut" / "out"), tiny(name, stage, **ema), stop) == [85, 85]
    found, expected = states(tmp_path / "cut" / "out"), states(tmp_path / "whole" / "out")
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in expected.items()}
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("muon", 1),
        ("sgd_sai", 2),
        ("lamb", 3),
        *(pytest.param(*each, marks=SLOW) for each in [("muon", 2), ("muon", 3), ("lamb", 1), ("sgd_sai", 3)]),
    ],
)
def test_a_cut_off_run_goes_on_bit_for_bit(name: str, stage: int, tmp_path: Path) -> None:
    config = tiny(name, stage, max_steps=6, ema={"decay": 0.5})
    whole = run_ranks(train_tiny, 2, str(tmp_path / "whole"), config)
    assert run_ranks(train_tiny, 2, str(tmp_path / "cut"), config, ("SIGTERM", 2, 1)) == [85, 85]
    for (losses, weights), (expected, values) in zip(
        run_ranks(train_tiny, 2, str(tmp_path / "cut"), config), whole, strict=True
    ):
        assert losses == expected
        assert all(torch.equal(weights[key], value) for key, value in values.items())


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_then_one_then_four_and_from_zero_1_to_3(name: str, tmp_path: Path) -> None:
    joint = train_tiny(None, str(tmp_path / "joint"), tiny(name, 0))
    assert not isinstance(joint, int | str)
    out = str(tmp_path / "out")
    assert run_ranks(train_tiny, 2, out, tiny(name, 1), ("SIGTERM", 2, 1)) == [85, 85]
    assert train_tiny(None, out, tiny(name, 1), ("SIGTERM", 4, 0)) == 85
    for losses, weights in run_ranks(train_tiny, 4, out, tiny(name, 3)):
        torch.testing.assert_close(losses, joint[0], rtol=1e-5, atol=1e-5)
        for key in joint[1].keys() - {"calls"}:
            torch.testing.assert_close(weights[key], joint[1][key], rtol=1e-5, atol=2e-6)


SHAPES = [(3, 6), (2, 5), (3, 4), (4, 4), (1, 1), (2, 3, 4), (1, 2)]  # the second, fourth and sixth are cut


def partition_by_hand(group: ProcessGroup, shapes: list[tuple[int, ...]]) -> Partition:
    """Tensors end to end in partitions of 25 numbers: 0, 1, 2, ...; the last ones may be empty."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    size, first, cuts = 25, 0, []
    for shape in shapes:
        parameter = nn.Parameter(torch.empty(shape))
        places = range(first, first + parameter.numel())
        held = [[place for place in places if place // size == each] for each in range(world)]
        slices = [Slice(each[0] % size, len(each)) if each else Slice(0, 0) for each in held]
        cuts.append(Cut(parameter, shape, tuple(slices)))
        first += parameter.numel()
    assert first <= size * world
    return Partition(torch.arange(size * rank, size * (rank + 1)).float(), tuple(cuts), 0, group, rank)


def add_their_sums(group: ProcessGroup, shapes: list[tuple[int, ...]], largest: int) -> tuple[Tensor, list[Any], int]:
    """Add to each number the sum of its tensor; and which tensors were seen here, and in how many rounds."""
    partition = partition_by_hand(group, shapes)
    shares = Shares(partition, lambda shape: float(torch.Size(shape).numel()), largest)
    seen = []

    def compute(whole: Tensor) -> Tensor:
        seen.append((tuple(whole.shape), whole.flatten().tolist()))
        return whole + whole.sum()

    def write(cut: Cut, update: Tensor) -> None:
        partition.mine(cut, partition.flat).copy_(update)

    shares.on_whole(lambda cut: partition.mine(cut, partition.flat), compute, write)
    return partition.flat, seen, len(shares.rounds)


@pytest.mark.parametrize(("largest", "rounds"), [(1, 3), (7, 2), (1000, 1)])
def test_each_tensor_is_computed_whole_by_one_rank(largest: int, rounds: int) -> None:
    expected, first, wholes = torch.arange(200.0), 0, []
    for shape in SHAPES:
        numel = torch.Size(shape).numel()
        wholes.append((shape, expected[first : first + numel].tolist()))
        expected[first : first + numel] += expected[first : first + numel].sum()
        first += numel
    answers = run_ranks(add_their_sums, 4, SHAPES, largest)
    torch.testing.assert_close(torch.cat([flat for flat, *_ in answers])[:first], expected[:first], rtol=0, atol=0)
    assert sorted(each for _, seen, _ in answers for each in seen) == sorted(wholes)
    assert {count for *_, count in answers} == {rounds}


def test_ranks_without_a_tensor_wait_for_nobody() -> None:
    answers = run_ranks(add_their_sums, 4, [(6, 7)], 1000)
    assert [len(seen) for _, seen, _ in answers] == [1, 0, 0, 0]
    assert [len(seen) for _, seen, _ in run_ranks(add_their_sums, 4, [(2, 2)], 1000)] == [1, 0, 0, 0]


@pytest.mark.parametrize("name", NAMES)
def test_partitions_on_a_disk_are_refused(name: str) -> None:
    zero = {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/scratch"}}
    with pytest.raises(ConfigError, match=rf"optimizer.type {name} .*offload_optimizer.device nvme; set that to cpu"):
        parse(TrainerConfig, trainer_config(optimizer={"type": name}, zero_optimization=zero))
    assert parse(TrainerConfig, trainer_config(zero_optimization=zero)).optimizer.type == "adamw"
    assert looks_at_whole_tensors(name)
