"""What there is to run and to choose from: stages by name, registries by kind. Modules are imported when asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points

from mmfoundry.pipeline.errors import UnknownName
from mmfoundry.pipeline.registry import Registry, Row, unknown
from mmfoundry.pipeline.stage import Stage

STAGES_GROUP = "mmfoundry.stage"
# Ours, in the order of the pipeline, each the module of that name in mmfoundry.stages; said here what they do, so that
# the command's help need not import them.
OUR_STAGES = {
    "filter": "Choose which pairs of a pool go on: metadata, filters, de-duplication; writes shards and the funnel.",
    "scenes": "Compose scenes of pictures, with captions, hard negatives, questions and answers; writes shards.",
    "pretrain": "Train a CLIP from image-text shards.",
    "instruct": "Join a vision tower to a language model and tune both on questions and answers.",
    "adapt": "Fit a small adapter (LoRA) to a trained CLIP or vision-language model.",
    "eval": "Measure models: zero-shot, retrieval, probes, questions; each against chance and with its interval.",
    "release": "Write folders that open_clip, transformers and peft load without mmfoundry, with model cards.",
}

# Stages that train, and the module that runs one rank of each.
RANK_MODULES = {
    "pretrain": "mmfoundry.launch.pretrain",
    "instruct": "mmfoundry.launch.instruct",
    "adapt": "mmfoundry.launch.adapt",
}

# kind -> where its registry is
REGISTRIES = {
    "objective": ("mmfoundry.models.objectives", "OBJECTIVES"),
    "filter": ("mmfoundry.data.filters.base", "FILTERS"),
    "detector": ("mmfoundry.data.detectors.base", "DETECTORS"),
    "connector": ("mmfoundry.models.connectors", "CONNECTORS"),
    "optimizer": ("mmfoundry.pipeline.optimizers", "OPTIMIZERS"),
    "eval": ("mmfoundry.evals.task", "EVAL_TASKS"),
}


class Stages(Mapping[str, Stage]):
    """Every stage by name: ours, and entry points of the group `mmfoundry.stage`.

    A stage's module is imported when the stage is looked up, so that a recipe pays for what it runs only.
    """

    def __init__(self) -> None:
        self._theirs = {point.name: point for point in entry_points(group=STAGES_GROUP)}

    def __getitem__(self, name: str) -> Stage:
        """The stage of this name.

        Raises:
            UnknownName: there is none; the text lists the known ones.
        """
        if name in OUR_STAGES:
            declare_missing_ops()
            return importlib.import_module(f"mmfoundry.stages.{name}").STAGE
        if name in self._theirs:
            return self._theirs[name].load()
        raise UnknownName(unknown("stage", name, list(self)))

    def describe(self) -> list[Row]:
        """Name, what it does, and module of every stage."""
        ours = [Row(name, summary, f"mmfoundry.stages.{name}") for name, summary in OUR_STAGES.items()]
        theirs = [(name, self[name]) for name in self if name not in OUR_STAGES]
        return ours + [Row(name, stage.summary, stage.run.__module__) for name, stage in theirs]

    def __contains__(self, name: object) -> bool:
        return name in OUR_STAGES or name in self._theirs

    def __iter__(self) -> Iterator[str]:
        yield from dict.fromkeys((*OUR_STAGES, *self._theirs))

    def __len__(self) -> int:
        return len({*OUR_STAGES, *self._theirs})


def declare_missing_ops() -> None:
    """What `pipeline.torchvision_ops` does, without importing torch before something needs it."""
    from mmfoundry.pipeline import torchvision_ops

    torchvision_ops.declare_missing_ops()


def open_registry(kind: str) -> Registry:
    """The registry of a kind, by its name in the singular or plural.

    Raises:
        UnknownName: there is no such kind; the text lists them.
    """
    name = kind if kind in REGISTRIES else kind.removesuffix("s")
    if name not in REGISTRIES:
        raise UnknownName(unknown("kind", kind, REGISTRIES))
    module, attribute = REGISTRIES[name]
    declare_missing_ops()
    return getattr(importlib.import_module(module), attribute)
