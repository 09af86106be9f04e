"""Numbers that are read every few steps: peaks, norms, work."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mmfoundry.pipeline.distributed import Runtime
from mmfoundry.pipeline.gauges import PEAK_TFLOPS, Gauges, Work, norms_by_part, peak_tflops


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA A100-SXM4-80GB", "fp16", 312.0),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5),
        ("NVIDIA L40S", "bf16", 362.05),
        ("NVIDIA L4", "bf16", 121.0),
        ("Tesla V100-PCIE-16GB", "fp16", 112.0),
        ("Some Other Card", "bf16", None),
    ],
)
def test_a_devices_peak(name: str, precision: str, peak: float | None) -> None:
    assert peak_tflops(name, precision) == peak


def test_every_row_of_the_table_can_be_reached() -> None:
    for words, half, full in PEAK_TFLOPS:
        assert peak_tflops(f"NVIDIA {' '.join(words)}", "bf16") == half
        assert full < half


def test_norms_are_those_of_the_parts() -> None:
    named = [("a.w", torch.tensor([3.0])), ("b", torch.tensor(2.0)), ("a.v", torch.tensor([[4.0]]))]
    assert {name: float(norm) for name, norm in norms_by_part(named, "norm").items()} == {"norm/a": 5, "norm/b": 2}


def test_a_window_counts_what_lies_in_it() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1))
    model[1].requires_grad_(False)
    nn.init.constant_(model[0].weight, -2.0)
    model[0].weight.grad = torch.tensor([[6.0]])
    gauges = Gauges(model, Runtime(world_size=4), "bf16", lambda batch: Work(batch["tokens"], 1e12))
    gauges.count([{"tokens": 7}])
    gauges.restart()
    gauges.count([{"tokens": 10}, {"tokens": 20}])
    engine: Any = SimpleNamespace(stage=0, loss_scale=2.0)
    gauges.before_update(engine)
    groups = [{"lr": 0.1, "part": "image"}, {"lr": 0.2, "part": "image"}, {"lr": 0.3}]
    line = gauges.read(2.0, groups)
    assert line.pop("memory_gb") > 0
    assert line == {
        "param_norm/0": 2.0,
        "grad_norm/0": 3.0,
        "lr/image": 0.2,
        "tokens_per_second": 60.0,
        "tflops_per_device": 1.0,
    }
    assert gauges.read(2.0, [])["tokens_per_second"] == 0
