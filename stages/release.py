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
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator
from transformers.utils import logging as transformers_logging

from mmfoundry.models.interop.any_clip import read_clip
from mmfoundry.models.interop.clip_folders import save_for_open_clip as save_clip_for_open_clip
from mmfoundry.models.interop.clip_folders import save_for_transformers as save_clip_for_transformers
from mmfoundry.models.interop.transformers_vlm import save_for_transformers as save_vlm_for_transformers
from mmfoundry.models.open_clip_model import OpenClip
from mmfoundry.models.vlm_io import load_vlm
from mmfoundry.pipeline.artifact import Artifact, sync_files, sync_folder, write_atomic
from mmfoundry.pipeline.config import ArtifactRef, Neutral, StageConfig
from mmfoundry.pipeline.distributed import barrier
from mmfoundry.pipeline.errors import ConfigError, MissingInput, MmfoundryError
from mmfoundry.pipeline.json_file import read_json
from mmfoundry.pipeline.resolve import is_local
from mmfoundry.pipeline.stage import RunContext, Stage
from mmfoundry.stages.adapt_clip import ADAPTER as CLIP_LORA
from mmfoundry.stages.adapt_vlm import ADAPTER as VLM_LORA
from mmfoundry.stages.release_card import BASES, CARD, CardConfig, Subject, write_card
from mmfoundry.stages.release_check import check_clip_model, check_open_clip, check_vlm
from mmfoundry.stages.release_facts import adapter_facts, clip_facts, vlm_facts
from mmfoundry.stages.release_push import push_folders

