"""pipeline/joint_batch_norm.py: ranks give what torch's batch normalisation gives one process on all their samples."""

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torchvision.ops import FrozenBatchNorm2d

from mmfoundry.pipeline.distributed import rank_in
from mmfoundry.pipeline.errors import ConfigError
from mmfoundry.pipeline.joint_batch_norm import join_batch_norms
from tests.ranks import run_ranks

CHANNELS, STEPS = 3, 2
UNEQUAL = {2: [1, 6], 3: [2, 4, 1]}  # samples of each rank, 7 in all


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "plain":
        norm: nn.Module = nn.BatchNorm2d(CHANNELS)
    elif kind == "activated":
        norm = BatchNormAct2d(CHANNELS, act_layer=nn.GELU)
    elif kind == "cumulative":
        norm = nn.BatchNorm2d(CHANNELS, momentum=None)
    elif kind == "bare":
        norm = nn.BatchNorm2d(CHANNELS, affine=False, track_running_stats=False)
    else:
        assert kind == "vectors"
        norm = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(CHANNELS * 4))
    model = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), norm, nn.Flatten(), nn.Linear(CHANNELS * 4, 2)).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return model


def trained(group: ProcessGroup | None, kind: str, counts: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Of this rank, summed losses and gradients of each weight and of its samples, step by step; and the buffers."""
    model = make(kind)
    names = [*model.state_dict()]
    part = join_batch_norms(model, group)
    found = []
    rank = rank_in(group)
    for step in range(STEPS):
        x = 5 + 2 * torch.randn(sum(counts), CHANNELS, 2, 2, dtype=torch.float64, generator=torch.manual_seed(step))
        mine = slice(None) if group is None else slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        given = x[mine].clone().requires_grad_()
        loss = (model(given) ** 3).sum()
        found += [loss.detach(), *torch.autograd.grad(loss, [given, *model.parameters()])]
    assert [*model.state_dict()] == names
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        evaluated = model.eval()(x[:1])  # the running statistics, by one rank alone
    part()
    with torch.no_grad():
        assert torch.equal(evaluated, model(x[:1])) or kind == "bare"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return found, [value.clone() for value in model.buffers()]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", ["plain", "activated", "cumulative", "bare", "vectors"])
def test_ranks_with_unequally_many_samples_give_one_process(kind: str, world: int) -> None:
    counts = UNEQUAL[world]
    expected, buffers = trained(None, kind, counts)
    ranks = run_ranks(trained, world, kind, counts)
    per_step = len(expected) // STEPS
    for position, whole in enumerate(expected):
        parts = [found[position] for found, _ in ranks]
        joint = torch.cat(parts) if position % per_step == 1 else torch.stack(parts).sum(0)  # 1: of the samples
        torch.testing.assert_close(joint, whole, rtol=1e-9, atol=1e-9)  # fp64: only the order of the sums differs
    for _, kept in ranks:
        torch.testing.assert_close(kept, buffers, rtol=1e-12, atol=1e-12)
        assert all(torch.equal(*pair) for pair in zip(kept, ranks[0][1], strict=True))


def half_precision(group: ProcessGroup | None) -> tuple[torch.dtype, Tensor, Tensor]:
    norm = nn.BatchNorm2d(CHANNELS)
    join_batch_norms(norm, group)
    whole = torch.randn(8, CHANNELS, 2, 2, generator=torch.manual_seed(1)).bfloat16()
    x = (whole if group is None else whole.chunk(2)[rank_in(group)]).requires_grad_()
    found = norm(x)
    (grad,) = torch.autograd.grad((found.float() ** 3).sum(), x)
    assert grad.dtype == torch.bfloat16
    return found.dtype, found.detach(), grad


def test_sixteen_bits_stay_sixteen_bits() -> None:
    dtype, whole, grad = half_precision(None)
    ranks = run_ranks(half_precision, 2)
    assert {dtype, *(each[0] for each in ranks)} == {torch.bfloat16}
    # bf16 has 8 bits: neighbouring values differ by 2^-8 of theirs
    torch.testing.assert_close(torch.cat([each[1] for each in ranks]), whole, rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(torch.cat([each[2] for each in ranks]), grad, rtol=2**-5, atol=2**-5)


class Doubling(nn.BatchNorm2d):
    """Does more than torch's, in a way that nobody knows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def what_is_left_alone(group: ProcessGroup | None) -> str:
    frozen = nn.Sequential(FrozenBatchNorm2d(CHANNELS), nn.LayerNorm(4))
    join_batch_norms(frozen, group)
    assert all("forward" not in vars(each) for each in frozen.modules())
    model = nn.Sequential(nn.BatchNorm2d(CHANNELS), Doubling(CHANNELS))
    try:
        join_batch_norms(model, group)
    except ConfigError as error:
        assert all("forward" not in vars(each) for each in model.modules())
        return str(error)
    return ""


def test_what_is_frozen_is_left_alone_and_what_is_unknown_refused() -> None:
    assert what_is_left_alone(None) == ""
    for said in run_ranks(what_is_left_alone, 2):
        assert said.startswith("Doubling: a batch normalisation whose forward pass is not torch's")
        assert "\n" not in said
