"""What a stage's verb and its launcher script share: from CONFIG and key=value to a config, an output and a run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from mmfoundry.launch.catalog import Stages
from mmfoundry.pipeline.artifact import MANIFEST, Artifact
from mmfoundry.pipeline.config import StageConfig, apply_overrides, inputs_of, load_yaml, parse
from mmfoundry.pipeline.engine_config import deepspeed_config, engines_in
from mmfoundry.pipeline.errors import ConfigError, MissingInput
from mmfoundry.pipeline.recipe import load_recipe, stage_entries
from mmfoundry.pipeline.stage import Stage, check_apart, record_inputs, resolve_inputs, run_stage, standing

if TYPE_CHECKING:
    from mmfoundry.pipeline.distributed import Runtime

SPECIAL = ("output", "entry")  # key=value arguments that are not keys of the stage's config


@dataclass(frozen=True)
class Job:
    """One stage, its config, and the folder that its artifact goes to."""

    stage: Stage
    config: StageConfig
    output: Path


def prepare(stages: Stages, stage_name: str, config: Path, arguments: Sequence[str]) -> Job:
    """Read a verb's arguments.

    Args:
        stages: the known stages.
        stage_name: the verb.
        config: the stage's own config, or a recipe with an entry of this stage: then that entry's section is used, and
            `${entry}` means the artifact that a run of the recipe left.
        arguments: `key=value` for the stage's keys; `output=FOLDER` for the artifact's place; `entry=NAME` where a
            recipe has more than one entry of the stage.
    Raises:
        ConfigError: one line naming the key and what is wrong.
        MissingInput: a file or an earlier artifact is not there.
    """
    stage = stages[stage_name]
    own = [text for text in arguments if text.partition("=")[0] not in SPECIAL]
    special = {key: value for key, _, value in (text.partition("=") for text in arguments) if key in SPECIAL}
    tree = load_yaml(config)
    names = stage_entries(tree, stage_name, stage.config_type.model_fields)
    if names:
        return _from_recipe(stages, config, stage_name, names, own, special)
    if "entry" in special:
        raise ConfigError(f"{config}: entry={special['entry']}: not a recipe with a {stage_name} entry")
    keys = [text.partition("=")[0].strip() for text in own]
    parsed = parse(stage.config_type, apply_overrides(tree, own), config, overridden=keys)
    for field, ref in inputs_of(parsed).items():
        if "${" in ref:
            raise ConfigError(f"{config}: {field}: {ref} means an entry of a recipe, but this config is one stage's")
    return Job(stage, parsed, _output(special, Path("runs") / config.stem / stage_name))


def _from_recipe(
    stages: Stages, path: Path, stage_name: str, names: list[str], own: list[str], special: dict[str, str]
) -> Job:
    name = special.get("entry", names[0])
    if name not in names or (len(names) > 1 and "entry" not in special):
        raise ConfigError(f"{path}: choose one of its {stage_name} entries with entry=NAME: {', '.join(names)}")
    scoped = [text if text.startswith(f"{name}.") else f"{name}.{text}" for text in own]
    recipe = load_recipe(path, stages, scoped)
    entry = recipe.entry(name)
    for upstream in entry.upstream:
        made = recipe.entry(upstream).output
        if not (made / MANIFEST).is_file():
            raise MissingInput(
                f"{path}: {name} reads ${{{upstream}}}, and {made} is not there yet: "
                f"mmfoundry run {path} --until {upstream}"
            )
    return Job(entry.stage, entry.config, _output(special, entry.output))


def _output(special: Mapping[str, str], usual: Path) -> Path:
    """Where the artifact goes; a shell that leaves `~` alone in `output=~/x` means the home folder, too."""
    return Path(special["output"]).expanduser() if "output" in special else usual


def describe(job: Job) -> str:
    """What `execute` would do with a job, in one line; its whole config; what DeepSpeed is told. Nothing is written.

    Raises:
        ConfigError: a user's own DeepSpeed file contradicts the config, a batch does not divide over the ranks, or the
            output lies in an input.
    """
    inputs = resolve_inputs(job.stage, job.config)
    check_apart(job.stage, job.output.absolute(), inputs)
    now = standing(job.stage, job.config, job.output.absolute(), record_inputs(job.config, inputs))
    lines = [f"{job.stage.name} -> {job.output}: {now.action}, {now.why}"]
    lines.append(yaml.safe_dump(job.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True).rstrip())
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    for key, engine in engines_in(job.config):
        settings = deepspeed_config(engine, ranks)
        lines.append(f"{key}: DeepSpeed's settings on {ranks} rank(s); buckets are no larger than the model, though")
        lines.append(json.dumps(settings, indent=2))
    return "\n".join(lines)


def execute(job: Job, runtime: Runtime) -> Artifact:
    """Run a job, go on with a cut-off run of it, or find it done."""
    return run_stage(job.stage, job.config, job.output, runtime)


def outcome(artifact: Artifact) -> str:
    """A finished artifact in one line: where it is, its time and its metrics."""
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in artifact.manifest.metrics.items())
    return f"{artifact.path}: done in {artifact.manifest.seconds:.1f} s{'; ' + metrics if metrics else ''}"
