"""Any CLIP as an encoder for scoring: ours, open_clip's or transformers', each run by the code that it comes from.

The scores are then those that its authors' own scripts give: their preprocessing, their tokenizer, their model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mmfoundry.data.transforms import EvalTransform
from mmfoundry.models.interop.load import OPEN_CLIP_CONFIG
from mmfoundry.models.io import CONFIG_FILE, FORMAT, load_clip
from mmfoundry.pipeline.errors import ConfigError, DamagedInput, MissingInput
from mmfoundry.pipeline.json_file import read_json
from mmfoundry.pipeline.torchvision_ops import declare_missing_ops
from mmfoundry.stages.captions import tokenizer_of

Precision = Literal["auto", "fp32", "bf16", "fp16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CHARACTERS_A_TOKEN = 32  # far above any language's; text behind context * this is not read
_LEAST_CHARACTERS = 2000


class TorchEncoder:
    """A CLIP on a device, as `data.scores.Encoder` wants it."""

    def __init__(
        self,
        *,
        prepare: Callable[[np.ndarray], np.ndarray],
        image: Callable[[Tensor], Tensor],
        text: Callable[[list[str]], Tensor],
        context_length: int,
        device: torch.device,
        precision: Precision,
    ):
        """Take the parts.

        Args:
            prepare: uint8 (height, width, 3) to what `image` takes one of.
            image: (b, ...) prepared pictures on the device, uint8 or float, to embeddings (b, D).
            text: captions to embeddings (b, D).
            context_length: tokens of a caption that the model reads.
            device: where it runs.
            precision: of matrix products; "auto" is bf16 on a GPU that has it, fp32 elsewhere.
        """
        self.prepare = prepare
        self._image, self._text, self._device = image, text, device
        self._dtype = dtype_of(precision, device)
        self.context_characters = max(_LEAST_CHARACTERS, _CHARACTERS_A_TOKEN * context_length)

    def embed_images(self, prepared: Sequence[np.ndarray]) -> np.ndarray:
        """Prepared pictures to float32 (n, D), L2-normalised."""
        batch = torch.from_numpy(np.stack(prepared))
        return self._run(lambda: self._image(batch.to(self._device)))

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Captions to float32 (n, D), L2-normalised."""
        return self._run(lambda: self._text(list(texts)))

    def _run(self, forward: Callable[[], Tensor]) -> np.ndarray:
        half = self._dtype != torch.float32
        with torch.inference_mode(), torch.autocast(self._device.type, self._dtype, enabled=half):
            embedded = forward()
        return F.normalize(embedded.float(), dim=-1).cpu().numpy()


def dtype_of(precision: Precision, device: torch.device) -> torch.dtype:
    """What a precision means on a device."""
    if precision != "auto":
        return _DTYPES[precision]
    # on a CPU bf16 gains only where it has instructions for it, and then other machines would get other scores
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def load_encoder(
    folder: Path | None, architecture: str | None, device: torch.device, precision: Precision
) -> TorchEncoder:
    """Load a CLIP.

    Args:
        folder: a model of ours, of open_clip or of transformers (CLIP, SigLIP), or, together with `architecture`, a
            weights file of open_clip.
        architecture: one of open_clip's names (`ViT-B-32`); without `folder` followed by the tag of weights that
            open_clip downloads (`ViT-B-32/laion2b_s34b_b79k`).
        device: where it runs.
        precision: see `TorchEncoder`.
    Raises:
        MissingInput: a file or a download is not to be had.
        DamagedInput: a folder that is none of these, or a file that cannot be read.
        ConfigError: an architecture that open_clip does not know.
    """
    if architecture is not None:
        return _open_clip(architecture, folder, device, precision)
    assert folder is not None
    if (folder / OPEN_CLIP_CONFIG).is_file():
        return _open_clip(f"local-dir:{folder}", None, device, precision)
    config = folder / CONFIG_FILE
    if not config.is_file():
        raise MissingInput(f"{folder}: no CLIP here: neither {CONFIG_FILE} nor {OPEN_CLIP_CONFIG}")
    ours = read_json(config).get("format") == FORMAT
    return _ours(folder, device, precision) if ours else _transformers(folder, device, precision)


