"""The `release` stage: folders that open_clip, transformers and peft load with nothing of ours installed.

    mmfoundry release CONFIG [key=value ...] [--push ORG]

The artifact holds one folder a model and library: `clip-open_clip/`, `clip-transformers/`, `vlm/`, and the adapters
`clip-lora/` and `vlm-lora/`. Each has a model card, README.md, written from the manifests of the stages that made it.
With `push`, each folder becomes the hub repository `ORG/NAME-FOLDER`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mmfoundry.models.clip import CLIP
from mmfoundry.models.interop.clip_folders import save_for_open_clip as save_clip_for_open_clip
from mmfoundry.models.interop.clip_folders import save_for_transformers as save_clip_for_transformers
from mmfoundry.models.interop.load import load_any_clip
from mmfoundry.models.interop.transformers_vlm import save_for_transformers as save_vlm_for_transformers
from mmfoundry.models.vlm_io import load_vlm
from mmfoundry.pipeline.artifact import Artifact, sync_files, sync_folder, write_atomic
from mmfoundry.pipeline.config import ArtifactRef, Neutral, StageConfig
from mmfoundry.pipeline.distributed import barrier
from mmfoundry.pipeline.errors import ConfigError, MissingInput
from mmfoundry.pipeline.stage import RunContext, Stage
from mmfoundry.stages.adapt_clip import ADAPTER as CLIP_LORA
from mmfoundry.stages.adapt_vlm import ADAPTER as VLM_LORA
from mmfoundry.stages.release_card import CARD, CardConfig, Subject, write_card
from mmfoundry.stages.release_push import push_folders

CLIP_OPEN_CLIP, CLIP_TRANSFORMERS, VLM = "clip-open_clip", "clip-transformers", "vlm"
FOLDERS = (CLIP_OPEN_CLIP, CLIP_TRANSFORMERS, VLM, CLIP_LORA, VLM_LORA)
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# What an adapter is of: the entry of the adapt stage, this stage's field, the folder of the released base
_BASES = {CLIP_LORA: ("clip", CLIP_TRANSFORMERS), VLM_LORA: ("vlm", VLM)}
_WRITING = ".writing"  # ends the name of a folder that is not whole yet


class ReleaseConfig(StageConfig):
    """What to release, and what its cards say that no manifest knows."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="of the release; hub repositories are ORG/NAME-FOLDER"
    )
    clip: ArtifactRef | None = Field(
        None, description="a CLIP: a pretrain artifact, or a transformers or open_clip folder"
    )
    clip_formats: list[Literal["open_clip", "transformers"]] = Field(
        default=["open_clip", "transformers"], min_length=1, description="libraries that the CLIP is written for"
    )
    vlm: ArtifactRef | None = Field(None, description="a vision-language model: an instruct artifact")
    adapters: ArtifactRef | None = Field(None, description="adapters of these models: an adapt artifact")
    eval: ArtifactRef | None = Field(None, description="what was measured of these models: an eval artifact")
    card: CardConfig = Field(description="what the model cards say beside what the manifests know")
    push: Annotated[str | None, Neutral()] = Field(
        None, description="organisation or user of the Hugging Face hub to upload to; null: nothing leaves this machine"
    )
    private: Annotated[bool, Neutral()] = Field(False, description="make new hub repositories private")

    @model_validator(mode="after")
    def _something(self) -> ReleaseConfig:
        if self.clip is None and self.vlm is None and self.adapters is None:
            raise ConfigError("nothing to release: give clip, vlm or adapters")
        return self


def run(config: ReleaseConfig, context: RunContext) -> Artifact:
    """Write each folder; those that an earlier, cut-off run finished are not written again.

    Raises:
        ConfigError: a library has no class for the model, or adapters or measurements are of another model.
        MissingInput: an input is not there, or holds nothing to release.
        DamagedInput: a model cannot be read.
    """
    barrier(context.runtime.group)
    if context.runtime.is_main:
        parts = _parts(config, context)
        with context.progress(len(parts), "release", "folders") as shown, _quiet_transformers():
            for part in parts:
                if not (context.work / part.folder).is_dir():
                    _write(part, context)
                shown.advance(1)
    barrier(context.runtime.group)
    files = [file for folder in FOLDERS for file in (context.work / folder).rglob("*") if file.is_file()]
    folders = {file.relative_to(context.work).parts[0] for file in files}
    return context.finish({"folders": len(folders), "bytes": sum(file.stat().st_size for file in files)})


def deliver(config: ReleaseConfig, artifact: Artifact) -> None:
    """Upload the folders of a finished release, if the config says where to.

    Raises:
        MmfoundryError: the hub did not take one; the folders stay as they are.
    """
    if config.push is not None:
        folders = [folder for folder in FOLDERS if (artifact.path / folder).is_dir()]
        push_folders(artifact.path, folders, config.push, config.name, config.private)


