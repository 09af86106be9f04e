"""JSON files that we did not write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmfoundry.pipeline.errors import DamagedInput, MissingInput


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        MissingInput: there is no such file.
        DamagedInput: it cannot be read, is not JSON, is nested without end, or holds something else than an object.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MissingInput(f"{file}: no such file") from error
    except OSError as error:
        raise DamagedInput(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # ValueError: broken JSON and broken UTF-8
        raise DamagedInput(f"{file}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise DamagedInput(f"{file}: not a JSON object")
    return found
