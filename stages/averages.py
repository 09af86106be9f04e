"""Models that a training leaves beside its last weights: a moving average, and soups of its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from safetensors.torch import load_file
from torch import Tensor

from mmfoundry.data.loader import Loader, Source
from mmfoundry.data.pairs import PairEncoder, pad_text
from mmfoundry.models.interop.any_clip import AnyClip, save_any_clip
from mmfoundry.models.objectives import OBJECTIVES
from mmfoundry.pipeline import checkpoint
from mmfoundry.pipeline.config import Config, ShardsRef
from mmfoundry.pipeline.distributed import all_reduce_sum
from mmfoundry.pipeline.ema import averaged_weights
from mmfoundry.pipeline.errors import ConfigError
from mmfoundry.pipeline.soups import greedy, uniform
from mmfoundry.pipeline.stage import CHECKPOINTS, RunContext
from mmfoundry.stages.captions import tokenizer_of

EMA_FOLDER, SOUP_FOLDER = "ema", "soup"
ROWS = 64  # pairs that are told apart at a time, when a soup is scored


class SoupConfig(Config):
    """A model whose weights are the mean of several checkpoints' (Wortsman et al. 2022, arXiv 2203.05482)."""

    type: Literal["uniform", "greedy"] = Field(
        "uniform", description="all candidates; or, best first, those that do not raise the loss on `data`"
    )
    checkpoints: int = Field(ge=2, description="candidates: this many newest checkpoints of the run")
    data: ShardsRef | None = Field(None, description="held-out pairs for greedy")
    samples: int = Field(1024, ge=ROWS, description="held-out pairs that greedy looks at, over all ranks")

    @model_validator(mode="after")
    def _measures(self) -> SoupConfig:
        if (self.type == "greedy") != (self.data is not None):
            raise ValueError("greedy needs data to measure on, uniform has no use for it")
        return self


def write_ema(model: AnyClip, context: RunContext, phase: str, seed: int | None) -> None:
    """Write the model with the moving average of its weights, from the last checkpoint, to `ema/`."""
    found = checkpoint.newest(_folder(context, phase), context.runtime, context.log.say)
    assert found is not None  # every training ends with one
    if context.runtime.is_main:
        state = {**model.state_dict(), **averaged_weights(found)}
        save_any_clip(model, context.work / EMA_FOLDER, seed=seed, state=state)


def write_soup(
    config: SoupConfig, model: AnyClip, context: RunContext, phase: str, seed: int | None
) -> dict[str, float]:
    """Write the soup to `soup/`; how many checkpoints are in it and, of a greedy one, its loss and the best single one.

    Raises:
        ConfigError: there are fewer checkpoints than are asked for.
    """
    paths = _candidates(_folder(context, phase), config.checkpoints)
    last = {name: value.detach().clone() for name, value in model.state_dict().items()}

    def read(path: Path) -> Mapping[str, Tensor]:
        return {name: value.cpu() for name, value in last.items()} | load_file(path / checkpoint.MODEL)

    numbers: dict[str, float] = {"soup_members": len(paths)}
    if config.type == "uniform":
        state = uniform([read(path) for path in paths])
    else:
        score = _Score(config, model, context)
        soup = greedy([partial(read, path) for path in paths], score)
        state = soup.state
        numbers = {"soup_members": len(soup.members), "soup_loss": -soup.score, "best_member_loss": -max(soup.scores)}
        model.load_state_dict(last)
    if context.runtime.is_main:
        save_any_clip(model, context.work / SOUP_FOLDER, seed=seed, state=dict(state))
    return numbers


class _Score:
    """Minus the InfoNCE loss on held-out pairs, each rank on its share of them."""

    def __init__(self, config: SoupConfig, model: AnyClip, context: RunContext) -> None:
        self._model, self._runtime = model, context.runtime
        self._batches = max(1, config.samples // (ROWS * self._runtime.world_size))
        sides = model.config
        self._loader_of = partial(
            Loader,
            [Source(context.shards("soup.data"), 1.0)],
            batch_size=ROWS * self._runtime.world_size,
            encode=PairEncoder(
                sides.vision_cfg.image_size,
                sides.text_cfg.context_length,
                scale=(1.0, 1.0),
                ratio=(1.0, 1.0),
                vocab_size=sides.text_cfg.vocab_size,
                tokenizer=tokenizer_of(sides.text_cfg) if sides.text_cfg.hf_tokenizer_name else None,
            ),
            finish=pad_text,
            rank=self._runtime.rank,
            world_size=self._runtime.world_size,
            device=self._runtime.device,
        )

    @torch.no_grad()
    def __call__(self, state: Mapping[str, Tensor]) -> float:
        self._model.load_state_dict(dict(state))
        self._model.eval()
        batches: Any = iter(self._loader_of())
        losses = [OBJECTIVES["info_nce"](self._model(batch), batch)["loss"] for batch in islice(batches, self._batches)]
        batches.close()
        summed = all_reduce_sum({"loss": torch.stack(losses).mean()}, self._runtime.group)["loss"]
        return -float(summed) / self._runtime.world_size


def _folder(context: RunContext, phase: str) -> Path:
    return context.work / CHECKPOINTS / phase


def _candidates(folder: Path, count: int) -> list[Path]:
    """The newest complete checkpoints, oldest first.

    Raises:
        ConfigError: there are fewer.
    """
    whole = (path for path in folder.glob("step-*") if not path.suffix and (path / checkpoint.STATE).is_file())
    found = sorted(whole, key=lambda path: int(path.name.removeprefix("step-")))
    if len(found) < count:
        raise ConfigError(
            f"soup.checkpoints is {count}, but the run left {len(found)}: lower trainer.save_steps or raise "
            "trainer.keep_checkpoints"
        )
    return found[-count:]
