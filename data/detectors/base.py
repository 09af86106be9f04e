"""What a detector is: typed parameters, and a function from a picture to the regions of what it looks for.

A package outside adds one through the entry point group `mmfoundry.detector`.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import ValidationError

from mmfoundry.pipeline.config import Config
from mmfoundry.pipeline.errors import ConfigError, MissingInput
from mmfoundry.pipeline.registry import Registry

# uint8 (height, width, 3) -> regions (n, 4, 2), see `regions.py`; called from one thread at a time
Detect = Callable[[np.ndarray], np.ndarray]


class Detector(Config):
    """Finds regions in pictures; its fields are the parameters that a recipe may set."""

    finds: ClassVar[Literal["text", "faces"]]

    @abstractmethod
    def load(self) -> Detect:
        """The function that finds them, its model in memory; called once a process.

        Raises:
            MissingInput: a package or a weights file is not there; the text says how to get it.
        """


DETECTORS: Registry[type[Detector]] = Registry("detector", package="mmfoundry.data.detectors")


def parse_detector(tree: Any, finds: str, path: str) -> Detector:
    """Build the detector that plain values describe: a name, or a name with its parameters.

    Args:
        tree: `rapidocr` or `{rapidocr: {side: 640}}`.
        finds: what it must look for.
        path: dotted place of the tree in its file, put before names in errors.
    Raises:
        ConfigError: not such a tree, parameters that do not fit, or a detector of something else.
        UnknownName: no such detector.
    """
    named = {tree: None} if isinstance(tree, str) else tree
    if not isinstance(named, dict) or len(named) != 1:
        raise ConfigError(f"{path}: give a detector's name, or its name with parameters, not {tree!r}")
    name, parameters = next(iter(named.items()))
    kind = DETECTORS[str(name)]
    if kind.finds != finds:
        fitting = ", ".join(sorted(known for known, one in DETECTORS.items() if one.finds == finds))
        raise ConfigError(f"{path}: {name} finds {kind.finds}, not {finds}; those that do: {fitting or 'none'}")
    try:
        return kind.model_validate(parameters or {})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join([path, str(name), *map(str, first["loc"])])
        raise ConfigError(f"{place}: {first['msg']}; it has {', '.join(kind.model_fields)}") from error


def needs_package(error: ImportError, package: str, extra: str) -> MissingInput:
    """The error for a detector whose package is not installed."""
    return MissingInput(f"{package} is not installed ({error}): pip install 'mmfoundry[{extra}]'")
