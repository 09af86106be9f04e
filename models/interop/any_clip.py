"""A CLIP of either kind, ours or open_clip's module: from a name or a folder, into a folder, and untrained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from mmfoundry.models.clip import CLIP, ClipConfig
from mmfoundry.models.interop.load import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS, load_any_clip, read_weights
from mmfoundry.models.interop.open_clip import from_open_clip_config, model_cfg_file, named_model_cfg
from mmfoundry.models.io import HERE, TOKENIZER_FILES, check_fit, save_clip, save_tokenizer, untrained_clip
from mmfoundry.models.open_clip_groups import unfrozen_counts
from mmfoundry.models.open_clip_model import OpenClip, OpenClipConfig, OpenClipPreprocess
from mmfoundry.pipeline.artifact import write_atomic
from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.errors import ConfigError, DamagedInput, MissingInput
from mmfoundry.pipeline.json_file import read_json

AnyClip = CLIP | OpenClip
AnyClipConfig = ClipConfig | OpenClipConfig
OURS = "mmfoundry"  # in open_clip_config.json, what open_clip has no key for and does not read
_PREFIX = "open_clip."  # of all parameters of an `OpenClip`


def config_of_name(name: str) -> AnyClipConfig:
    """A config by the name of open_clip's model, or from a JSON file: of our own towers where they can express it.

    Args:
        name: open_clip's; or the path of a .json file, a model config or a folder's `open_clip_config.json`.

    Raises:
        UnknownName: open_clip has none of this name; the nearest is said.
        ConfigError: nothing here can build it (the key is named), or the file cannot be read.
    """
    if name.endswith(".json"):
        found = model_cfg_file(name)
        return config_of(found.get("model_cfg", found), found.get("preprocess_cfg"), source=name)
    return config_of(named_model_cfg(name), source=f"open_clip's {name}")


def config_of(
    model_cfg: dict[str, Any], preprocess_cfg: dict[str, Any] | None = None, source: str = "open_clip config"
) -> AnyClipConfig:
    """Our config for one of open_clip's, or its own where our towers cannot express it.

    Args:
        model_cfg: as in open_clip's model configs.
        preprocess_cfg: as in its `open_clip_config.json`.
        source: named in errors.

    Raises:
        ConfigError: open_clip cannot build it without a hub, either; the key is named.
    """
    try:
        return from_open_clip_config(model_cfg, preprocess_cfg, source)
    except ConfigError:
        known = {key: each for key, each in (preprocess_cfg or {}).items() if key in OpenClipPreprocess.model_fields}
        return parse(OpenClipConfig, {"open_clip": model_cfg, "preprocess_cfg": known}, source=source)


def read_clip(folder: str | Path) -> AnyClip:
    """Read a CLIP of any layout, on the CPU, in evaluation mode; of open_clip's, whatever open_clip itself can build.

    Args:
        folder: as for `load_any_clip`.

    Raises:
        MissingInput: no CLIP is there.
        DamagedInput: a file cannot be read, or the weights do not fit the config.
        ConfigError: a model that neither we nor open_clip can build without a hub.
    """
    config = _open_clip_config(Path(folder))
    if config is None:
        return load_any_clip(folder)
    model = OpenClip.from_seed(config.architecture(), 0)
    model.config = config
    file = Path(folder) / OPEN_CLIP_WEIGHTS
    state = {name: value for name, value in read_weights(file).items() if name != "attn_mask"}
    check_fit(model.open_clip, state, str(file))
    model.open_clip.load_state_dict(state)
    return model.eval()


def save_any_clip(
    model: AnyClip, folder: str | Path, *, seed: int | None = None, state: dict[str, Tensor] | None = None
) -> None:
    """Write a model into a folder that `read_clip` reads; open_clip's module in open_clip's own layout.

    Args:
        model: what to write; its dtype is kept.
        folder: made if it is not there.
        seed: of the weights it started from; None where it did not start from a seed.
        state: weights by parameter name, where they are not (all) in `model` itself, as under ZeRO-3.

    Raises:
        NotEnoughSpace: the disk is full.
        MissingInput: its tokenizer is named, and not to be had.
    """
    if isinstance(model, CLIP):
        save_clip(model, folder, seed=seed, state=state)
        return
    folder, config = Path(folder), model.config
    named = {name.removeprefix(_PREFIX): value for name, value in (state or model.state_dict()).items()}
    tensors = {name: value.detach().cpu().contiguous() for name, value in named.items()}
    tensors |= unfrozen_counts(model.open_clip)
    if config.max_logit_scale is not None:  # what is written is the value as it acts
        tensors["logit_scale"] = tensors["logit_scale"].clamp(max=torch.tensor(config.max_logit_scale).log().item())
    folder.mkdir(parents=True, exist_ok=True)
    tree = config.open_clip
    if (name := config.text_cfg.hf_tokenizer_name) is not None:
        save_tokenizer(name, folder)
        tree = tree | {"text_cfg": tree["text_cfg"] | {"hf_tokenizer_name": HERE}}
    write_atomic(folder / OPEN_CLIP_WEIGHTS, save(tensors, metadata={"format": "pt"}))
    record = {
        "model_cfg": tree,
        "preprocess_cfg": config.preprocess_cfg.model_dump(mode="json"),
        OURS: {"init_seed": seed, "max_logit_scale": config.max_logit_scale},
    }
    write_atomic(folder / OPEN_CLIP_CONFIG, json.dumps(record, indent=2) + "\n")


def before_training(model: AnyClip, folder: Path, seed: int) -> AnyClip:
    """The weights that training started from; of a model from elsewhere, any random weights of its architecture.

    Args:
        model: as `read_clip` read it.
        folder: where from.
        seed: of the random weights of a model that does not say its own.
    """
    if isinstance(model, OpenClip):
        own = _ours(read_json(folder / OPEN_CLIP_CONFIG)).get("init_seed")
        return OpenClip.from_seed(model.config, seed if own is None else own).eval()
    try:
        return untrained_clip(folder)
    except (MissingInput, DamagedInput):  # another layout, or no seed in it
        return CLIP.from_seed(model.config, seed).eval()


def _open_clip_config(folder: Path) -> OpenClipConfig | None:
    """The config of a model that open_clip has to compute; None where it is not in its layout, or we can."""
    file = folder / OPEN_CLIP_CONFIG
    if not file.is_file():
        return None
    record = read_json(file)
    parts = (record.get("model_cfg", {}), record.get("preprocess_cfg") or {})
    if not all(isinstance(part, dict) for part in parts):
        raise DamagedInput(f"{file}: model_cfg and preprocess_cfg should be JSON objects")
    text = parts[0].get("text_cfg")
    if (
        isinstance(text, dict)
        and text.get("hf_tokenizer_name")
        and any((file.parent / each).is_file() for each in TOKENIZER_FILES)
    ):
        parts = (parts[0] | {"text_cfg": text | {"hf_tokenizer_name": str(folder)}}, parts[1])
    ours = _ours(record)
    if ours:  # we wrote it: an OpenClip stays one, even where our own towers could express it
        tree = {"open_clip": parts[0], "preprocess_cfg": parts[1], "max_logit_scale": ours.get("max_logit_scale")}
        return parse(OpenClipConfig, tree, source=file)
    config = config_of(*parts, source=str(file))
    return config if isinstance(config, OpenClipConfig) else None


def _ours(record: dict[str, Any]) -> dict[str, Any]:
    """What we wrote into open_clip's config."""
    found = record.get(OURS)
    return found if isinstance(found, dict) else {}