def _ours(folder: Path, device: torch.device, precision: Precision) -> TorchEncoder:
    model = load_clip(folder).to(device)
    text = model.config.text_cfg
    tokenize = tokenizer_of(text)
    return TorchEncoder(
        prepare=EvalTransform(model.config.vision_cfg.image_size, model.config.preprocess_cfg.resize_mode),
        image=lambda images: model.encode_image(model.pixels(images)),
        text=lambda captions: model.encode_text(torch.from_numpy(tokenize(captions)).to(device)),
        context_length=text.context_length,
        device=device,
        precision=precision,
    )


def _open_clip(name: str, weights: Path | None, device: torch.device, precision: Precision) -> TorchEncoder:
    declare_missing_ops()
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    architecture, _, tag = (name, "", "") if name.startswith("local-dir:") else name.partition("/")
    if not name.startswith("local-dir:"):
        if architecture not in open_clip.list_models():
            raise ConfigError(f"open_clip: {architecture!r} is not an architecture of open_clip.list_models()")
        if bool(tag) == (weights is not None):
            raise ConfigError(f"open_clip: give {architecture}/TAG, or {architecture} with its weights file as `model`")
    pretrained = tag or (None if weights is None else str(weights))
    try:
        # weights_only is open_clip's default, said here so that it stays
        model = open_clip.create_model(architecture, pretrained, require_pretrained=True, weights_only=True)
    except (RuntimeError, ValueError, OSError, KeyError) as error:  # what its loaders raise on files and downloads
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0]
        way_out = "; a model on this machine is named by `model` in place of `open_clip`" if tag else ""
        raise MissingInput(f"{name}: open_clip cannot load it ({reason[:300]}){way_out}") from error
    model = model.to(device).eval().requires_grad_(False)
    transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    tokenizer = open_clip.get_tokenizer(architecture)
    return TorchEncoder(
        prepare=lambda pixels: transform(Image.fromarray(pixels)).numpy(),
        image=lambda images: model.encode_image(images),
        text=lambda captions: model.encode_text(tokenizer(captions).to(device)),
        context_length=int(getattr(tokenizer, "context_length", None) or 77),
        device=device,
        precision=precision,
    )


def _transformers(folder: Path, device: torch.device, precision: Precision) -> TorchEncoder:
    declare_missing_ops()
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    try:
        model = AutoModel.from_pretrained(folder, use_safetensors=True)
        processor = AutoImageProcessor.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:  # files that are not there, and those that it does not know
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MissingInput(f"{folder}: transformers cannot load model and processors ({reason})") from error
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise DamagedInput(f"{folder}: {type(model).__name__} does not embed pictures and texts in one space")
    model = model.to(device).eval().requires_grad_(False)
    length = int(model.config.text_config.max_position_embeddings)

    def prepare(pixels: np.ndarray) -> np.ndarray:
        made = processor(images=Image.fromarray(pixels), return_tensors="pt")
        if set(made) != {"pixel_values"}:
            raise ConfigError(f"{folder}: its image processor gives {', '.join(made)}; only squares are scored")
        values: np.ndarray = made["pixel_values"][0].numpy()
        return values

    def text(captions: list[str]) -> Tensor:
        # to the full length, as SigLIP was trained; CLIP masks what is behind the end
        tokens = tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return _features(model.get_text_features(**tokens.to(device)))

    return TorchEncoder(
        prepare=prepare,
        image=lambda images: _features(model.get_image_features(pixel_values=images)),
        text=text,
        context_length=length,
        device=device,
        precision=precision,
    )


def _features(output: Any) -> Tensor:
    """Embeddings, which versions of transformers give as they are or as one field of several."""
    return output if isinstance(output, Tensor) else output.pooler_output
