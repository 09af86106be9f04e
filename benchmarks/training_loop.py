"""What our training loop costs over a plain PyTorch loop.

    python benchmarks/training_loop.py [--quick] [--json PATH] [--device cpu|cuda]

Both train the same CLIP of 12M parameters on the same batches with the same clipping and AdamW, in turn, step by step
in one process, so that a busy machine slows both alike. Ours adds what a run needs: the DeepSpeed engine, a check of
every loss and gradient before the update, a line of metrics a step, progress, and the answer to a stop signal. The
plain loop uses what PyTorch's own pages name as fastest: fused AdamW, `zero_grad(set_to_none=True)`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tables import Row, print_table, smaller, write_rows
from torch import nn

from mmfoundry.models.clip import CLIP, ClipConfig
from mmfoundry.models.objectives.info_nce import info_nce
from mmfoundry.models.text import TextConfig
from mmfoundry.models.vision import VisionConfig
from mmfoundry.pipeline.artifact import Artifact
from mmfoundry.pipeline.config import StageConfig
from mmfoundry.pipeline.distributed import init_runtime
from mmfoundry.pipeline.optimizers import OptimizerConfig, decay_groups
from mmfoundry.pipeline.stage import RunContext, Stage, run_stage
from mmfoundry.pipeline.trainer import train
from mmfoundry.pipeline.trainer_config import TrainerConfig
from mmfoundry.pipeline.updates import to_device

MODEL = ClipConfig(
    embed_dim=192,
    vision_cfg=VisionConfig(image_size=64, patch_size=16, width=192, layers=4, head_width=64),
    text_cfg=TextConfig(context_length=32, vocab_size=49408, width=192, heads=3, layers=2),
)
OPTIMIZER = OptimizerConfig()
WARM_UP = 3  # steps not counted: allocators and the optimizer's states


def make_batch(rows: int) -> dict[str, torch.Tensor]:
    """Random pixels and token ids, (rows, 3, 64, 64) uint8 and (rows, 16) int32."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (rows, 3, 64, 64), dtype=torch.uint8, generator=generator)
    return {"image": image, "text": torch.randint(0, 49408, (rows, 16), dtype=torch.int32, generator=generator)}


def plain_loop(device: torch.device) -> Callable[[dict[str, torch.Tensor]], float]:
    """One step of a plain PyTorch loop; returns the loss."""
    model = CLIP.from_seed(MODEL, 0).to(device).train()
    groups = decay_groups(model.named_parameters(), OPTIMIZER.weight_decay, model.no_weight_decay())
    optimizer = torch.optim.AdamW(groups, lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps, fused=True)

    def step(batch: dict[str, torch.Tensor]) -> float:
        batch = to_device(batch, device)
        loss = info_nce(model(batch), batch, None)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


class InTurn:
    """Our loader; between two of our steps it times one of the plain loop's."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self._batch, self._device = make_batch(rows), device
        self._plain = plain_loop(device)
        self.ours: list[float] = []
        self.peer: list[float] = []

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            start = time.perf_counter()
            self._plain(self._batch)
            self._wait()
            self.peer.append(time.perf_counter() - start)
            start = time.perf_counter()
            yield self._batch
            self._wait()
            self.ours.append(time.perf_counter() - start)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def state_dict(self) -> dict[str, Any]:
        """Nothing to remember."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to go back to."""


class BenchmarkConfig(StageConfig):
    """What is timed."""

    trainer: TrainerConfig


def measure(rows: int, steps: int) -> Row:
    """Median time of a step, ours and the plain loop's, in milliseconds."""
    runtime = init_runtime()
    loader = InTurn(rows, runtime.device)

    def run(config: BenchmarkConfig, context: RunContext) -> Artifact:
        model = CLIP.from_seed(MODEL, 0)
        groups = decay_groups(model.named_parameters(), OPTIMIZER.weight_decay, model.no_weight_decay())
        train(config.trainer, model=model, objective=info_nce, loader=loader, context=context, param_groups=groups)
        return context.finish({})

    trainer = {"train_batch_size": rows, "max_steps": steps + WARM_UP + 1, "save_steps": 0}
    config = BenchmarkConfig.model_validate({"trainer": trainer})
    with tempfile.TemporaryDirectory() as folder:
        run_stage(Stage("benchmark", BenchmarkConfig, run, "time the loop"), config, Path(folder) / "out", runtime)
    ours, peer = (1e3 * statistics.median(times[WARM_UP:]) for times in (loader.ours, loader.peer[: len(loader.ours)]))
    work = f"step of a 12M CLIP, batch {rows}, fp32, {runtime.device.type}"
    return smaller(work, ours, peer, "ms", digits=2)


def main() -> None:
    """Run the rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    batch_sizes, steps = ([16, 32], 16) if arguments.quick else ([16, 32, 128], 60)
    rows = [measure(rows, steps) for rows in batch_sizes]
    print_table(rows, width=48, peer="PyTorch")
    write_rows(arguments.json, rows)


if __name__ == "__main__":
    main()
