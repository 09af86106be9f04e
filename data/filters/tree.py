"""A filter tree as a recipe writes it -> filters.

    all:
      - basic: {min_side: 32}
      - exact_duplicate
      - near_duplicate: 28
      - any: [{language: {languages: [en]}}, {expression: "json.similarity > 0.3"}]

A filter is a name, or a name with its parameters. One value in place of the parameters sets the filter's first one.
"""

import difflib
from typing import Any

from pydantic import ValidationError

from mmfoundry.data.filters.base import FILTERS, Filter
from mmfoundry.pipeline.errors import ConfigError, UnknownColumn, UnknownName

MAX_DEPTH = 20


def parse_filter(tree: Any, path: str = "") -> Filter:
    """Build the filter that a tree of plain values describes.

    Args:
        tree: what YAML holds: a name, or a mapping of one name to its parameters.
        path: dotted place of the tree in its file, put before names in errors.
    Raises:
        ConfigError: not such a tree, an unknown parameter or a wrong value; place and nearest name are given.
        UnknownName: no such filter.
        UnknownColumn: a formula names a column that there is not.
    """
    if path.count(".") > MAX_DEPTH:
        raise ConfigError(f"{path}: filters are nested more than {MAX_DEPTH} deep")
    if isinstance(tree, str):
        tree = {tree: None}
    if not isinstance(tree, dict) or len(tree) != 1 or not isinstance(next(iter(tree)), str):
        found = f"{len(tree)} names ({', '.join(map(str, tree))})" if isinstance(tree, dict) else repr(tree)
        raise ConfigError(f"{path or 'filters'}: one filter is a name with its parameters, not {found[:80]}")
    name, value = next(iter(tree.items()))
    here = f"{path}.{name}" if path else name
    if name not in FILTERS:
        near = difflib.get_close_matches(name, list(FILTERS), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UnknownName(f"{here} is not a known filter; {hint}known: {', '.join(sorted(FILTERS))}")
    kind = FILTERS[name]
    if name in ("all", "any"):
        if not isinstance(value, list) or not value:
            raise ConfigError(f"{here}: give a list of filters, not {value!r}")
        return _build(kind, {"filters": [parse_filter(one, f"{here}.{i}") for i, one in enumerate(value)]}, here)
    if name == "not":
        return _build(kind, {"filter": parse_filter(value, here)}, here)
    return _build(kind, _parameters(kind, value, here), here)


def _parameters(kind: type[Filter], value: Any, path: str) -> dict[str, Any]:
    if value is None:
        return {}
    if isinstance(value, dict):
        return value
    fields = list(kind.model_fields)
    if not fields:
        raise ConfigError(f"{path} takes no parameters, so not {value!r}")
    return {fields[0]: value}


def _build(kind: type[Filter], parameters: dict[str, Any], path: str) -> Filter:
    try:
        return kind.model_validate(parameters)
    except ValidationError as error:
        entries = error.errors()
        causes = [entry.get("ctx", {}).get("error") for entry in entries]
        known = UnknownColumn if any(isinstance(cause, UnknownColumn) for cause in causes) else ConfigError
        raise known("; ".join(_sentence(kind, entry, path) for entry in entries[:3])) from error


def _sentence(kind: type[Filter], entry: Any, path: str) -> str:
    place = ".".join([path, *map(str, entry["loc"])])
    name = path.rpartition(".")[2]
    if entry["type"] == "extra_forbidden":
        key, known = str(entry["loc"][-1]), list(kind.model_fields)
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known) or 'none'}"
        return f"{place} is not a parameter of {name}; {hint}"
    if entry["type"] == "missing":
        return f"{place} is missing ({kind.model_fields[str(entry['loc'][0])].description})"
    if entry["type"] == "value_error":
        return f"{place}: {entry['ctx']['error']}"
    message = entry["msg"]
    return f"{place}: {message[:1].lower()}{message[1:]}, not {entry['input']!r}"[:300]
