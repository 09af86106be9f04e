"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) through peft, put into a model in place and taken out again.

Module names of our models are those of transformers, so an adapter trained on ours is saved once, in peft's own
format, and `peft.PeftModel.from_pretrained` puts it on the released model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from mmfoundry.pipeline.artifact import write_atomic
from mmfoundry.pipeline.config import Config
from mmfoundry.pipeline.errors import DamagedInput, MissingInput

ADAPTER = "default"  # peft's name for the only adapter of a model
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# peft writes adapters under the names that modules have inside its own wrapper.
_WRAPPER = "base_model.model."


class LoraSize(Config):
    """Size of the adapters."""

    rank: int = Field(16, ge=1, description="rank of each update")
    alpha: float = Field(32.0, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of an adapter's inputs set to zero in training")


class LoraSettings(LoraSize):
    """Size of the adapters, and where they go."""

    modules: list[str] = Field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1,
        description="names of the linear layers of a block that get one",
    )
    first_layer: int = Field(
        0, ge=0, description="blocks below get none; where nothing below is trained, no gradient is computed there"
    )


def add_lora(model: nn.Module, settings: LoraSettings, blocks: str, seed: int) -> LoraConfig:
    """Put adapters into a model's blocks; what is trainable afterwards is the adapters alone.

    Args:
        model: changed in place.
        settings: size and places.
        blocks: dotted name of the list of blocks, e.g. `model.language_model.layers`.
        seed: of the adapters' weights.

    Returns:
        The adapter's config in peft's terms.

    Raises:
        ValueError: no layer of the model is named so.
    """
    count = len(model.get_submodule(blocks))  # type: ignore[arg-type]  # a ModuleList has a length
    numbers = "|".join(str(number) for number in range(settings.first_layer, count))
    names = "|".join(settings.modules)
    pattern = rf"{blocks.replace('.', chr(92) + '.')}\.({numbers})\.(.+\.)?({names})"
    return inject_lora(model, settings, pattern, seed)


def inject_lora(model: nn.Module, size: LoraSize, pattern: str, seed: int) -> LoraConfig:
    """Put adapters of one size into the layers whose names fit a pattern; all else stops being trainable.

    Args:
        model: changed in place.
        size: of the adapters.
        pattern: regular expression over full module names.
        seed: of the adapters' first factors (the second start at zero); the caller's random state is left alone.

    Returns:
        The adapter's config in peft's terms.

    Raises:
        ValueError: no layer of the model is named so.
    """
    config = LoraConfig(
        r=size.rank,
        lora_alpha=size.alpha,  # type: ignore[arg-type]  # peft divides it by the rank; it need not be whole
        lora_dropout=size.dropout,
        target_modules=pattern,
        bias="none",
    )
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    return config


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """The adapted layers of a model, by dotted name."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def merge_lora(model: nn.Module) -> nn.Module:
    """Add the updates to the weights and take the adapters out: a plain model again, changed in place.

    Raises:
        ValueError: a merged weight is not finite.
    """
    for name, layer in list(lora_layers(model)):
        layer.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    return model


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' weights, named as in peft's files."""
    state = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    return {f"{_WRAPPER}{name}": value.detach().cpu().contiguous() for name, value in state.items()}


def save_lora(model: nn.Module, config: LoraConfig, folder: str | Path, base: str) -> None:
    """Write the adapters of a model in peft's format.

    Args:
        model: with adapters in it.
        config: as `add_lora` returned it.
        folder: made if it is not there.
        base: hub id or folder of the model that they go on, for those who load them without naming one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(str(folder))
    write_atomic(folder / ADAPTER_WEIGHTS, save(lora_state(model), metadata={"format": "pt"}))


def load_lora(model: nn.Module, folder: str | Path) -> LoraConfig:
    """Put saved adapters onto a model, in place; they are not trainable.

    Raises:
        MissingInput: there is no adapter in the folder.
        DamagedInput: its files cannot be read, or do not fit the model.
    """
    folder = Path(folder)
    if not (folder / ADAPTER_CONFIG).is_file() or not (folder / ADAPTER_WEIGHTS).is_file():
        raise MissingInput(f"{folder}: no adapter: it needs {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}")
    try:
        config = LoraConfig.from_pretrained(str(folder))
        state = load_file(folder / ADAPTER_WEIGHTS)
    except (SafetensorError, ValueError, TypeError) as error:
        raise DamagedInput(f"{folder}: the adapter cannot be read ({error})") from error
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    result: Any = set_peft_model_state_dict(
        model, {name.removeprefix(_WRAPPER): value for name, value in state.items()}, adapter_name=ADAPTER
    )
    absent = [name for name in result.missing_keys if ".lora_" in name]
    if absent or result.unexpected_keys:
        raise DamagedInput(f"{folder}: the adapter does not fit: {', '.join([*absent, *result.unexpected_keys][:3])}")
    model.requires_grad_(False)
    return config
