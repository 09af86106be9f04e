"""What there is to run and to choose from: stages by name, registries by kind. Modules are imported when asked for."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points

from mmfoundry.pipeline.errors import UnknownName
from mmfoundry.pipeline.registry import Registry, unknown
from mmfoundry.pipeline.stage import Stage

STAGES_GROUP = "mmfoundry.stage"

# Stages that train, and the module that runs one rank of each.
RANK_MODULES = {
    "pretrain": "mmfoundry.launch.pretrain",
    "instruct": "mmfoundry.launch.instruct",
    "adapt": "mmfoundry.launch.adapt",
}

# kind -> where its registry is
REGISTRIES = {
    "objective": ("mmfoundry.models.objectives", "OBJECTIVES"),
    "filter": ("mmfoundry.data.filters", "FILTERS"),
    "connector": ("mmfoundry.models.connectors", "CONNECTORS"),
    "adapter": ("mmfoundry.models.adapters", "ADAPTERS"),
    "optimizer": ("mmfoundry.pipeline.optimizers", "OPTIMIZERS"),
    "schedule": ("mmfoundry.pipeline.schedules", "SCHEDULES"),
    "eval": ("mmfoundry.evals", "EVAL_TASKS"),
}


class Stages(Mapping[str, Stage]):
    """Every stage by name: the modules of `mmfoundry.stages`, and entry points of the group `mmfoundry.stage`.

    A stage's module is imported when the stage is looked up, so that a recipe pays for what it runs only.
    """

    def __init__(self) -> None:
        package = importlib.import_module("mmfoundry.stages")
        self._ours = [module.name for module in pkgutil.iter_modules(package.__path__) if module.name[0] != "_"]
        self._theirs = {point.name: point for point in entry_points(group=STAGES_GROUP)}

    def __getitem__(self, name: str) -> Stage:
        """The stage of this name.

        Raises:
            UnknownName: there is none; the text lists the known ones.
        """
        if name in self._ours:
            return importlib.import_module(f"mmfoundry.stages.{name}").STAGE
        if name in self._theirs:
            return self._theirs[name].load()
        raise UnknownName(unknown("stage", name, list(self)))

    def __contains__(self, name: object) -> bool:
        return name in self._ours or name in self._theirs

    def __iter__(self) -> Iterator[str]:
        yield from self._ours
        yield from (name for name in self._theirs if name not in self._ours)

    def __len__(self) -> int:
        return len({*self._ours, *self._theirs})


def open_registry(kind: str) -> Registry:
    """The registry of a kind, by its name in the singular or plural.

    Raises:
        UnknownName: there is no such kind; the text lists them.
    """
    name = kind if kind in REGISTRIES else kind.removesuffix("s")
    if name not in REGISTRIES:
        raise UnknownName(unknown("kind", kind, REGISTRIES))
    module, attribute = REGISTRIES[name]
    return getattr(importlib.import_module(module), attribute)
