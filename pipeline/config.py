"""Typed configs: YAML in, frozen objects out, and errors of one line that name the key.

A stage's config is a `StageConfig`; parts of it are `Config`s that sit in the file of the code that reads them. A field
typed `ArtifactRef` is an input of the stage: what it names is resolved to a local path before the stage runs, and its
content, not its path, decides whether finished work still holds.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import re
import types
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmfoundry.pipeline.errors import ConfigError, MissingInput
from mmfoundry.pipeline.urls import is_url

ConfigT = TypeVar("ConfigT", bound="Config")
MAX_CONFIG_BYTES = 4 << 20


class Input:
    """Marks a string field as an input of the stage."""


class Remote:
    """Marks an input that may lie behind a URL; the stage reads it there, by ranges."""


class Neutral:
    """Marks a field that changes how a result is computed, never the result: workers, logging, progress.

    Such a field is left out of the config's digest, so changing it neither repeats a finished stage nor stops a
    cut-off one from resuming.
    """


ArtifactRef = Annotated[str, Input()]
ShardsRef = Annotated[str, Input(), Remote()]


class Config(BaseModel):
    """Base of every config: frozen, keyword-only, unknown keys refused, numbers finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class StageConfig(Config):
    """Base of the configs of stages."""

    seed: int = Field(0, ge=0, lt=2**32, description="of everything random in the stage; same seed, same result")

    def further_inputs(self) -> dict[str, str]:
        """Inputs that no field of its own names, but something inside one does: dotted place -> reference."""
        return {}

    def place_of(self, name: str) -> str:
        """Where a reader of an error finds an input, in the config's own words; a field is found by its dotted name."""
        return name


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: a repeated key is an error, `1e-3` is a number, `no` and `on` are words."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:bool",)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str | int | float | bool | None):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML (or JSON) file whose top level is a mapping.

    Raises:
        MissingInput: there is no such file.
        ConfigError: it is not YAML (file and line are named), repeats a key, or is not a mapping.
    """
    path = Path(path)
    if not path.is_file():
        there = {file.stem: file for file in path.parent.glob("*.y*ml")}
        near = difflib.get_close_matches(path.stem, there, n=1)
        hint = f"; did you mean {there[near[0]]}?" if near else ""
        raise MissingInput(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}{hint}")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_CONFIG_BYTES >> 20} MiB, so hardly a config")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise ConfigError(f"{path}: the top level must be `key: value` lines")
    return tree


def apply_overrides(tree: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return a copy of `tree` with each `dotted.key=value` set; values are read as YAML.

    A number in the key is an index into a list. Keys that no config knows are left for `parse` to refuse.

    Raises:
        ConfigError: an override is not `key=value`, its value is not YAML, or its key leads through a plain value.
    """
    changed = copy.deepcopy(dict(tree))
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise ConfigError(f"{override!r} is not key=value, for example optimizer.lr=1e-3")
        try:
            value = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"{override!r}: {text!r} is not a YAML value; quote it") from error
        _set(changed, parts, value, override)
    return changed


def _set(tree: dict[str, Any], parts: list[str], value: Any, override: str) -> None:
    node: Any = tree
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                where = ".".join(parts[:depth])
                raise ConfigError(f"{override!r}: {where} is a list of {len(node)}; {part!r} is not one of its indices")
            index: Any = int(part)
        elif isinstance(node, dict):
            index = part
            if not last and node.get(part) is None:
                node[part] = {}
        else:
            raise ConfigError(f"{override!r}: {'.'.join(parts[:depth])} is a plain value and has no key {part!r}")
        if last:
            node[index] = value
        else:
            node = node[index]


def parse(
    model: type[ConfigT],
    tree: Mapping[str, Any],
    source: str | Path = "config",
    prefix: str = "",
    overridden: Collection[str] = (),
) -> ConfigT:
    """Build a config from a tree of plain values.

    Args:
        model: the config's class.
        tree: what a YAML file holds.
        source: the file, named in errors.
        prefix: dotted path of `tree` in that file, put before the keys in errors.
        overridden: dotted keys that the command line set; an error at one of them names the command line as source.
    Raises:
        ConfigError: one line naming file, dotted path, what is wrong and, for an unknown key, the nearest valid one.
    """
    try:
        return model.model_validate(dict(tree))
    except ValidationError as error:
        problems: dict[str, str] = {}
        # Unknown keys first: a misspelt one explains the key that is then missing.
        for entry in sorted(error.errors(include_url=False), key=lambda entry: entry["type"] != "extra_forbidden"):
            path, text = _explain(model, entry, prefix)
            # A config as a whole (a check across its fields) has an empty location.
            meant = f"did you mean {entry['loc'][-1]}?" if entry["type"] == "missing" else ""
            if meant and any(told.endswith(meant) for told in problems.values()):
                continue
            given = any(path == key or path.startswith(f"{key}.") for key in overridden)
            problems.setdefault(path, f"{'command line' if given else source}: {text}")
        lines = list(problems.values())
        more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
        raise ConfigError("; ".join(lines[:3]) + more) from error


