"""Artifacts: the folders that stages write, whole or not at all, and the digests that tell whether they still hold."""

from __future__ import annotations

import errno
import glob
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from braceexpand import braceexpand
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmfoundry.pipeline.errors import DamagedInput, MissingInput, NotEnoughSpace

MANIFEST = "manifest.json"
# Files that tell how the run went (times, throughput) and differ between runs of equal result: they are kept, listed
# and not part of an artifact's digest. Folders end in "/".
LOGS = ("metrics.jsonl", "messages.txt", "tensorboard/", "timings.json")
# Up to here a file's digest reads all of it; past it, evenly spaced blocks: a pool may have terabytes.
FULL_DIGEST_BYTES = 256 << 20
_BLOCK_BYTES, _BLOCKS = 1 << 20, 64
_SYNCS = 8  # files that are synced at a time


class FileRecord(BaseModel):
    """One file of an artifact."""

    model_config = ConfigDict(frozen=True)
    bytes: int
    sha256: str = Field(description="of the content; past 256 MiB, of its size and 64 evenly spaced MiB: 'sampled:...'")


class InputRecord(BaseModel):
    """One input of a stage: what the config said, and the digest of what that was."""

    model_config = ConfigDict(frozen=True)
    ref: str
    digest: str


class Manifest(BaseModel):
    """What made an artifact, from what, and what is in it."""

    model_config = ConfigDict(frozen=True)
    stage: str
    config: dict[str, Any]
    config_digest: str = Field(description="of the config without its inputs and neutral fields")
    inputs: dict[str, InputRecord]
    digest: str = Field(description="of the artifact's content, logs left out; what later stages compare")
    code_version: str
    seed: int
    environment: dict[str, str]
    metrics: dict[str, float]
    seconds: float = Field(description="wall time, over all parts of an interrupted run")
    created: str = Field(description="UTC, ISO 8601")
    files: dict[str, FileRecord]


@dataclass(frozen=True)
class Artifact:
    """A whole artifact: its folder and its manifest."""

    path: Path
    manifest: Manifest

    @staticmethod
    def open(path: str | Path) -> Artifact:
        """Read the artifact in a folder.

        Raises:
            MissingInput: there is no manifest, so no (whole) artifact.
            DamagedInput: the manifest cannot be read.
        """
        path = Path(path)
        file = path / MANIFEST
        if not file.is_file():
            raise MissingInput(f"{path}: not a finished artifact (no {MANIFEST}); run the stage that makes it")
        try:
            return Artifact(path, Manifest.model_validate_json(file.read_bytes()))
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            raise DamagedInput(
                f"{file}: not a manifest of this version ({where or 'not JSON'}); make it anew"
            ) from error

    def damage(self) -> str | None:
        """What is wrong with the files by name and size, e.g. a file deleted by hand; None when all are there."""
        for name, record in self.manifest.files.items():
            file = self.path / name
            if not file.is_file():
                return f"{name} is gone"
            if file.stat().st_size != record.bytes:
                return f"{name} has {file.stat().st_size} bytes, not {record.bytes}"
        return None

    def verify(self) -> None:
        """Read every file and compare it with the manifest.

        Raises:
            DamagedInput: a file is gone or altered; named.
        """
        for name, record in self.manifest.files.items():
            file = self.path / name
            if not file.is_file() or fingerprint(file) != record.sha256:
                raise DamagedInput(f"{file}: {'altered since it was written' if file.is_file() else 'gone'}")


