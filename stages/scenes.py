"""Render composed scenes once, into shards that training, tuning and evaluation read like any other data."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from mmfoundry.data.pictures import load_pictures
from mmfoundry.data.scene_sets import SceneSet, SceneSource
from mmfoundry.data.shards import write_shard
from mmfoundry.pipeline.artifact import Artifact, write_atomic
from mmfoundry.pipeline.config import ArtifactRef, StageConfig
from mmfoundry.pipeline.distributed import all_reduce_sum
from mmfoundry.pipeline.progress import Progress
from mmfoundry.pipeline.stage import RunContext, Stage

_SET_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
SETS = "sets.json"


class ScenesConfig(StageConfig):
    """Which sets of scenes to render from which pictures."""

    pictures: ArtifactRef = Field(description="pictures to compose: `pictures-*.tar` as in data/samples")
    sets: dict[str, SceneSet] = Field(min_length=1, description="by name; each becomes a folder of shards")
    scenes_per_shard: int = Field(1000, ge=1, description="scenes")

    @field_validator("sets")
    @classmethod
    def _folder_names(cls, sets: dict[str, SceneSet]) -> dict[str, SceneSet]:
        bad = [name for name in sets if not _SET_NAME.fullmatch(name)]
        if bad:
            raise ValueError(f"{bad[0]!r} cannot name a set: use lower-case letters, digits, '-' and '_'")
        return sets


def run(config: ScenesConfig, context: RunContext) -> Artifact:
    """Write `<set>/shard-*.tar` for every set, and `sets.json`; shards finished by an earlier run are not made again.

    Shards are dealt out over the ranks. Every scene has a random generator of its own, so the bytes do not depend on
    how many ranks there are.

    Raises:
        MissingInput: there are no pictures.
        DamagedInput: a picture cannot be read.
        ConfigError: a set wants a concept or style that the pictures lack; raised before anything is rendered.
    """
    pictures = load_pictures(context.inputs["pictures"])
    sources = [SceneSource.of(name, spec, pictures) for name, spec in config.sets.items()]
    started = time.monotonic()
    rendered = 0
    mine = _shards(config, context)
    with context.progress(sum(stop - first for _, first, stop, _ in mine), "scenes", "scenes") as progress:
        for number, first, stop, path in mine:
            if path.exists():  # a shard under its own name is whole
                progress.advance(stop - first)
                continue
            write_shard(path, _counted(sources[number], config.seed, range(first, stop), progress))
            rendered += stop - first
    seconds = time.monotonic() - started
    totals = all_reduce_sum({"scenes": rendered, "speed": rendered / seconds}, context.runtime.group)
    if context.runtime.is_main:
        summaries = {source.name: source.summary() for source in sources}
        write_atomic(context.work / SETS, json.dumps(summaries, indent=2, ensure_ascii=False) + "\n")
    return context.finish(
        {
            "scenes": sum(spec.count for spec in config.sets.values()),
            "rendered": totals["scenes"],  # fewer than `scenes` after a cut-off run
            "scenes_per_second": totals["speed"],
        }
        | {f"{name}_scenes": spec.count for name, spec in config.sets.items()}
    )


def _shards(config: ScenesConfig, context: RunContext) -> list[tuple[int, int, int, Path]]:
    """This rank's shards: number of the set, first scene, end of its scenes, path."""
    shards = []
    for number, (name, spec) in enumerate(config.sets.items()):
        for shard, first in enumerate(range(0, spec.count, config.scenes_per_shard)):
            stop = min(first + config.scenes_per_shard, spec.count)
            shards.append((number, first, stop, context.work / name / f"shard-{shard:05d}.tar"))
    return shards[context.runtime.rank :: context.runtime.world_size]


def _counted(source: SceneSource, seed: int, indices: range, progress: Progress) -> Iterator[dict[str, Any]]:
    for index in indices:
        yield source.sample(seed, index)
        progress.advance()


STAGE = Stage("scenes", ScenesConfig, run, "render composed scenes with captions, questions and answers")
