"""Suites: YAML files that name evaluations and the data that each runs on."""

from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from mmfoundry.evals.task import EVAL_TASKS, EvalTask, Selection
from mmfoundry.pipeline.config import load_yaml, parse
from mmfoundry.pipeline.errors import ConfigError
from mmfoundry.pipeline.registry import unknown


def load_suite(name: str) -> dict[str, Any]:
    """The entries of a suite: a name in evals/suites, or the path of a YAML file of the same form.

    Raises:
        ConfigError: the name is not known (the known ones are listed), or the file is not YAML.
        MissingInput: no such file.
    """
    folder = resources.files("mmfoundry.evals") / "suites"
    known = [entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")]
    if name in known:
        with resources.as_file(folder / f"{name}.yaml") as path:
            return load_yaml(path)
    if Path(name).suffix in (".yaml", ".yml"):
        return load_yaml(name)
    raise ConfigError(f"{unknown('suite', name, known)}; or give the path of a .yaml file")


def parse_task(name: str, tree: Any) -> EvalTask:
    """One entry of a suite as its typed config.

    Raises:
        ConfigError: no `task`, an unknown one, or settings that it does not know.
    """
    if isinstance(tree, EvalTask):
        return tree
    if not isinstance(tree, Mapping) or not isinstance(tree.get("task"), str):
        raise ConfigError(f"tasks.{name} needs `task:` with one of {', '.join(sorted(EVAL_TASKS))}")
    return parse(EVAL_TASKS[tree["task"]], tree, source="eval suite", prefix=f"tasks.{name}")


def selections(task: EvalTask) -> Iterator[Selection]:
    """The selections of data that a task's config holds."""
    for field in type(task).model_fields:
        value = getattr(task, field)
        if isinstance(value, Selection):
            yield value
