"""A vision-language model on disk, our own layout: `config.json`, `model.safetensors` and the tokenizer's files."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from mmfoundry.models.clip import CLIP
from mmfoundry.models.io import CONFIG_FILE, WEIGHTS_FILE, read_record, read_weights
from mmfoundry.models.language import LanguageModel, load_language_model
from mmfoundry.models.vlm import VisionLanguageModel, VlmConfig, VlmSettings
from mmfoundry.models.vlm_text import VlmText, prepare_tokenizer
from mmfoundry.pipeline.artifact import sync_files, write_atomic
from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.errors import DamagedInput, MissingInput
from mmfoundry.pipeline.resolve import resolve

FORMAT = "mmfoundry.vlm"


def build_vlm(
    clip: CLIP, language: LanguageModel, settings: VlmSettings, seed: int
) -> tuple[VisionLanguageModel, VlmText]:
    """A vision-language model of a CLIP's vision tower, an untrained connector and a language model.

    Args:
        clip: its vision tower is copied, be it CLIP's or SigLIP's.
        language: model and tokenizer are taken over and changed: the tokenizer learns the placeholder, and the model
            gets a vector for it where it has none.
        settings: everything that can be chosen.
        seed: of the connector's weights.

    Raises:
        ConfigError: the tokenizer cannot be used; see `prepare_tokenizer`.
    """
    patch_id = prepare_language_model(language, settings)
    config = VlmConfig(
        **settings.model_dump(),
        vision=clip.config.vision_cfg,
        quick_gelu=clip.config.quick_gelu,
        preprocess=clip.config.preprocess_cfg,
        language_model=_plain_config(language.model.config),
        patch_token_id=patch_id,
    )
    model = connected(config, language.model, seed)
    model.model.vision_tower.load_state_dict(clip.vision_model.state_dict())
    return model.eval(), VlmText(language.tokenizer, settings, model.tokens_per_tile)


def prepare_language_model(language: LanguageModel, settings: VlmSettings) -> int:
    """Teach tokenizer and model the placeholder, in place; its id.

    Raises:
        ConfigError: the tokenizer cannot be used; see `prepare_tokenizer`.
    """
    prepare_tokenizer(language.tokenizer, settings)
    patch_id: int = language.tokenizer.convert_tokens_to_ids(settings.image.patch_token)  # type: ignore[assignment]
    if patch_id >= len(language.model.get_input_embeddings().weight):  # type: ignore[arg-type]  # a tensor has a length
        _add_rows(language.model, len(language.tokenizer))
    return patch_id


def _add_rows(model: PreTrainedModel, count: int) -> None:
    """Widen the vocabulary to `count`; a new row is the mean of the old, so that it is never the likeliest word."""
    old = model.get_input_embeddings().weight.shape[0]  # type: ignore[index]  # a tensor has a shape
    model.resize_token_embeddings(count, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            weight: torch.Tensor = layer.weight  # type: ignore[assignment]
            weight[old:] = weight[:old].mean(0)


def connected(config: VlmConfig, language_model: PreTrainedModel, seed: int) -> VisionLanguageModel:
    """A model around a language model; the rest of its weights come from the seed, the caller's random state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VisionLanguageModel(config, language_model)


@dataclass(frozen=True)
class Start:
    """What a model was before it was tuned, so that evaluations can rebuild it: its vision tower was not changed.

    Attributes:
        language_model: reference of the language model, as the config named it.
        seed: of the connector's weights.
    """

    language_model: str
    seed: int


def save_vlm(model: VisionLanguageModel, text: VlmText, folder: str | Path, start: Start | None = None) -> None:
    """Write a model into a folder, each file whole or not at all.

    Args:
        model: what to write; its dtype is kept.
        text: its tokenizer.
        folder: made if it is not there.
        state: weights by parameter name, where they are not (all) in `model` itself, as under ZeRO-3.
    """
    folder = Path(folder)
    text.tokenizer.save_pretrained(folder)
    tied = tied_names(model)
    tensors = {name: each.detach().cpu().contiguous() for name, each in model.state_dict().items() if name not in tied}
    part = folder / f".{WEIGHTS_FILE}.part"
    save_file(tensors, part, metadata={"format": "pt"})
    sync_files([part])
    os.replace(part, folder / WEIGHTS_FILE)
    record = {
        "format": FORMAT,
        "start": None if start is None else asdict(start),
        "model": model.config.model_dump(mode="json"),
    }
    write_atomic(folder / CONFIG_FILE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def load_vlm(folder: str | Path) -> tuple[VisionLanguageModel, VlmText]:
    """Read a model that `save_vlm` wrote, on the CPU, in evaluation mode.

    Raises:
        MissingInput: a file is not there.
        DamagedInput: a file cannot be read, or the weights do not fit the config.
    """
    folder = Path(folder)
    _, config = _read_config(folder)
    weights, state = folder / WEIGHTS_FILE, read_weights(folder)
    with no_init_weights():  # drawing 135M random numbers takes 4 s
        model = VisionLanguageModel(config)
    model.to(state[next(iter(state))].dtype)
    missing, unknown = model.load_state_dict(state, strict=False)
    problems = [f"{name} is missing" for name in missing if name not in tied_names(model)]
    problems += [f"{name} is not known" for name in unknown]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise DamagedInput(f"{weights}: the weights do not fit the config: {'; '.join(problems[:3])}{more}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DamagedInput(f"{folder}: the tokenizer cannot be read ({error})") from error
    return model.eval(), VlmText(tokenizer, config, model.tokens_per_tile)


def untrained_vlm(folder: str | Path) -> tuple[VisionLanguageModel, VlmText]:
    """The model in a folder as it was before training: its language model untuned, its connector at random.

    Raises:
        MissingInput: what it started from is not recorded, or not there any more.
    """
    folder = Path(folder)
    record, config = _read_config(folder)
    if not isinstance(record.get("start"), dict):
        raise MissingInput(f"{folder / CONFIG_FILE}: start is not set, so the untrained model is not known")
    start = Start(**record["start"])
    language = load_language_model(resolve(start.language_model))
    prepare_language_model(language, config)
    model = connected(config, language.model, start.seed)
    trained = read_weights(folder)
    prefix = "model.vision_tower."
    tower = {name.removeprefix(prefix): value for name, value in trained.items() if name.startswith(prefix)}
    model.model.vision_tower.load_state_dict(tower)
    return model.eval(), VlmText(language.tokenizer, config, model.tokens_per_tile)


def tied_names(model: VisionLanguageModel) -> set[str]:
    """Names of weights that are another weight under a second name, and so are not written."""
    embedding = model.model.language_model.get_input_embeddings().weight
    return {"lm_head.weight"} if model.lm_head.weight is embedding else set()


def _plain_config(config: PreTrainedConfig) -> dict[str, Any]:
    """A language model's config as JSON values, without what says where it came from."""
    tree: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in tree.items() if key not in ("_name_or_path", "transformers_version")}


def _read_config(folder: Path) -> tuple[dict[str, Any], VlmConfig]:
    file, record = read_record(folder, FORMAT, "vision-language model")
    return record, parse(VlmConfig, record["model"], source=file, prefix="model")