def _explain(model: type[BaseModel], entry: Any, prefix: str) -> tuple[str, str]:
    """The dotted path of a pydantic error, and a sentence about it."""
    consumed, owners = _walk(model, entry["loc"])
    path = ".".join(part for part in (prefix, *map(str, consumed)) if part) or "top level"
    if entry["type"] == "extra_forbidden":
        key = str(entry["loc"][-1])
        known = sorted({name for owner in owners for name in owner.model_fields})
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
        return path, f"{path} is not a known key; {hint}"
    if entry["type"] == "missing":
        fields = [owner.model_fields[name] for owner in owners if (name := str(entry["loc"][-1])) in owner.model_fields]
        about = f" ({fields[0].description})" if fields and fields[0].description else ""
        return path, f"{path} is missing{about}"
    message = str(entry.get("ctx", {}).get("error", entry["msg"]))
    if entry["type"] in ("value_error", "assertion_error"):
        return path, f"{path}: {message}"
    shown = repr(entry["input"])
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return path, f"{path}: {message[:1].lower()}{message[1:]}, not {shown}"


def _walk(model: type[BaseModel], loc: Sequence[str | int]) -> tuple[list[str | int], list[type[BaseModel]]]:
    """Follow an error's location: the keys as written (a union's arms left out) and the configs that own the last."""
    consumed: list[str | int] = []
    here: list[Any] = [model]
    owners: list[type[BaseModel]] = [model]
    for position, part in enumerate(loc):
        models = [arm for arm in here if isinstance(arm, type) and issubclass(arm, BaseModel)]
        known = [arm for arm in models if str(part) in arm.model_fields]
        last = position == len(loc) - 1
        if known:
            owners = known
            here = [arm for owner in known for arm in _arms(owner.model_fields[str(part)].annotation)]
            consumed.append(part)
            continue
        inner = [arm for outer in here for arm in _items(outer, part)]
        if inner:
            here = inner
            consumed.append(part)
        elif any(arm.__name__ == part for arm in models):
            here = owners = [arm for arm in models if arm.__name__ == part]
        elif last and models:
            owners = models
            consumed.append(part)
    return consumed, owners


def _arms(annotation: Any) -> list[Any]:
    """The alternatives of a type: `list[A] | B | None` gives `list[A]`, `B`, `NoneType`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _arms(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [arm for part in get_args(annotation) for arm in _arms(part)]
    if hasattr(annotation, "__value__"):  # a `type X = ...` alias
        return _arms(annotation.__value__)
    return [annotation]


def _items(annotation: Any, part: str | int) -> list[Any]:
    """The alternatives of what a list or mapping type holds at `part`; empty where it holds nothing there."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (list, tuple, set, frozenset, Sequence) and isinstance(part, int) and args:
        return _arms(args[part] if origin is tuple and len(args) > part and args[-1] is not Ellipsis else args[0])
    if origin in (dict, Mapping) and isinstance(part, str) and len(args) == 2:
        return _arms(args[1])
    return []


def inputs_of(config: Config) -> dict[str, str]:
    """The inputs that a config names: dotted field (`data.0.path`) -> reference as written; None is left out."""
    found = {path: value for path, value, marks in _leaves(config, "") if Input in marks and value is not None}
    return found | (config.further_inputs() if isinstance(config, StageConfig) else {})


def local_inputs_of(config: Config) -> dict[str, str]:
    """Those of `inputs_of` that are to be had as local paths: all but shards that are read behind their URLs."""
    remote = {path for path, value, marks in _leaves(config, "") if Remote in marks and value and is_url(value)}
    return {path: ref for path, ref in inputs_of(config).items() if path not in remote}


def digest_config(config: Config) -> str:
    """A digest of what the config asks for: every field except inputs (their content counts) and neutral ones."""
    leaves = {path: value for path, value, marks in _leaves(config, "") if not marks & {Input, Neutral}}
    text = json.dumps([type(config).__qualname__, leaves], sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _leaves(config: BaseModel, prefix: str) -> Iterator[tuple[str, Any, frozenset[type]]]:
    for name, field in type(config).model_fields.items():
        marks = frozenset(type(mark) for mark in field.metadata)
        yield from _leaves_of(field.annotation, getattr(config, name), f"{prefix}{name}", marks)


def _leaves_of(
    annotation: Any, value: Any, path: str, marks: frozenset[type]
) -> Iterator[tuple[str, Any, frozenset[type]]]:
    """Walk a value beside its type, so that marks inside `list[ArtifactRef]` and `ArtifactRef | None` are seen."""
    while get_origin(annotation) is Annotated:
        annotation, *extra = get_args(annotation)
        marks |= {type(mark) for mark in extra}
    if get_origin(annotation) in (Union, types.UnionType):
        arms = [arm for arm in get_args(annotation) if arm is not types.NoneType]
        marked = [arm for arm in arms if get_origin(arm) is Annotated] if isinstance(value, str) else []
        others = [arm for arm in arms if get_origin(arm) is get_origin(annotation) or _fits(arm, value)]
        annotation = next(iter([*marked, *others, *arms]), annotation)
        yield from _leaves_of(annotation, value, path, marks)
    elif isinstance(value, BaseModel):
        for sub, leaf, inner in _leaves(value, f"{path}."):
            yield sub, leaf, inner | marks
    elif isinstance(value, list | tuple):
        item = (get_args(annotation) or (Any,))[0]
        for position, element in enumerate(value):
            yield from _leaves_of(item, element, f"{path}.{position}", marks)
        if not value:
            yield path, [], marks
    elif isinstance(value, Mapping):
        item = (*get_args(annotation), Any, Any)[1]
        for key, element in value.items():
            yield from _leaves_of(item, element, f"{path}.{key}", marks)
        if not value:
            yield path, {}, marks
    else:
        yield path, value, marks


def _fits(annotation: Any, value: Any) -> bool:
    base = get_origin(annotation) or annotation
    if base is Annotated:
        return _fits(get_args(annotation)[0], value)
    if base is Literal:
        return value in get_args(annotation)
    return isinstance(base, type) and isinstance(value, base)
