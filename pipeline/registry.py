"""Registries: plain mappings from a name to a function or class, filled by a decorator, one a kind.

To add a variant is to write one file in the kind's folder; an outside package adds one through an entry point:

    [project.entry-points."mmfoundry.objective"]
    my_loss = "my_package.losses:my_loss"
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import NamedTuple, TypeVar

from mmfoundry.pipeline.errors import UnknownName

T = TypeVar("T")


class Row(NamedTuple):
    """One entry of a registry, as `mmfoundry list` prints it."""

    name: str
    summary: str
    source: str


class Registry(Mapping[str, T]):
    """The variants of one kind, by name.

    Args:
        kind: singular, as errors and `mmfoundry list` call it: "objective".
        entry_point_group: where outside packages add to it; `mmfoundry.<kind>` when None.
        package: a package whose modules register themselves; they are imported when the registry is first read, so
            that a new file needs no line elsewhere and nothing is imported before it is needed.
    """

    def __init__(self, kind: str, entry_point_group: str | None = None, package: str | None = None) -> None:
        self.kind = kind
        self.entry_point_group = entry_point_group or f"mmfoundry.{kind.replace(' ', '_')}"
        self.package = package
        self._entries: dict[str, T] = {}
        self._discovered = False

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds what it decorates under `name`.

        Raises:
            ValueError: the name is taken; two variants of one name would depend on the order of imports.
        """

        def add(entry: T) -> T:
            if name in self._entries:
                taken = _source(self._entries[name])
                raise ValueError(f"{self.kind} {name!r} is registered twice: in {taken} and in {_source(entry)}")
            self._entries[name] = entry
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        """The entry of this name.

        Raises:
            UnknownName: there is none; the text lists the known ones.
        """
        if name not in self._entries:
            self._discover()
        if name not in self._entries:
            raise UnknownName(unknown(self.kind, name, self._entries))
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        self._discover()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self._discover()
        return iter(self._entries)

    def __len__(self) -> int:
        self._discover()
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Registry({self.kind!r}, {sorted(self._entries)})"

    def describe(self) -> list[Row]:
        """Name, first line of the docstring and source module of every entry, by name."""
        return [Row(name, _first_line(self[name]), _source(self[name])) for name in sorted(self)]

    def _discover(self) -> None:
        """Import the package's modules and the entry points, once."""
        if self._discovered:
            return
        self._discovered = True  # set first: a module that reads the registry while it is imported must not recurse
        if self.package is not None:
            package = importlib.import_module(self.package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self.package}.{module.name}")
        for point in entry_points(group=self.entry_point_group):
            entry = point.load()
            if self._entries.get(point.name) is not entry:  # its module may have used the decorator as well
                self.register(point.name)(entry)


def unknown(kind: str, name: str, known: Mapping[str, object] | list[str]) -> str:
    """The sentence for an unknown name: the nearest known one, if any is near, and the list."""
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"unknown {kind} {name!r}; {hint}known: {', '.join(sorted(known)) or 'none'}"


def _first_line(entry: object) -> str:
    return next(iter((inspect.getdoc(entry) or "").splitlines()), "")


def _source(entry: object) -> str:
    return getattr(entry, "__module__", None) or type(entry).__module__
