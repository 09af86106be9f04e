"""A model, data and a stage small enough to train in milliseconds, for the tests of the trainer."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from mmfoundry.pipeline.artifact import Artifact
from mmfoundry.pipeline.config import StageConfig
from mmfoundry.pipeline.distributed import init_runtime, world_in
from mmfoundry.pipeline.errors import MmfoundryError
from mmfoundry.pipeline.metrics import read_metrics
from mmfoundry.pipeline.stage import RunContext, Stage, run_stage
from mmfoundry.pipeline.trainer import train
from mmfoundry.pipeline.trainer_config import TrainerConfig

VOCABULARY, WIDTH, LENGTH = 37, 6, 5


class TinyLanguageModel(nn.Module):
    """Every kind of parameter an engine meets: a matrix, a tied one, a vector, a 0-d, a frozen, an unused; a buffer."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Parameter(torch.ones(WIDTH), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(3, 2))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: dict[str, Any]) -> Tensor:
        if self.training:
            self.calls += 1
        hidden = self.embedding(batch["tokens"]) * self.frozen
        hidden = self.norm(hidden + self.dropout(torch.tanh(self.mix(hidden))))
        return self.head(hidden) * self.scale


class TokenLoss:
    """Cross-entropy per token over all ranks; rows have different numbers of tokens."""

    def __call__(self, output: Tensor, batch: dict[str, Any], group: ProcessGroup | None = None) -> dict[str, Tensor]:
        summed = F.cross_entropy(output.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100, reduction="sum")
        tokens = (batch["labels"] != -100).sum()
        if group is not None:
            dist.all_reduce(tokens, group=group)
        loss = summed * world_in(group) / tokens.clamp(min=1)
        return {"loss": loss, "tokens_seen": tokens.float()}

    def weight(self, batch: dict[str, Any]) -> int:
        return int((batch["labels"] != -100).sum())


class TinyLoader:
    """Endless rows, each a pure function of its position; `bad` is the position of a row that makes the loss nan."""

    def __init__(self, batch_size: int, rank: int, world: int, bad: int | None = None) -> None:
        self.batch_size, self.rank, self.world, self.bad = batch_size, rank, world, bad
        self.consumed = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            positions = range(self.consumed + self.rank, self.consumed + self.batch_size, self.world)
            self.consumed += self.batch_size
            yield self._batch(list(positions))

    def _batch(self, positions: list[int]) -> dict[str, Any]:
        rows = []
        for position in positions:
            generator = torch.Generator().manual_seed(position)
            tokens = torch.randint(0, VOCABULARY, (LENGTH + 1,), generator=generator)
            labels = tokens[1:].clone()
            labels[1 + position % LENGTH :] = -100  # one to five tokens a row
            rows.append((tokens[:-1], labels))
        tokens, labels = (torch.stack(part) for part in zip(*rows, strict=True))
        if self.bad in positions:
            tokens = tokens.float().fill_(float("nan"))  # an index that is not a number fails loudly, see `Poisoned`
        return {"__key__": [f"row-{p}" for p in positions], "tokens": tokens, "labels": labels}

    def state_dict(self) -> dict[str, Any]:
        return {"samples_consumed": self.consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.consumed = state["samples_consumed"]


class Poisoned(TinyLanguageModel):
    """Answers a batch whose tokens are not numbers with outputs that are not numbers, or far too large."""

    def __init__(self, dropout: float = 0.0, leap: float = torch.nan) -> None:
        super().__init__(dropout)
        self.leap = leap

    def forward(self, batch: dict[str, Any]) -> Tensor:
        if batch["tokens"].is_floating_point():
            whole = batch | {"tokens": torch.zeros_like(batch["tokens"], dtype=torch.int64)}
            return super().forward(whole) * self.leap
        return super().forward(batch)


class TinyConfig(StageConfig):
    trainer: TrainerConfig
    dropout: float = 0.0
    bad: int | None = None
    leap: float | None = None


# What a test has happen after a step, by name of the signal that this process then gets; not part of the config.
SIGNAL_AFTER: tuple[str, int] | None = None


def run(config: TinyConfig, context: RunContext) -> Artifact:
    torch.manual_seed(config.seed)
    model = TinyLanguageModel(config.dropout)
    if config.bad is not None:
        torch.manual_seed(config.seed)
        model = Poisoned(config.dropout, torch.nan if config.leap is None else config.leap)
    runtime = context.runtime
    loader = TinyLoader(
        config.trainer.samples_per_fetch(runtime.world_size), runtime.rank, runtime.world_size, config.bad
    )

    def after_step() -> dict[str, float]:
        step = loader.state_dict()["samples_consumed"] // config.trainer.train_batch_size
        if SIGNAL_AFTER is not None and SIGNAL_AFTER[1] == step:
            os.kill(os.getpid(), signal.Signals[SIGNAL_AFTER[0]])
        return {}

    def evaluate(model: Any, step: int) -> dict[str, float]:
        torch.rand(3), np.random.rand(3), random.random()  # must not matter to the steps that follow
        weights = [weight.detach().double().cpu().flatten() for weight in model.parameters() if weight.requires_grad]
        return {
            "step_squared": step**2,
            "training": model.training + torch.is_grad_enabled(),
            "norm": float(torch.cat(weights).norm()),
        }

    result = train(
        config.trainer,
        model=model,
        objective=TokenLoss(),
        loader=loader,
        context=context,
        metrics=after_step,
        evaluate=evaluate,
    )
    if runtime.is_main:
        torch.save(model.state_dict(), context.work / "model.pt")
    return context.finish(result.as_metrics())


TINY = Stage("tiny", TinyConfig, run, "train a tiny model")


def trainer_config(**changes: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "train_batch_size": 12,
        "max_steps": 8,
        "optimizer": {"lr": 0.05, "weight_decay": 0.01},
        "scheduler": {"type": "cosine", "warmup_steps": 2},
        "gradient_clipping": 0.5,  # small enough that every step is clipped
        "logging_steps": 1,
        "save_steps": 3,
    }
    return defaults | changes


def train_tiny(
    group: ProcessGroup | None, output: str, config: dict[str, Any], signal_after: tuple[str, int, int] | None = None
) -> tuple[list[float], dict[str, Tensor]] | int | str:
    """Run the stage here, on every rank.

    Args:
        group: not read; `run_ranks` passes it.
        output: the artifact's folder.
        config: as a tree.
        signal_after: name of a signal, step, rank: that rank sends itself the signal after that step.
    Returns:
        The loss of each step and the final weights; or the exit code, or the text of the user error, that ended it.
    """
    global SIGNAL_AFTER
    runtime = init_runtime()
    SIGNAL_AFTER = signal_after[:2] if signal_after is not None and signal_after[2] == runtime.rank else None
    try:
        artifact = run_stage(TINY, TinyConfig.model_validate(config), Path(output), runtime)
    except SystemExit as stop:
        return int(str(stop.code))
    except MmfoundryError as error:
        return str(error)
    weights = torch.load(artifact.path / "model.pt", weights_only=True)
    lines = list(read_metrics(artifact.path / "metrics.jsonl"))
    return [line["loss"] for line in lines if "loss" in line], weights