@dataclass(frozen=True)
class _Part:
    """One folder of the release: how it is filled, and what its card is about."""

    folder: str
    fill: Callable[[Path], None]
    subject: Subject


def _parts(config: ReleaseConfig, context: RunContext) -> list[_Part]:
    """Everything that the config asks for, in the order of `FOLDERS`."""
    parts: list[_Part] = []
    measured = _measured(config, context)
    if config.clip is not None:
        clip = load_any_clip(context.inputs["clip"])
        for kind in config.clip_formats:
            folder = {"open_clip": CLIP_OPEN_CLIP, "transformers": CLIP_TRANSFORMERS}[kind]
            subject = Subject(folder, config.clip, context.inputs["clip"], measured, parameters=_size(clip))
            parts.append(_Part(folder, partial(_fill_clip, kind, clip), subject))
    if config.vlm is not None:
        subject = Subject(VLM, config.vlm, context.inputs["vlm"], measured)
        parts.append(_Part(VLM, partial(_fill_vlm, context.inputs["vlm"]), subject))
    if config.adapters is not None:
        parts += _adapters(config, context, [part.folder for part in parts])
    return parts


def _measured(config: ReleaseConfig, context: RunContext) -> Path | None:
    """The eval artifact, once it is known to be about the models that are released.

    Raises:
        ConfigError: it measured another model.
    """
    if config.eval is None:
        return None
    found = Artifact.open(context.inputs["eval"])
    for field in ("clip", "vlm"):
        ours, theirs = context.records.get(field), found.manifest.inputs.get(field)
        if ours is not None and theirs is not None and ours.digest != theirs.digest:
            raise ConfigError(
                f"eval: {found.path} measured another {field} ({theirs.ref}) than the one to release ({ours.ref}); "
                "measure this one, or leave eval out"
            )
    return found.path


def _adapters(config: ReleaseConfig, context: RunContext, released: list[str]) -> list[_Part]:
    """The adapters of an adapt artifact.

    Raises:
        MissingInput: it holds none.
        ConfigError: one goes on another model than the one that is released.
    """
    found = Artifact.open(context.inputs["adapters"])
    parts = []
    for folder, (field, base) in _BASES.items():
        source = found.path / folder
        if not source.is_dir():
            continue
        ours, theirs = context.records.get(field), found.manifest.inputs[f"{field}.model"]
        if ours is not None and ours.digest != theirs.digest:
            raise ConfigError(
                f"adapters: {source} goes on another {field} ({theirs.ref}) than the one to release ({ours.ref}); "
                f"adapt this one, or leave {field} out"
            )
        base_id = base if base in released else theirs.ref
        subject = Subject(folder, str(config.adapters), found.path, found.path, base=base_id)
        parts.append(_Part(folder, partial(_fill_adapter, source, base_id), subject))
    if not parts:
        raise MissingInput(f"adapters: {found.path} holds neither {CLIP_LORA}/ nor {VLM_LORA}/")
    return parts


def _write(part: _Part, context: RunContext) -> None:
    """Fill a folder beside its place, then give it its name: a folder of that name is whole."""
    aside, place = (context.work / f"{part.folder}{end}" for end in (_WRITING, ""))
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    part.fill(aside)
    write_card(aside / CARD, part.subject, context.config)  # type: ignore[arg-type]  # this stage's own
    sync_files(file for file in aside.rglob("*") if file.is_file())
    os.rename(aside, place)
    sync_folder(context.work)
    size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    context.log.say(f"release: {part.folder}, {size / 1e6:.1f} MB")


def _fill_clip(kind: str, clip: CLIP, folder: Path) -> None:
    (save_clip_for_open_clip if kind == "open_clip" else save_clip_for_transformers)(clip, folder)


def _fill_vlm(source: Path, folder: Path) -> None:
    save_vlm_for_transformers(*load_vlm(source), folder)


def _fill_adapter(source: Path, base: str, folder: Path) -> None:
    """Copy an adapter, and say in its config what it goes on."""
    for name in _ADAPTER_FILES:
        if not (source / name).is_file():
            raise MissingInput(f"{source / name}: no such file; the adapter is not whole")
        shutil.copyfile(source / name, folder / name)
    file = folder / _ADAPTER_FILES[0]
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    record["base_model_name_or_path"] = base
    base_config = folder.parent / base / "config.json"
    if base_config.is_file():  # released, too: then peft.AutoPeftModel can be told its class
        said = json.loads(base_config.read_text(encoding="utf-8"))
        record["auto_mapping"] = {
            "base_model_class": said["architectures"][0],
            "parent_library": f"transformers.models.{said['model_type']}.modeling_{said['model_type']}",
        }
    write_atomic(file, json.dumps(record, indent=2) + "\n")


def _size(model: CLIP) -> int:
    return sum(weight.numel() for weight in model.parameters())


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' own bars, which would cut through ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


STAGE = Stage(
    "release", ReleaseConfig, run, "write folders that other libraries load, with model cards", deliver=deliver
)
