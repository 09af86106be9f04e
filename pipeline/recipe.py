"""Recipes: a YAML file of stages that run in order, each skipped where its artifact still holds.

    name: demo            # output folder runs/demo
    seed: 0               # of every stage that names none
    filter:               # an entry; its key is the stage's name ...
      pool: data/samples/pool-*.tar
    adapt_clip:
      stage: adapt        # ... or says which stage it is
      model: ${pretrain}  # the artifact of an earlier entry; ${pretrain}/file names a file in it

All of it is checked before the first stage starts: a typo in the last entry must not cost the hours before it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mmfoundry.pipeline.artifact import MANIFEST, Artifact, write_atomic
from mmfoundry.pipeline.config import StageConfig, apply_overrides, load_yaml, local_inputs_of, parse
from mmfoundry.pipeline.errors import ConfigError, MissingInput, UnknownName
from mmfoundry.pipeline.ranks import start_ranks
from mmfoundry.pipeline.registry import unknown
from mmfoundry.pipeline.resolve import is_local, resolve
from mmfoundry.pipeline.stage import Stage, Standing, record_inputs, resolve_inputs, run_stage, standing, work_folder

SUMMARY = "summary.json"
REPORT = "report.html"
CONFIGS = "configs"  # in the run folder: each entry's whole config, as its verb takes it
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_REFERENCE = re.compile(r"\$\{([^}]*)\}")
_HEADLINES = 5  # metrics shown on a stage's line

Say = Callable[[str], None]


@dataclass(frozen=True)
class Entry:
    """One stage of a recipe, ready to run.

    Attributes:
        name: its key in the recipe.
        stage: what it runs.
        config: its config, references replaced by paths.
        output: the artifact's folder.
        upstream: the earlier entries that it reads.
    """

    name: str
    stage: Stage
    config: StageConfig
    output: Path
    upstream: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """A recipe, checked as a whole.

    Attributes:
        name: of the run.
        source: the YAML file.
        output: the run folder.
        entries: in order.
    """

    name: str
    source: Path
    output: Path
    entries: tuple[Entry, ...]

    def entry(self, name: str) -> Entry:
        """The entry of this name.

        Raises:
            UnknownName: there is none.
        """
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise UnknownName(f"{self.source}: {unknown('stage of the recipe', name, [e.name for e in self.entries])}")


def load_recipe(
    path: str | Path,
    stages: Mapping[str, Stage],
    overrides: Iterable[str] = (),
    output: str | Path | None = None,
) -> Recipe:
    """Read a recipe and check every entry: stage names, keys, types, references.

    Args:
        path: the YAML file.
        stages: the known stages by name; only those that the recipe names are looked up.
        overrides: `entry.key=value`, or `seed=1`.
        output: the run folder; `runs/<name>` when None.
    Raises:
        MissingInput: no such file.
        ConfigError: one line with file, dotted path and nearest valid key.
        UnknownName: an entry is not a stage.
    """
    path = Path(path)
    overrides = list(overrides)
    sections = apply_overrides(load_yaml(path), overrides)
    overridden = [text.partition("=")[0].strip() for text in overrides]
    name, seed = sections.pop("name", path.stem), sections.pop("seed", 0)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"{path}: name must be a word of letters, digits, - and _, not {name!r}")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ConfigError(f"{path}: seed must be a whole number, not {seed!r}")
    folder = Path(output) if output is not None else Path("runs") / name
    entries: dict[str, Entry] = {}
    for key, section in sections.items():
        stage = _stage_of(path, key, section, stages)
        tree = {"seed": seed} | {k: v for k, v in (section or {}).items() if k != "stage"}
        upstream: list[str] = []
        tree = _substitute(tree, f"{path}: {key}", entries, [*sections], upstream)
        config = parse(stage.config_type, tree, path, key, overridden)
        entries[key] = Entry(key, stage, config, folder / key, tuple(dict.fromkeys(upstream)))
    if not entries:
        raise ConfigError(f"{path}: no stages in it; known stages: {', '.join(sorted(stages))}")
    return Recipe(name, path, folder, tuple(entries.values()))


def stage_entries(sections: Mapping[str, Any], stage: str, fields: Iterable[str]) -> list[str]:
    """The entries of a recipe's tree that run `stage`; none where the tree is that stage's own config.

    Args:
        sections: what the YAML file holds.
        stage: the stage's name.
        fields: the fields of the stage's config; a key among them is no entry.
    """
    own = set(fields)
    kinds = {
        key: section.get("stage", key)
        for key, section in sections.items()
        if isinstance(section, dict) and key not in own
    }
    return [key for key, kind in kinds.items() if kind == stage]


def _stage_of(path: Path, key: str, section: Any, stages: Mapping[str, Stage]) -> Stage:
    if not _NAME.fullmatch(key):
        raise ConfigError(f"{path}: {key!r} must be a word of letters, digits, - and _: it names a folder")
    kind = section.get("stage", key) if isinstance(section, dict) else key
    if kind not in stages:
        raise UnknownName(
            f"{path}: {key}{'' if kind == key else '.stage'}: {unknown('stage', str(kind), list(stages))}"
        )
    if section is not None and not isinstance(section, dict):
        raise ConfigError(f"{path}: {key} must hold the stage's keys, not {section!r}")
    return stages[kind]


def _substitute(tree: Any, where: str, entries: Mapping[str, Entry], keys: list[str], upstream: list[str]) -> Any:
    """Replace `${entry}` in every string by the artifact's folder, noting the entries in `upstream`."""
    if isinstance(tree, dict):
        return {k: _substitute(v, f"{where}.{k}", entries, keys, upstream) for k, v in tree.items()}
    if isinstance(tree, list):
        return [_substitute(v, f"{where}.{i}", entries, keys, upstream) for i, v in enumerate(tree)]
    if not isinstance(tree, str):
        return tree

    def path_of(match: re.Match[str]) -> str:
        name = match.group(1).strip()
        if name not in entries:
            reason = "comes later in the recipe" if name in keys else "is not an entry of the recipe"
            known = f"earlier entries: {', '.join(entries)}" if entries else "it is the first entry"
            raise ConfigError(f"{where}: ${{{name}}} {reason}; {known}")
        upstream.append(name)
        return str(entries[name].output)

    return _REFERENCE.sub(path_of, tree)


