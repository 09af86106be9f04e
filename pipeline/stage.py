"""The stage contract: a typed config, a `run(config, context) -> Artifact`, and a folder that is whole or absent.

A stage writes into `<output>.work`, which survives a kill. When it is done, the manifest is written there and the
folder is renamed to `output`: a folder with a manifest is whole. Started again with the same config and inputs, a
finished stage is skipped and a cut-off one finds its work folder as it left it. Work that no longer fits is moved to
`<output>.stale`, never deleted before something took its place.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import ValidationError

from mmfoundry.pipeline import artifact as artifacts
from mmfoundry.pipeline.artifact import MANIFEST, Artifact, InputRecord, Manifest, digest_of, write_atomic
from mmfoundry.pipeline.config import StageConfig, digest_config, inputs_of, local_inputs_of
from mmfoundry.pipeline.errors import ConfigError, MissingInput, MmfoundryError, NotEnoughSpace, disk_full
from mmfoundry.pipeline.progress import Progress, progress_bar
from mmfoundry.pipeline.resolve import resolve

if TYPE_CHECKING:  # torch takes seconds to import, and the plan of a recipe needs none of it
    from mmfoundry.pipeline.distributed import Runtime
    from mmfoundry.pipeline.metrics import StageLog

CLAIM = "stage.json"  # in the work folder: what the work was begun for
CHECKPOINTS = "checkpoints"  # in the work folder: needed to resume, not part of the artifact
LOCK_WAIT_S = 20.0


@dataclass(frozen=True)
class Stage:
    """A stage: what it is called, what it reads, what it does, and one line for people.

    `run(config, context)` does the work and ends with `return context.finish(metrics)`. `deliver(config, artifact)`, if
    there is one, is called on the main rank with the finished artifact, also where that was found done.
    """

    name: str
    config_type: type[StageConfig]
    run: Callable[[Any, RunContext], Artifact]
    summary: str
    deliver: Callable[[Any, Artifact], None] | None = None


@dataclass(frozen=True)
class Standing:
    """Where a stage stands before it is run."""

    action: Literal["skip", "resume", "run"]
    why: str


@dataclass
class RunContext:
    """What a stage knows of its run.

    Attributes:
        output: the artifact's final place.
        work: the folder to write into now; what an earlier, cut-off run of the same config left is in it.
        runtime: this process among those that run the stage.
        config: the stage's config, as in the manifest.
        inputs: dotted config field -> local path of what it names; those behind URLs are left out, see `shards`.
    """

    stage: Stage
    output: Path
    work: Path
    runtime: Runtime
    config: StageConfig
    inputs: dict[str, Path]
    records: dict[str, InputRecord]
    started: float = field(default_factory=time.monotonic)

    def resolve(self, ref: str) -> Path:
        """The local path of an artifact folder, a path, a glob or a hub id.

        Raises:
            MissingInput: there is nothing of that name.
        """
        return resolve(ref)

    def shards(self, field: str) -> Path | str:
        """Where the shards are that a config field of type `ShardsRef` names: a local path, or a URL to read from."""
        return self.inputs[field] if field in self.inputs else inputs_of(self.config)[field]

    @cached_property
    def log(self) -> StageLog:
        """Scalars to `metrics.jsonl` and TensorBoard, and lines to people; only the main rank writes."""
        from mmfoundry.pipeline.metrics import StageLog

        return StageLog(self.work, self.runtime.is_main)

    def progress(
        self, total: int | None, description: str, unit: str = "samples"
    ) -> contextlib.AbstractContextManager[Progress]:
        """A bar with an ETA while its block runs; off a terminal, a line every 15 s. Silent on other ranks."""
        return progress_bar(total, description, unit, visible=self.runtime.is_main)

    def seconds(self) -> float:
        """Wall time spent so far, over all parts of an interrupted run."""
        return _spent(self.work) + time.monotonic() - self.started

    def finish(self, metrics: dict[str, float], keep_checkpoints: bool = False) -> Artifact:
        """Write the manifest and move the work folder to `output`; every rank calls it, the main rank does it.

        Args:
            metrics: the stage's headline numbers, finite.
            keep_checkpoints: leave `checkpoints/` in the artifact's folder (it is never listed in the manifest).
        Raises:
            ValueError: a metric is not a finite number.
        """
        from mmfoundry.pipeline.distributed import barrier

        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            raise ValueError(f"stage {self.stage.name}: metrics are not finite numbers: {', '.join(bad)}")
        if "log" in self.__dict__:
            self.log.close()
        barrier(self.runtime.group)
        if self.runtime.is_main:
            self._publish({name: float(value) for name, value in metrics.items()}, keep_checkpoints)
        barrier(self.runtime.group)
        return Artifact.open(self.output)

    def _publish(self, metrics: dict[str, float], keep_checkpoints: bool) -> None:
        seconds = self.seconds()
        asked = ThreadPoolExecutor(1)
        version = asked.submit(artifacts.code_version)  # git takes its time
        for left_over in self.work.rglob(".*.part"):  # of a write that was cut off
            left_over.unlink()
        files = artifacts.records_of(self.work, leave_out=(CHECKPOINTS, CLAIM))
        artifacts.sync_files(self.work / name for name in files)
        manifest = Manifest(
            stage=self.stage.name,
            config=self.config.model_dump(mode="json"),
            config_digest=digest_config(self.config),
            inputs=self.records,
            digest=artifacts.digest_content(files),
            code_version=version.result(),
            seed=self.config.seed,
            environment=artifacts.environment() | _place(self.runtime),
            metrics=metrics,
            seconds=round(seconds, 3),
            created=artifacts.now(),
            files=files,
        )
        asked.shutdown()
        write_atomic(self.work / MANIFEST, artifacts.to_json(manifest))
        os.rename(self.work, self.output)
        artifacts.sync_folder(self.output.parent)
        (self.output / CLAIM).unlink()
        if not keep_checkpoints:  # after the rename: a kill in between leaves files too many, never too few
            shutil.rmtree(self.output / CHECKPOINTS, ignore_errors=True)


def _place(runtime: Runtime) -> dict[str, str]:
    return {"ranks": str(runtime.world_size), "device": runtime.device.type}


def run_stage(stage: Stage, config: StageConfig, output: str | Path, runtime: Runtime) -> Artifact:
    """Run a stage, go on with a cut-off run of it, or do nothing where its artifact already holds.

    Every rank calls it with the same arguments on a shared filesystem. Random generators are seeded from the config.

    Args:
        stage: what to run.
        config: of the stage's config type.
        output: the artifact's folder. An artifact in it that no longer fits is moved to `<output>.stale`.
        runtime: this process among those that run the stage.
    Raises:
        MissingInput: an input is not there; raised before anything is written.
        ConfigError: `output` is a folder of something else, or in an input's folder, or an input is in it.
        NotEnoughSpace: the disk filled up; the work is kept.
        MmfoundryError: another process is running this stage in this place.
    """
    from mmfoundry.pipeline.distributed import barrier

    output = Path(os.path.abspath(output))
    inputs = resolve_inputs(stage, config)
    check_apart(stage, output, inputs)
    with _lock(output) if runtime.is_main else contextlib.nullcontext():
        records = record_inputs(config, inputs) if runtime.is_main else {}
        aside = _prepare(stage, config, output, records) if runtime.is_main else None
        barrier(runtime.group)
        if (output / MANIFEST).is_file():  # left in place by `_prepare`: it holds
            artifact = Artifact.open(output)
        else:
            seed_everything(config.seed)
            context = RunContext(stage, output, work_folder(output), runtime, config, inputs, records)
            if aside:
                context.log.say(f"{stage.name}: {aside}")
            artifact = _run(stage, context)
    if stage.deliver is not None and runtime.is_main:
        stage.deliver(config, artifact)
    return artifact


def _run(stage: Stage, context: RunContext) -> Artifact:
    try:
        return stage.run(context.config, context)
    except Exception as error:
        if not disk_full(error):
            raise
        raise NotEnoughSpace(
            f"{stage.name}: no space left on the disk of {context.work}; what was finished is kept: "
            "free some and run again"
        ) from error


def work_folder(output: Path) -> Path:
    """Where a stage writes until it is done."""
    return output.with_name(f"{output.name}.work")


def resolve_inputs(stage: Stage, config: StageConfig) -> dict[str, Path]:
    """The local path of every input of a config that is not behind a URL, by dotted field.

    Raises:
        MissingInput: one is not there; stage and field are named.
    """
    found = {}
    for name, ref in local_inputs_of(config).items():
        try:
            found[name] = resolve(ref)
        except MissingInput as error:
            raise MissingInput(f"{stage.name}.{config.place_of(name)}: {error}") from error
    return found


def check_apart(stage: Stage, output: Path, inputs: Mapping[str, Path]) -> None:
    """Refuse an output that would change an input, or whose moving aside would take an input along.

    Raises:
        ConfigError: input and output are named.
    """
    place = output.resolve()
    for name, path in inputs.items():
        found = path.resolve()
        if found.is_relative_to(place):
            raise ConfigError(f"{stage.name}.{name}: {path} lies in the output, {output}; choose another output folder")
        if place.is_relative_to(found) and not (found / MANIFEST).is_file():  # an artifact is known by its manifest
            raise ConfigError(
                f"{output}: lies in {stage.name}.{name}, {path}, which it would change; choose another output folder"
            )


def record_inputs(config: StageConfig, inputs: dict[str, Path]) -> dict[str, InputRecord]:
    """What the manifest says of each input: the reference as written and the digest of its content.

    What is behind a URL counts by the URL alone: what changes there must change its name to be noticed.
    """
    return {
        name: InputRecord(ref=ref, digest=digest_of(inputs[name]) if name in inputs else f"url:{ref}")
        for name, ref in inputs_of(config).items()
    }


def standing(stage: Stage, config: StageConfig, output: Path, records: dict[str, InputRecord]) -> Standing:
    """Whether the stage's artifact still holds, a cut-off run can go on, or it must run; and why.

    Args:
        stage: the stage.
        config: its config now.
        output: the artifact's folder.
        records: its inputs now, from `record_inputs`.
    """
    change = None
    if (output / MANIFEST).is_file():
        try:
            found = Artifact.open(output)
        except MmfoundryError:
            change = "its manifest cannot be read"
        else:
            manifest = found.manifest
            then = manifest.model_dump() | {"inputs": _digests(manifest.inputs)}
            change = _difference(stage, config, records, then) or found.damage()
        if change is None:
            return Standing("skip", "done; config and inputs are unchanged")
    claim = _read_claim(work_folder(output))
    if claim and _difference(stage, config, records, claim) is None:
        return Standing("resume", "cut off earlier; goes on from what it left")
    return Standing("run", change or ("its cut-off run was for another config or input" if claim else "not run yet"))


def _difference(
    stage: Stage, config: StageConfig, records: dict[str, InputRecord], then: Mapping[str, Any]
) -> str | None:
    """What changed since `then` (a claim or manifest), in words; None when nothing that matters did."""
    if then["stage"] != stage.name:
        return f"the folder holds a {then['stage']} artifact"
    if then["config_digest"] != digest_config(config):
        filled = _with_new_keys(type(config), then["config"])
        if filled is None or digest_config(filled) != digest_config(config):
            now = _flat(config.model_dump(mode="json"))
            before = _flat(then["config"] if filled is None else filled.model_dump(mode="json"))
            skipped = inputs_of(config)
            keys = [k for k in sorted(now.keys() | before.keys()) if now.get(k) != before.get(k) and k not in skipped]
            return f"its config changed: {', '.join(keys[:4]) or 'its fields'}"
    if then["inputs"] != _digests(records):
        keys = sorted(
            k for k in then["inputs"].keys() | records.keys() if then["inputs"].get(k) != _digests(records).get(k)
        )
        return f"its input changed: {', '.join(keys)}"
    return None


def _with_new_keys(config_type: type[StageConfig], before: Any) -> StageConfig | None:
    """A config as an earlier release recorded it, with the defaults of keys that came since; None if it fits no more.

    The default of a new key leaves results as they were, so that an artifact of before still holds.
    """
    try:
        return config_type.model_validate(before)
    except (ValidationError, MmfoundryError):
        return None


def _digests(records: dict[str, InputRecord]) -> dict[str, str]:
    return {name: record.digest for name, record in records.items()}


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts and lists as dotted keys."""
    if isinstance(tree, dict):
        pairs = list(tree.items())
    elif isinstance(tree, list):
        pairs = list(enumerate(tree))
    else:
        return {prefix: tree}
    return {key: leaf for name, value in pairs for key, leaf in _flat(value, f"{prefix}.{name}".strip(".")).items()}


