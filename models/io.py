"""A CLIP on disk, our own layout: `config.json` (what it is, and the seed it started from), `model.safetensors`, and
the files of its tokenizer where that is not CLIP's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from mmfoundry.models.clip import CLIP, ClipConfig
from mmfoundry.pipeline.artifact import write_atomic
from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.errors import DamagedInput, MissingInput
from mmfoundry.pipeline.json_file import read_json
from mmfoundry.pipeline.resolve import resolve_tokenizer
from mmfoundry.pipeline.torchvision_ops import declare_missing_ops

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
FORMAT = "mmfoundry.clip"
HERE = "."  # as hf_tokenizer_name: the model's own folder
# of a tokenizer of transformers, as far as it has them
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
)


def save_clip(
    model: CLIP,
    folder: str | Path,
    *,
    seed: int | None = None,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write a model into a folder, each file whole or not at all.

    Args:
        model: what to write; its dtype is kept.
        folder: made if it is not there.
        seed: of the weights it started from (`CLIP.from_seed`), so that evaluations can rebuild the untrained model;
            None where it did not start from a seed.
        state: weights by parameter name, where they are not (all) in `model` itself, as under ZeRO-3.

    Raises:
        NotEnoughSpace: the disk is full.
        MissingInput: its tokenizer is named, and not to be had.
    """
    folder = Path(folder)
    tensors = {name: value.detach().cpu().contiguous() for name, value in (state or model.state_dict()).items()}
    write_atomic(folder / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
    config = model.config.model_dump(mode="json")
    name = model.config.text_cfg.hf_tokenizer_name
    if name is not None:
        copy_tokenizer(name, folder)
        config["text_cfg"]["hf_tokenizer_name"] = HERE
    tokenizer = "clip" if name is None else "transformers"
    record = {"format": FORMAT, "init_seed": seed, "tokenizer": tokenizer, "model": config}
    write_atomic(folder / CONFIG_FILE, json.dumps(record, indent=2) + "\n")


def copy_tokenizer(name: str, folder: Path) -> None:
    """Copy a tokenizer's files, each whole or not at all, unless they are there already.

    Args:
        name: folder or hub id that has them.
        folder: made if it is not there.

    Raises:
        MissingInput: there is no such folder, or the hub cannot be reached.
    """
    source = resolve_tokenizer(name)
    for file in (source / each for each in TOKENIZER_FILES):
        if file.is_file() and source.resolve() != folder.resolve():
            write_atomic(folder / file.name, file.read_bytes())


def save_tokenizer(name: str, folder: Path) -> None:
    """Write a tokenizer as transformers does, which names its class, unless it is there already.

    Args:
        name: folder or hub id that has it, and maybe a `config.json` that the class follows from.
        folder: where to.

    Raises:
        MissingInput: there is no such folder, or the hub cannot be reached.
    """
    source = resolve_tokenizer(name)
    if source.resolve() == folder.resolve():
        return
    declare_missing_ops()  # transformers imports torchvision
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(folder)


def load_clip(folder: str | Path) -> CLIP:
    """Read a model that `save_clip` wrote, on the CPU, in evaluation mode.

    Raises:
        MissingInput: a file is not there.
        DamagedInput: a file cannot be read, or the weights do not fit the config.
    """
    folder = Path(folder)
    _, config = _read_config(folder)
    return clip_from_state(config, read_weights(folder), str(folder / WEIGHTS_FILE))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a model that we saved, on the CPU.

    Raises:
        MissingInput: there are none.
        DamagedInput: they cannot be read.
    """
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise MissingInput(f"{weights}: no such file; run the stage that trains this model")
    try:
        return load_file(weights)
    except SafetensorError as error:
        raise DamagedInput(f"{weights}: not a whole safetensors file ({error}); make it anew") from error


def clip_from_state(config: ClipConfig, state: dict[str, Tensor], source: str) -> CLIP:
    """A model that holds these weights themselves, without a start of its own; in evaluation mode.

    Raises:
        DamagedInput: the weights do not fit the config; `source` is named.
    """
    with torch.device("meta"):
        model = CLIP(config)
    check_fit(model, state, source)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(True).eval()


def untrained_clip(folder: str | Path) -> CLIP:
    """The model in a folder as it was before training: same config, same seed; on the CPU, in evaluation mode.

    Raises:
        MissingInput: there is no config, or the model did not start from a seed.
        DamagedInput: the config cannot be read.
    """
    folder = Path(folder)
    record, config = _read_config(folder)
    if record.get("init_seed") is None:
        raise MissingInput(f"{folder / CONFIG_FILE}: init_seed is not set, so the untrained model is not known")
    return CLIP.from_seed(config, record["init_seed"]).eval()


def check_fit(model: torch.nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Compare names and shapes of weights with a model's.

    Raises:
        DamagedInput: the first few that are missing, unknown or of another shape.
    """
    wanted = model.state_dict()
    missing = [f"{name} is missing" for name in wanted if name not in state]
    unknown = [f"{name} is not known" for name in state if name not in wanted]
    shapes = [
        f"{name} is {tuple(state[name].shape)}, not {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in state and state[name].shape != value.shape
    ]
    problems = [*missing, *unknown, *shapes]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise DamagedInput(f"{source}: the weights do not fit the config: {'; '.join(problems[:3])}{more}")


def read_record(folder: Path, format: str, what: str) -> tuple[Path, dict[str, Any]]:
    """The `config.json` of a folder that we wrote, and where it lies: a mapping with a mapping `model` in it.

    Args:
        folder: of the model.
        format: that it must have, e.g. `mmfoundry.clip`.
        what: the kind of model, for errors.

    Raises:
        MissingInput: there is none.
        DamagedInput: it is not JSON, or of something else.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise MissingInput(f"{file}: no such file; the folder of a {what} holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    record = read_json(file)
    if record.get("format") != format or not isinstance(record.get("model"), dict):
        raise DamagedInput(f"{file}: not the config of one of our {what}s (format is not {format!r})")
    return file, record


def _read_config(folder: Path) -> tuple[dict[str, Any], ClipConfig]:
    file, record = read_record(folder, FORMAT, "CLIP")
    text = record["model"].get("text_cfg")
    if isinstance(text, dict) and text.get("hf_tokenizer_name") == HERE:
        text["hf_tokenizer_name"] = str(folder)
    return record, parse(ClipConfig, record["model"], source=file, prefix="model")
