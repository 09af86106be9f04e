"""The `align` phase of `instruct`, measured on pictures held out while it trains."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from pydantic import Field

from mmfoundry.data.decode import UnreadableSample
from mmfoundry.data.named_tiles import NamedTiles, collate
from mmfoundry.data.reader import Pool
from mmfoundry.evals.samples import Samples, select
from mmfoundry.evals.task import joint_rows
from mmfoundry.models.aligner import AlignmentLoss
from mmfoundry.pipeline.config import Config, ShardsRef
from mmfoundry.pipeline.engine import autocast
from mmfoundry.pipeline.errors import DamagedInput
from mmfoundry.pipeline.stage import RunContext
from mmfoundry.pipeline.trainer_config import TrainerConfig
from mmfoundry.pipeline.updates import to_device

NUMBERS = ("loss", "accuracy", "distance")


class AlignEvaluationConfig(Config):
    """Pictures that the connector does not learn from; every name in them is one that it learns."""

    data: ShardsRef = Field(description="scenes or named pictures, as in `align.data`")
    limit: int | None = Field(None, ge=1, description="keep this many pictures, the first in shard order; null: all")
    batch_size: int = Field(64, ge=1, description="pictures a pass through vision tower and connector")


def while_aligning(
    config: AlignEvaluationConfig,
    context: RunContext,
    encode: NamedTiles,
    objective: AlignmentLoss,
    trainer: TrainerConfig,
) -> Callable[[Any, int], dict[str, float]]:
    """What the trainer calls to measure an `Aligner`: loss and accuracy over all tiles of all ranks alike.

    What goes through the model together is fixed, so the numbers do not depend on how many ranks there are.

    Args:
        config: what is measured.
        context: of the running stage.
        encode: how pictures become tiles and names.
        objective: of the phase.
        trainer: of the phase; what is measured is computed in its precision.

    Returns:
        (model, step) to `loss`, `accuracy`, `distance`. DamagedInput: a picture cannot be read, or has another name.
    """

    @cache
    def samples() -> Samples:
        return select(Pool(context.shards("align.eval.data"), name=config.data), {}, config.limit)

    def evaluate(model: Any, step: int) -> dict[str, float]:
        held, runtime = samples(), context.runtime
        starts = range(0, len(held), config.batch_size)
        found = np.zeros((len(starts), 1 + len(NUMBERS)))
        for number in range(runtime.rank, len(starts), runtime.world_size):
            rows = range(starts[number], min(starts[number] + config.batch_size, len(held)))
            batch = to_device(collate([_encoded(held, row, encode) for row in rows]), runtime.device)
            with autocast(trainer.precision, runtime.device):
                values, tiles = objective(model(batch), batch), len(batch["target"])
            found[number] = [tiles, *(tiles * float(values[name]) for name in NUMBERS)]
        tiles, *sums = joint_rows(found, runtime).sum(0)
        return {name: total / tiles for name, total in zip(NUMBERS, sums, strict=True)}

    return evaluate


def _encoded(held: Samples, row: int, encode: NamedTiles) -> dict[str, Any]:
    try:
        return encode(held.sample(row), np.random.default_rng(0))
    except UnreadableSample as error:
        raise DamagedInput(f"align.eval: sample {held.key(row)}: {error}; an evaluation needs every sample") from error