def plan(recipe: Recipe, until: str | None = None) -> list[tuple[Entry, Standing]]:
    """What a run would do with each entry, and why; nothing is written.

    An entry whose input is about to be made cannot be judged yet and counts as to be run.

    Args:
        recipe: from `load_recipe`.
        until: the last entry to run; all when None.
    Raises:
        UnknownName: there is no entry `until`.
        MissingInput: an input that no entry makes is not there.
    """
    entries = _up_to(recipe, until)
    check_inputs(entries)
    planned: list[tuple[Entry, Standing]] = []
    actions: dict[str, str] = {}
    for entry in entries:
        waits = [name for name in entry.upstream if actions[name] != "skip"]
        if waits:
            now = Standing("run", f"after {', '.join(waits)}, which it reads")
        else:
            now = _standing(entry)
        actions[entry.name] = now.action
        planned.append((entry, now))
    return planned


def check_inputs(entries: Iterable[Entry], fetch: bool = False) -> None:
    """Refuse an input that is not there, unless an earlier entry makes it.

    Args:
        entries: in order.
        fetch: look for hub repositories too, and download them; else only local inputs are checked.
    Raises:
        MissingInput: entry, field and path are named.
    """
    made: list[Path] = []
    for entry in entries:
        for field, ref in local_inputs_of(entry.config).items():
            path = Path(ref)
            if (fetch or is_local(ref)) and not any(path == folder or folder in path.parents for folder in made):
                try:
                    resolve(ref)
                except MissingInput as error:
                    raise MissingInput(f"{entry.name}.{entry.config.place_of(field)}: {error}") from error
        made.append(entry.output)


def _up_to(recipe: Recipe, until: str | None) -> list[Entry]:
    if until is None:
        return list(recipe.entries)
    last = recipe.entries.index(recipe.entry(until))
    return list(recipe.entries[: last + 1])


def _standing(entry: Entry) -> Standing:
    output = entry.output.absolute()
    if not (output / MANIFEST).is_file() and not work_folder(output).exists():
        return Standing("run", "not run yet")  # without reading its inputs, which may have to be downloaded
    records = record_inputs(entry.config, resolve_inputs(entry.stage, entry.config))
    return standing(entry.stage, entry.config, output, records)