def _prepare(stage: Stage, config: StageConfig, output: Path, records: dict[str, InputRecord]) -> str | None:
    """Leave either the artifact that holds, or a work folder claimed for this config, in place.

    Returns:
        What was moved aside, and why, in words.
    """
    now = standing(stage, config, output, records)
    if now.action == "skip":
        return None
    if output.exists() and not (output / MANIFEST).is_file():
        if not output.is_dir() or any(output.iterdir()):
            raise ConfigError(f"{output}: exists and is not an artifact of mmfoundry; choose another output folder")
        output.rmdir()
    work = work_folder(output)
    moved = None
    if now.action == "run" and work.exists():
        moved = _set_aside(work, output)
    if output.exists():
        moved = _set_aside(output, output)
    work.mkdir(parents=True, exist_ok=True)
    claim = {
        "stage": stage.name,
        "config": config.model_dump(mode="json"),
        "config_digest": digest_config(config),
        "inputs": _digests(records),
        "spent_s": _spent_before(work),
        "begun": time.time(),
    }
    write_atomic(work / CLAIM, json.dumps(claim, indent=2) + "\n")
    return f"{now.why}; {moved}" if moved else None


def _set_aside(folder: Path, output: Path) -> str:
    stale = output.with_name(f"{output.name}.stale")
    replaced = stale.exists()
    if replaced:
        shutil.rmtree(stale)
    os.rename(folder, stale)
    return f"{folder.name} is now {stale.name}{', in place of an older one' if replaced else ''}"


def _read_claim(work: Path) -> dict[str, Any] | None:
    try:
        return json.loads((work / CLAIM).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def _spent(work: Path) -> float:
    claim = _read_claim(work)
    return float(claim["spent_s"]) if claim else 0.0


def _spent_before(work: Path) -> float:
    """Seconds of earlier parts. A killed part cannot say when it ended; its last written file does."""
    claim = _read_claim(work)
    if claim is None:
        return 0.0
    last = max(file.stat().st_mtime for file in work.rglob("*"))
    return round(float(claim["spent_s"]) + max(0.0, last - float(claim["begun"])), 3)


@contextlib.contextmanager
def _lock(output: Path) -> Iterator[None]:
    """Hold the stage's place against a second run; a killed run gives it free, once its child processes are gone."""
    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.with_name(f".{output.name}.lock")
    with path.open("a+") as file:
        deadline = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                    break  # a filesystem without locks
                if time.monotonic() > deadline:
                    file.seek(0)
                    holder = file.read().strip() or "unknown"
                    raise MmfoundryError(
                        f"{output}: another run (process {holder}) is writing it; wait for it or choose another output"
                    ) from error
            time.sleep(0.2)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators, so that a stage does not depend on what ran before it."""
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