def fingerprint(path: Path) -> str:
    """SHA-256 of a file's content; of a file past `FULL_DIGEST_BYTES`, of its size and evenly spaced blocks."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= FULL_DIGEST_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for block in range(_BLOCKS):
            file.seek(block * (size - _BLOCK_BYTES) // (_BLOCKS - 1))
            digest.update(file.read(_BLOCK_BYTES))
        return f"sampled:{digest.hexdigest()}"


def digest_of(ref: str | Path) -> str:
    """A digest of what a local path names: an artifact, a file, a folder, or the files that match a glob.

    Names inside a folder count, its own place does not: an input may be moved. Of a file past `FULL_DIGEST_BYTES` the
    time of change counts too, since only blocks of it are read.

    Raises:
        MissingInput: nothing is there.
    """
    path = Path(ref)
    if (path / MANIFEST).is_file():
        return f"artifact:{Artifact.open(path).manifest.digest}"
    files = local_files(ref)
    if path.is_file():
        names = {path.name: path}
    elif path.is_dir():
        names = {file.relative_to(path).as_posix(): file for file in files}
    else:
        names = {file.name if len({f.name for f in files}) == len(files) else str(file): file for file in files}
    with ThreadPoolExecutor(min(len(names), os.cpu_count() or 1)) as threads:  # hashing lets go of the interpreter
        records = dict(zip(names, threads.map(_record_of_input, names.values()), strict=True))
    return f"files:{_digest_records(records)}"


def _record_of_input(file: Path) -> FileRecord:
    status = file.stat()
    changed = f"@{status.st_mtime_ns}" if status.st_size > FULL_DIGEST_BYTES else ""
    return FileRecord(bytes=status.st_size, sha256=fingerprint(file) + changed)


def local_files(ref: str | Path) -> list[Path]:
    """The files that a path or glob names, sorted; hidden ones and indices (`.idx`) left out.

    Raises:
        MissingInput: there are none.
    """
    path = Path(ref)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = list(path.rglob("*"))
    else:
        found = [Path(match) for name in braceexpand(str(ref)) for match in glob.glob(name, recursive=True)]
    files = sorted(file for file in found if file.is_file() and not file.name.startswith(".") and not _derived(file))
    if not files:
        raise MissingInput(f"{ref}: {'the folder is empty' if path.is_dir() else 'no such file or folder'}")
    return files


def _derived(file: Path) -> bool:
    """Whether a file is an index of the one beside it, made anew where it is missing or does not fit."""
    return file.suffix == ".idx"


def records_of(folder: Path, leave_out: Collection[str] = ()) -> dict[str, FileRecord]:
    """Size and digest of every file below `folder`, by relative path.

    Args:
        folder: the artifact's folder, or the one that becomes it.
        leave_out: top-level files and folders that are not part of the artifact; the manifest and indices never are.
    """
    records = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        if file.is_file() and name.parts[0] not in (MANIFEST, *leave_out) and not _derived(file):
            records[name.as_posix()] = FileRecord(bytes=file.stat().st_size, sha256=fingerprint(file))
    return records


def digest_content(records: Mapping[str, FileRecord]) -> str:
    """The digest of an artifact's files, logs left out."""
    return _digest_records({name: record for name, record in records.items() if not name.startswith(LOGS)})


def _digest_records(records: Mapping[str, FileRecord]) -> str:
    rows = [f"{name}\0{record.bytes}\0{record.sha256}\n" for name, record in sorted(records.items())]
    return hashlib.sha256("".join(rows).encode()).hexdigest()


def write_atomic(path: str | Path, content: bytes | str, sync: bool = True) -> None:
    """Write a file so that a reader, or a crash at any moment, sees the old content or the new, never a part.

    Args:
        path: of the file.
        content: of the file.
        sync: wait for the disk, so that this holds for a power cut as well. What a stage writes into its work folder
            need not: all of it is synced before the folder counts as whole.
    Raises:
        NotEnoughSpace: the disk is full; what was at `path` stays.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())  # mkstemp gives 0600; a file written plainly would be readable
        os.replace(name, path)
    except BaseException as error:
        os.unlink(name)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NotEnoughSpace(f"{path}: no space left for {len(data)} bytes; free some and run again") from error
        raise
    if sync:
        sync_folder(path.parent)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_files(files: Iterable[Path]) -> None:
    """Make the content of files, and their names in their folders, last through a power cut."""
    files = list(files)
    with ThreadPoolExecutor(_SYNCS) as threads:  # a disk does many at once in about the time of one
        list(threads.map(_sync, files))
        list(threads.map(sync_folder, sorted({file.parent for file in files})))


def _sync(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def environment() -> dict[str, str]:
    """What the result may depend on beside config and inputs: interpreter, machine and the versions that compute."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "cores": str(os.cpu_count())}
    for package in ("torch", "deepspeed", "transformers", "open_clip_torch", "peft", "numpy"):
        try:
            found[package] = _version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _version(package: str) -> str:
    """As `importlib.metadata.version`, which parses all of a package's description for it."""
    found = importlib.metadata.distribution(package)
    line = re.search(r"^Version: *(\S+)", found.read_text("METADATA") or "", re.MULTILINE)
    return line[1] if line else found.version


def code_version() -> str:
    """The package's version and, in a clone, the commit, with `+changed` where the tree differs from it."""
    version = importlib.metadata.version("mmfoundry")
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return version
    try:
        said = _git(root, "status", "--porcelain=v2", "--branch", "--untracked-files=no").splitlines()
    except (OSError, subprocess.SubprocessError):  # no git on this machine, or not its owner's clone
        return version
    commit = next((line.split()[2] for line in said if line.startswith("# branch.oid ")), "")[:12]
    changed = "" if all(line.startswith("#") for line in said) else "+changed"
    return f"{version} ({commit}{changed})"


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True, shell=False
    )
    return done.stdout.strip()


def now() -> str:
    """The time, UTC, to the second, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def to_json(value: BaseModel | Mapping[str, Any]) -> str:
    """Indented JSON with a final newline, keys in the order given."""
    tree = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
