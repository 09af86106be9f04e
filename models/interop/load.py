"""A CLIP from a folder, whoever wrote it: ours, transformers' or open_clip's layout, told apart by their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmfoundry.models.clip import CLIP
from mmfoundry.models.interop.open_clip import from_open_clip, from_open_clip_config
from mmfoundry.models.interop.transformers_clip import from_transformers
from mmfoundry.models.interop.transformers_siglip import from_siglip
from mmfoundry.models.io import CONFIG_FILE, FORMAT, WEIGHTS_FILE, load_clip
from mmfoundry.pipeline.errors import ConfigError, DamagedInput, MissingInput
from mmfoundry.pipeline.json_file import read_json

OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"


def load_any_clip(folder: str | Path) -> CLIP:
    """Read a CLIP, on the CPU, in evaluation mode. Weights are read from safetensors only.

    Args:
        folder: holds `config.json` and `model.safetensors` (ours, or transformers' CLIPModel or SiglipModel), or
            `open_clip_config.json` and `open_clip_model.safetensors`.

    Raises:
        MissingInput: none of these is there.
        DamagedInput: a file cannot be read, or the weights do not fit the config.
        ConfigError: a model that is not a plain CLIP.
    """
    folder = Path(folder)
    if (folder / OPEN_CLIP_CONFIG).is_file():
        record = read_json(folder / OPEN_CLIP_CONFIG)
        parts = (record.get("model_cfg", {}), record.get("preprocess_cfg"))
        source = str(folder / OPEN_CLIP_CONFIG)
        try:
            from_open_clip_config(*parts, source)
        except ConfigError as error:
            raise ConfigError(f"{error}; only a plain ViT CLIP or a SigLIP can be used here") from error
        model = from_open_clip(parts[0], read_weights(folder / OPEN_CLIP_WEIGHTS), parts[1], source)
        return model if model.config.text_cfg.hf_tokenizer_name is None else _with_tokenizer(model, folder)
    if not (folder / CONFIG_FILE).is_file():
        raise MissingInput(f"{folder}: no CLIP here: neither {CONFIG_FILE} nor {OPEN_CLIP_CONFIG}")
    record = read_json(folder / CONFIG_FILE)
    if record.get("format") == FORMAT:
        return load_clip(folder)
    if record.get("model_type") == "siglip2":
        raise ConfigError(
            f"{folder / CONFIG_FILE}: a NaFlex SigLIP 2 (model_type siglip2): take one of fixed resolution"
        )
    if record.get("model_type") == "siglip":
        weights = read_weights(folder / WEIGHTS_FILE)
        return _with_tokenizer(from_siglip(_with_defaults(record), weights, str(folder / CONFIG_FILE)), folder)
    if record.get("model_type") != "clip":
        raise DamagedInput(
            f"{folder / CONFIG_FILE}: neither one of our CLIPs nor a CLIPModel or SiglipModel of transformers"
        )
    return from_transformers(_with_defaults(record), read_weights(folder / WEIGHTS_FILE), str(folder / CONFIG_FILE))


def _with_tokenizer(model: CLIP, folder: Path) -> CLIP:
    """The model, its captions read by the tokenizer in its folder."""
    text = model.config.text_cfg.model_copy(update={"hf_tokenizer_name": str(folder)})
    model.config = model.config.model_copy(update={"text_cfg": text})
    model.text_model.config = text
    return model


def _with_defaults(record: dict[str, Any]) -> dict[str, Any]:
    """The config of a model of transformers with what it leaves to that filled in."""
    from mmfoundry.pipeline.torchvision_ops import declare_missing_ops

    declare_missing_ops()  # transformers imports torchvision
    from transformers import CLIPConfig, SiglipConfig

    return (SiglipConfig if record["model_type"] == "siglip" else CLIPConfig)(**record).to_dict()


def read_weights(file: Path) -> dict[str, Tensor]:
    """Weights by name, on the CPU.

    Raises:
        MissingInput: no such file.
        DamagedInput: not a whole safetensors file.
    """
    if not file.is_file():
        raise MissingInput(f"{file}: no such file; weights are read from safetensors only")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise DamagedInput(f"{file}: not a whole safetensors file ({error})") from error