def run_recipe(
    recipe: Recipe,
    *,
    until: str | None = None,
    processes: int = 1,
    rank_modules: Mapping[str, str] | None = None,
    dry_run: bool = False,
    report: Callable[[Path], object] | None = None,
    say: Say = print,
) -> bool:
    """Run a recipe's stages in order; skip what holds, go on with what was cut off.

    Args:
        recipe: from `load_recipe`.
        until: the last entry to run; all when None.
        processes: ranks of each training stage; the others run in this process.
        rank_modules: stage name -> module that runs one rank of it (`python -m MODULE CONFIG output=FOLDER`); stages
            that are not in it run in this process.
        dry_run: say what would be done and do nothing.
        report: builds `report.html` from the run folder; called when anything changed.
        say: where lines for people go.
    Returns:
        Whether anything was run.
    Raises:
        MmfoundryError: what `load_recipe`, `plan` and the stages raise; finished stages keep their artifacts.
    """
    planned = plan(recipe, until)
    width = max(len(entry.name) for entry, _ in planned)
    if dry_run:
        for entry, now in planned:
            say(f"{entry.name:<{width}}  {now.action:<6}  {now.why}")
        return False
    todo = [entry for entry, now in planned if now.action != "skip"]
    if not todo:
        if report is not None and not (recipe.output / REPORT).is_file():
            report(recipe.output)
        say(f"{recipe.output}: nothing to do, {len(planned)} stages are done{_see_report(recipe)}")
        return False
    check_inputs(todo, fetch=True)
    _save_configs(recipe)
    started = time.monotonic()
    for entry, _ in planned:
        now = _standing(entry)
        if now.action == "skip":
            say(f"{entry.name:<{width}}  skipped: {now.why}")
            continue
        verb = "goes on" if now.action == "resume" else "starts"
        say(f"{entry.name:<{width}}  {verb}: {entry.stage.summary} ({now.why})")
        manifest = _run_entry(recipe, entry, processes, rank_modules or {}).manifest
        shown = ", ".join(f"{key} {value:.4g}" for key, value in list(manifest.metrics.items())[:_HEADLINES])
        say(f"{entry.name:<{width}}  {manifest.seconds:.1f} s{': ' + shown if shown else ''}")
        write_summary(recipe)
    if report is not None:
        report(recipe.output)
    say(f"{recipe.output}: done in {time.monotonic() - started:.0f} s{_see_report(recipe)}")
    return True


def _see_report(recipe: Recipe) -> str:
    path = recipe.output / REPORT
    return f"; open {path}" if path.is_file() else ""


def _run_entry(recipe: Recipe, entry: Entry, processes: int, rank_modules: Mapping[str, str]) -> Artifact:
    if processes > 1 and entry.stage.name in rank_modules:
        config = recipe.output / CONFIGS / f"{entry.name}.yaml"
        start_ranks(rank_modules[entry.stage.name], [str(config), f"output={entry.output}"], processes)
        return Artifact.open(entry.output)
    # Imported here: torch takes seconds, and a run with nothing to do needs none of it.
    from mmfoundry.pipeline.distributed import init_runtime

    return run_stage(entry.stage, entry.config, entry.output, init_runtime())


def _save_configs(recipe: Recipe) -> None:
    for entry in recipe.entries:
        text = yaml.safe_dump(entry.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        command = f"# mmfoundry {entry.stage.name} {recipe.output / CONFIGS / entry.name}.yaml output={entry.output}\n"
        write_atomic(recipe.output / CONFIGS / f"{entry.name}.yaml", command + text)


def write_summary(recipe: Recipe) -> dict[str, float]:
    """Write `summary.json`: every metric of every finished entry as `entry/metric`, and `entry/seconds`."""
    summary: dict[str, float] = {}
    for entry in recipe.entries:
        if (entry.output / MANIFEST).is_file():
            manifest = Artifact.open(entry.output).manifest
            summary |= {f"{entry.name}/{key}": value for key, value in manifest.metrics.items()}
            summary[f"{entry.name}/seconds"] = manifest.seconds
    write_atomic(recipe.output / SUMMARY, json.dumps(summary, indent=2) + "\n")
    return summary
