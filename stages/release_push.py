"""Uploads the folders of a release to the Hugging Face hub, each as a repository of its own, in one commit each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mmfoundry.pipeline.errors import MmfoundryError
from mmfoundry.pipeline.json_file import read_json
from mmfoundry.stages.release_card import CARD, for_hub

_ADAPTER_CONFIG = "adapter_config.json"


def push_folders(release: Path, folders: Sequence[str], organisation: str, name: str, private: bool) -> list[str]:
    """Upload each folder as `ORGANISATION/NAME-FOLDER`. Cards and adapters then name each other by these ids.

    The folders themselves are only read. A repository that is there gets a new commit; files of its that the folder
    lacks stay.

    Args:
        release: the finished release.
        folders: of it, to upload.
        organisation: organisation or user; the token is the one that `hf auth login` or `HF_TOKEN` set.
        name: of the release.
        private: whether repositories that are made now are private; else as the organisation has it.

    Returns:
        The addresses of the repositories.

    Raises:
        MmfoundryError: the hub cannot be reached, or does not take a folder; the reason in one line.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of its HTTP library: every failure

    api = HfApi(library_name="mmfoundry")
    ids = {folder: f"{organisation}/{name}-{folder}" for folder in folders}
    addresses = []
    for folder, repository in ids.items():
        rewritten = _rewritten(release / folder, ids)
        operations = [
            CommitOperationAdd(path, rewritten.get(path, release / folder / path))
            for path in sorted(
                file.relative_to(release / folder).as_posix()
                for file in (release / folder).rglob("*")
                if file.is_file()
            )
        ]
        try:
            addresses.append(str(api.create_repo(repository, private=private or None, exist_ok=True)))
            api.create_commit(repository, operations, commit_message=f"Release {name}: {folder}")
        except (OSError, HTTPError, ValueError) as error:  # refused, unreachable, not a name or card
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise MmfoundryError(
                f"push: {repository} was not uploaded ({reason}); the folders in {release} are whole: mend it and run "
                f"`mmfoundry release CONFIG --push {organisation}` again"
            ) from error
        print(f"release: {folder} is at {addresses[-1]}", flush=True)
    return addresses


def _rewritten(folder: Path, ids: dict[str, str]) -> dict[str, bytes]:
    """The files that name other folders of the release, with repository ids in their place."""
    changed = {CARD: for_hub((folder / CARD).read_text(encoding="utf-8"), ids).encode()}
    if (folder / _ADAPTER_CONFIG).is_file():
        record = read_json(folder / _ADAPTER_CONFIG)
        base = record["base_model_name_or_path"]
        record["base_model_name_or_path"] = ids.get(base, base)
        changed[_ADAPTER_CONFIG] = (json.dumps(record, indent=2) + "\n").encode()
    return changed