CLIP_OPEN_CLIP, CLIP_TRANSFORMERS, VLM = "clip-open_clip", "clip-transformers", "vlm"
FOLDERS = (CLIP_OPEN_CLIP, CLIP_TRANSFORMERS, VLM, CLIP_LORA, VLM_LORA)
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_FIELDS = {CLIP_LORA: "clip", VLM_LORA: "vlm"}  # what an adapter is of: part of the adapt stage, and input here
CHECKS = "checks"  # what was compared, a file a folder
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
    max_difference: float | None = Field(
        1e-3,
        gt=0,
        description="each folder is loaded again by its library and compared with our model: the stage stops where "
        "logits differ by more (fp32); null: not compared, for models that do not fit into memory twice",
    )
    card: CardConfig = Field(description="what the model cards say beside what the manifests know")
    push: Annotated[str | None, Neutral()] = Field(
        None, description="organisation or user of the Hugging Face hub to upload to; null: nothing leaves this machine"
    )
    private: Annotated[bool, Neutral()] = Field(
        False, description="make new hub repositories private; else they are as the organisation has it, mostly public"
    )

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
        MmfoundryError: a folder, loaded again, does not say what the model says.
    """
    barrier(context.runtime.group)
    if context.runtime.is_main:
        parts = _parts(config, context)
        with context.progress(len(parts), "release", "folders") as shown, _quiet_transformers():
            for part in parts:
                if not (context.work / part.folder).is_dir():
                    _write(part, config, context)
                shown.advance(1)
    barrier(context.runtime.group)
    folders = [folder for folder in FOLDERS if (context.work / folder).is_dir()]
    metrics: dict[str, float] = {"folders": len(folders)}
    metrics["bytes"] = sum(_size(context.work / folder) for folder in folders)
    found = [read_json(context.work / CHECKS / f"{folder}.json")["difference"] for folder in folders]
    compared = [difference for difference in found if difference is not None]
    if compared:
        metrics["max_difference"] = max(compared)
    return context.finish(metrics)


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
    """One folder of the release.

    Attributes:
        folder: its name.
        fill: writes the model into it.
        compare: loads it again; the largest difference of its logits to ours. None for an adapter whose base is not
            among the folders.
        subject: what its card is about.
    """

    folder: str
    fill: Callable[[Path], None]
    compare: Callable[[Path], float] | None
    subject: Subject


def _parts(config: ReleaseConfig, context: RunContext) -> list[_Part]:
    """Everything that the config asks for, in the order of `FOLDERS`."""
    parts: list[_Part] = []
    measured = _measured(config, context)
    if config.clip is not None:
        source = context.inputs["clip"]
        clip = read_clip(source)
        if "open_clip" in config.clip_formats:
            subject = Subject(CLIP_OPEN_CLIP, source, measured, clip_facts(clip))
            fill, compare = partial(save_clip_for_open_clip, clip), partial(check_open_clip, clip=clip)
            parts.append(_Part(CLIP_OPEN_CLIP, fill, compare, subject))
        if "transformers" in config.clip_formats:
            if isinstance(clip, OpenClip):
                kind = type(clip.open_clip).__name__
                raise ConfigError(f"clip_formats: transformers has no class for open_clip's {kind}; set [open_clip]")
            subject = Subject(CLIP_TRANSFORMERS, source, measured, clip_facts(clip))
            fill, compare = partial(save_clip_for_transformers, clip), partial(check_clip_model, clip=clip)
            parts.append(_Part(CLIP_TRANSFORMERS, fill, compare, subject))
    if config.vlm is not None:
        model, text = load_vlm(context.inputs["vlm"])
        subject = Subject(VLM, context.inputs["vlm"], measured, vlm_facts(model))
        fill, compare = partial(save_vlm_for_transformers, model, text), partial(check_vlm, model=model, text=text)
        parts.append(_Part(VLM, fill, compare, subject))
    if config.adapters is not None:
        parts += _adapters(context, {part.folder: part for part in parts})
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


def _adapters(context: RunContext, released: dict[str, _Part]) -> list[_Part]:
    """The adapters of an adapt artifact.

    Raises:
        MissingInput: it holds none, or one is not whole.
        ConfigError: one goes on another model than the one that is released.
    """
    found = Artifact.open(context.inputs["adapters"])
    parts = []
    for folder, field in _FIELDS.items():
        source, base = found.path / folder, BASES[folder]
        if not source.is_dir():
            continue
        missing = [name for name in _ADAPTER_FILES if not (source / name).is_file()]
        if missing:
            raise MissingInput(f"adapters: {source / missing[0]}: no such file; the adapter is not whole")
        ours, theirs = context.records.get(field), found.manifest.inputs[f"{field}.model"]
        if ours is not None and ours.digest != theirs.digest:
            raise ConfigError(
                f"adapters: {source} goes on another {field} ({theirs.ref}) than the one to release ({ours.ref}); "
                f"adapt this one, or leave {field} out"
            )
        compare = None
        if base in released:
            compare = partial(_compare_adapter, context.work / base, released[base])
        elif not _transformers_reads(theirs.ref):
            raise ConfigError(
                f"adapters: {source} goes on {theirs.ref}, which transformers cannot load: release it, too, as "
                f"`{field}`{' (clip_formats: [transformers])' if field == 'clip' else ''}"
            )
        base_id = base if base in released else theirs.ref
        subject = Subject(folder, found.path, found.path, adapter_facts(source), base=base_id)
        parts.append(_Part(folder, partial(_fill_adapter, source, base_id), compare, subject))
    if not parts:
        raise MissingInput(f"adapters: {found.path} holds neither {CLIP_LORA}/ nor {VLM_LORA}/")
    return parts


def _transformers_reads(ref: str) -> bool:
    """Whether a model's reference is a hub id, or a folder in transformers' layout."""
    if not is_local(ref):
        return True
    file = Path(ref) / "config.json"
    return file.is_file() and "architectures" in read_json(file)


def _write(part: _Part, config: ReleaseConfig, context: RunContext) -> None:
    """Fill a folder beside its place, compare it, then give it its name: a folder of that name is whole.

    Raises:
        MmfoundryError: what it says differs.
    """
    aside, place = (context.work / f"{part.folder}{end}" for end in (_WRITING, ""))
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    part.fill(aside)
    difference = None
    if config.max_difference is not None and part.compare is not None:
        difference = part.compare(aside)
        if not difference <= config.max_difference:
            raise MmfoundryError(
                f"release: {part.folder}, loaded again, gives logits that differ from the model's by "
                f"{difference:.2g}, more than max_difference ({config.max_difference:g}); see {aside}"
            )
    write_card(aside / CARD, part.subject, config, difference)
    write_atomic(context.work / CHECKS / f"{part.folder}.json", json.dumps({"difference": difference}) + "\n")
    files = [file for file in aside.rglob("*") if file.is_file()]
    for file in files:  # safetensors leaves weights unreadable to others; the card has the mode that the user wants
        file.chmod((aside / CARD).stat().st_mode)
    sync_files(files)
    os.rename(aside, place)
    sync_folder(context.work)
    compared = "" if difference is None else f", logits within {difference:.1e} of ours"
    context.log.say(f"release: {part.folder}, {_size(place) / 1e6:.1f} MB{compared}")


def _compare_adapter(base: Path, part: _Part, folder: Path) -> float:
    """The check of an adapter's base, the adapter put on both models."""
    assert part.compare is not None
    return part.compare(base, adapter=folder)  # type: ignore[call-arg]  # those of whole models take one


def _fill_adapter(source: Path, base: str, folder: Path) -> None:
    """Copy an adapter, and say in its config what it goes on."""
    for name in _ADAPTER_FILES:
        shutil.copyfile(source / name, folder / name)
    file = folder / _ADAPTER_FILES[0]
    record = read_json(file)
    record["base_model_name_or_path"] = base
    base_config = folder.parent / base / "config.json"
    if base in FOLDERS and base_config.is_file():  # then peft.AutoPeftModel can be told its class
        said = read_json(base_config)
        record["auto_mapping"] = {
            "base_model_class": said["architectures"][0],
            "parent_library": f"transformers.models.{said['model_type']}.modeling_{said['model_type']}",
        }
    write_atomic(file, json.dumps(record, indent=2) + "\n")


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' own bars, which would cut through ours, and its notes to its own developers."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


STAGE = Stage(
    "release", ReleaseConfig, run, "write folders that other libraries load, with model cards", deliver=deliver
)
