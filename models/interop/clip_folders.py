"""Our CLIPs as folders that open_clip and transformers load with none of our code: weights, config, preprocessing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from mmfoundry.models.clip import CLIP, ClipConfig
from mmfoundry.models.interop.any_clip import AnyClip, AnyClipConfig, save_any_clip
from mmfoundry.models.interop.load import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS
from mmfoundry.models.interop.open_clip import to_open_clip_config, to_open_clip_state
from mmfoundry.models.interop.transformers_clip import to_transformers_config, to_transformers_state
from mmfoundry.models.interop.transformers_siglip import is_siglip, to_siglip_config, to_siglip_state
from mmfoundry.models.io import HERE, TOKENIZER_FILES, copy_tokenizer
from mmfoundry.models.open_clip_model import OpenClip
from mmfoundry.pipeline.artifact import write_atomic
from mmfoundry.pipeline.errors import ConfigError
from mmfoundry.pipeline.torchvision_ops import declare_missing_ops

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer, SiglipModel

VOCABULARY = 49_408  # ids of CLIP's byte-pair encoding
START, END = "<|startoftext|>", "<|endoftext|>"  # as transformers writes the last two of them


def save_for_open_clip(model: AnyClip, folder: str | Path) -> None:
    """Write a folder for open_clip's `local-dir:` and `hf-hub:`. CLIP's tokenizer is part of open_clip itself.

    Args:
        model: what to write; its dtype is kept.
        folder: made if it is not there.

    Raises:
        ConfigError: the vocabulary is not CLIP's, so open_clip would give the model other ids; or open_clip has no such
            towers; or pictures are resized in another way than ours.
        MissingInput: the model's own tokenizer is not to be had.
    """
    name = model.config.text_cfg.hf_tokenizer_name
    if name is None:
        check_vocabulary(model.config)
    if isinstance(model, OpenClip):
        model.config.check_resizing()
        save_any_clip(model, folder)
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if name is not None:
        copy_tokenizer(name, folder)
    record = to_open_clip_config(model.config)
    if name is not None:
        record["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = HERE  # open_clip looks beside the config
    record["preprocess_cfg"] |= {"interpolation": "bicubic"}
    tensors = {name: value.cpu().contiguous() for name, value in to_open_clip_state(model).items()}
    save_file(tensors, folder / OPEN_CLIP_WEIGHTS, metadata={"format": "pt"})
    write_atomic(folder / OPEN_CLIP_CONFIG, json.dumps(record, indent=2) + "\n")


def save_for_transformers(model: CLIP, folder: str | Path) -> None:
    """Write a folder that `CLIPModel` and `CLIPProcessor`, or SigLIP's (and the `Auto` classes), load.

    Args:
        model: what to write; its dtype is kept.
        folder: made if it is not there.

    Raises:
        ConfigError: the vocabulary is not CLIP's, or the model has a logit bias, which `CLIPModel` cannot hold; a
            SigLIP without a tokenizer; towers that are neither's.
        MissingInput: a SigLIP's tokenizer is not to be had.
    """
    if is_siglip(model.config):
        _save_siglip(model, Path(folder))
        return
    check_vocabulary(model.config)
    to_clip_model(model).save_pretrained(folder)
    to_clip_processor(model.config).save_pretrained(folder)


def _save_siglip(model: CLIP, folder: Path) -> None:
    """What `SiglipModel` and `SiglipProcessor` load: the tokenizer's files as they came."""
    name = model.config.text_cfg.hf_tokenizer_name
    if name is None:
        raise ConfigError(
            "text_cfg.hf_tokenizer_name is not set: a SigLIP is released with the tokenizer it learnt from"
        )
    to_siglip_model(model).save_pretrained(folder)
    copy_tokenizer(name, folder)
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise ConfigError(f"text_cfg.hf_tokenizer_name: {name} has no tokenizer's files")
    _set(folder / "tokenizer_config.json", model_max_length=model.config.text_cfg.context_length)
    declare_missing_ops()  # the image processor imports torchvision
    from transformers import SiglipImageProcessor

    side, preprocess = model.config.vision_cfg.image_size, model.config.preprocess_cfg
    images: dict[str, Any] = {"resample": 3, "image_mean": list(preprocess.mean), "image_std": list(preprocess.std)}
    SiglipImageProcessor(size={"height": side, "width": side}, **images).save_pretrained(folder)
    _set(folder / "preprocessor_config.json", processor_class="SiglipProcessor")


