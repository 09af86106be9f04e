"""A user's own DeepSpeed JSON: what it adds is taken, what it contradicts is named.

Files written for transformers' Trainer or accelerate can be given as they are: "auto" stands for what our keys say.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmfoundry.pipeline.errors import ConfigError, DamagedInput, MissingInput
from mmfoundry.pipeline.json_file import read_json

# Sections that would do what the trainer does already, or change what is computed; and where to say it instead.
REFUSED = {
    "scheduler": "use scheduler",
    "amp": "use precision",
    "torch_autocast": "use precision",
    "compile": "use torch_compile",
    "compression_training": "it changes the model",
    "curriculum_learning": "the loader decides what is read",
    "data_efficiency": "the loader decides what is read",
    "progressive_layer_drop": "it changes the model",
    "quantize_training": "it changes the model",
    "elasticity": "any run goes on with another number of ranks",
    "pipeline": "there is no pipeline parallelism",
    "tensor_parallel": "there is no tensor parallelism",
    "sequence_parallel_size": "there is no sequence parallelism",
    "zenflow": "its updates lag behind the gradients",
}
# What the loss scale of fp16 is here; other values would be passed over in silence.
LOSS_SCALING = {"loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 2000, "min_loss_scale": 1}
OUR_OWN = ("fp16", "bf16", "optimizer", "gradient_clipping")  # agreed with, then done by us and not by DeepSpeed


def merge_file(settings: Mapping[str, Any], path: str | Path, typed: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """Add what a user's file says to DeepSpeed's settings.

    Args:
        settings: made from our keys.
        path: of the file.
        typed: DeepSpeed's dotted key -> our key for the same, and its value.

    Raises:
        ConfigError: the file is not JSON, or contradicts our keys; every contradiction is named.
        MissingInput: there is no such file.
    """
    found = read_file(path)
    problems = [*_misspelt(found, settings, typed), *_misshapen(found, settings, typed), *_problems(found, typed)]
    if problems:
        raise ConfigError(f"{path}: " + "; ".join(problems))
    merged = json.loads(json.dumps(settings))
    for key, value in _flat(found):
        if value == "auto" or key in typed or key.split(".")[0] in OUR_OWN:
            continue
        *sections, last = key.split(".")
        node = merged
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return merged


def read_file(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON.

    Raises:
        ConfigError: it is not a JSON object.
        MissingInput: there is no such file.
    """
    try:
        return read_json(Path(path))
    except MissingInput as error:
        raise MissingInput(f"deepspeed: {error}") from error
    except DamagedInput as error:
        raise ConfigError(f"deepspeed: {error}") from error


def _misspelt(
    found: Mapping[str, Any], settings: Mapping[str, Any], typed: Mapping[str, tuple[str, Any]]
) -> Iterator[str]:
    """Keys that are nearly one of DeepSpeed's, which passes over what it does not know."""
    known = sorted({*REFUSED, *OUR_OWN, *settings, *(key.partition(".")[0] for key in typed)})
    for key in (key for key in found if key not in known):
        for near in difflib.get_close_matches(key, known, n=1, cutoff=0.85):
            yield f"{key} is not a key of DeepSpeed's, which would pass over it: did you mean {near}?"


def _misshapen(
    found: Mapping[str, Any], settings: Mapping[str, Any], typed: Mapping[str, tuple[str, Any]]
) -> Iterator[str]:
    """Plain values where DeepSpeed has a section, and the other way round."""
    sections = {key.rpartition(".")[0] for key in typed} | {
        name for name in settings if isinstance(settings[name], dict)
    }
    for key, value in found.items():
        if key in sections and value != "auto" and not isinstance(value, dict):
            yield f"{key} is {json.dumps(value)}, but DeepSpeed has a section there"
        elif key not in sections and key in settings and isinstance(value, dict):
            yield f"{key} is a section, but DeepSpeed has a plain value there"


def _problems(found: Mapping[str, Any], typed: Mapping[str, tuple[str, Any]]) -> Iterator[str]:
    for name in found:
        section = found[name]
        if name in REFUSED and not (isinstance(section, dict) and section.get("enabled") in (False, "auto")):
            yield f"{name} is not for DeepSpeed to do here: {REFUSED[name]}"
    half = found.get("fp16")
    fp16 = isinstance(half, dict) and half.get("enabled") is True
    for key, value in _flat(found):
        if value == "auto" or key.split(".")[0] in REFUSED:
            continue
        ours = typed.get(key)
        if ours is not None:
            name, wanted = ours
            if not _same(value, wanted):
                yield f"{key} is {json.dumps(value)}, but {name} makes it {json.dumps(wanted)}"
        elif key.startswith("optimizer."):
            yield f"{key} is not known here: say it under optimizer"
        elif fp16 and key.startswith("fp16."):
            name = key.removeprefix("fp16.")
            if name in LOSS_SCALING and value != LOSS_SCALING[name]:
                yield f"{key} is {json.dumps(value)}, but the loss scale here has {LOSS_SCALING[name]}"


def _same(theirs: Any, ours: Any) -> bool:
    if isinstance(ours, str) and isinstance(theirs, str):
        return theirs.casefold() == ours.casefold()
    if isinstance(ours, tuple):
        return isinstance(theirs, list) and tuple(theirs) == ours
    return type(theirs) is not str and theirs == ours


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