def _set(file: Path, **keys: Any) -> None:
    """Set keys of a JSON file, if it is there."""
    if file.is_file():
        record = json.loads(file.read_text(encoding="utf-8")) | keys
        write_atomic(file, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def to_siglip_model(model: CLIP) -> SiglipModel:
    """The same model as transformers' class, which shares no weights with it; in evaluation mode.

    Raises:
        ConfigError: its towers are not SigLIP's.
    """
    declare_missing_ops()  # transformers imports torchvision
    from transformers import SiglipConfig, SiglipModel

    return _filled(SiglipModel, SiglipConfig(**to_siglip_config(model.config)), to_siglip_state(model))


def to_clip_model(model: CLIP) -> CLIPModel:
    """The same model as transformers' class, which shares no weights with it; in evaluation mode.

    Raises:
        ConfigError: it has a logit bias, which `CLIPModel` cannot hold.
    """
    from transformers import CLIPConfig, CLIPModel

    return _filled(CLIPModel, CLIPConfig(**to_transformers_config(model.config)), to_transformers_state(model))


def _filled(kind: Any, config: Any, state: Mapping[str, Tensor]) -> Any:
    """A model of a class of transformers that holds copies of these weights, in their dtype; in evaluation mode."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        theirs = kind(config)
    theirs.to(state["logit_scale"].dtype)
    theirs.load_state_dict(state)
    return theirs.eval()


def to_clip_processor(config: ClipConfig) -> CLIPProcessor:
    """Pictures and texts to what the released `CLIPModel` reads.

    With `backend="pil"` its pixels are those of open_clip and of our evaluations, but for one column or row where the
    margin that is cut off is odd; by default, torchvision's bicubic filter rounds about one value in 300 differently.
    """
    declare_missing_ops()  # the image processor imports torchvision
    from transformers import CLIPImageProcessor, CLIPProcessor

    side = config.vision_cfg.image_size
    square = {"height": side, "width": side}
    squash = config.preprocess_cfg.resize_mode == "squash"
    images = CLIPImageProcessor(
        size=square if squash else {"shortest_edge": side},
        crop_size=square,
        do_center_crop=not squash,
        image_mean=list(config.preprocess_cfg.mean),
        image_std=list(config.preprocess_cfg.std),
    )
    return CLIPProcessor(images, to_clip_tokenizer(config.text_cfg.context_length))


def to_clip_tokenizer(context_length: int) -> CLIPTokenizer:
    """CLIP's byte-pair encoding as transformers' tokenizer, from the vocabulary that open_clip carries.

    The same ids as open_clip's for text that needs no mending: it does not repair broken encodings, curly quotes or
    HTML entities, as open_clip does (with ftfy).
    """
    declare_missing_ops()  # open_clip imports torchvision
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    source: Any = SimpleTokenizer()
    names = {source.sot_token_id: START, source.eot_token_id: END}
    vocabulary = {names.get(number, piece): number for piece, number in source.encoder.items()}
    merges: Any = list(source.bpe_ranks)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=context_length)


def check_vocabulary(config: AnyClipConfig) -> None:
    """Refuse a model whose captions are not split by CLIP's byte-pair encoding.

    Raises:
        ConfigError: it has another number of ids.
    """
    if config.text_cfg.vocab_size != VOCABULARY:
        raise ConfigError(
            f"text_cfg.vocab_size is {config.text_cfg.vocab_size}: only models with CLIP's own tokenizer "
            f"({VOCABULARY} ids) can be released"
        )
