"""Loads a released folder the way its users will, and compares what it says with what our own model says.

Both compute in fp32 on the CPU, on a made-up picture and a few words. What is compared is logits; the ids that a
processor or tokenizer makes of the words must be the same.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmfoundry.data.tiles import cut_tiles
from mmfoundry.data.transforms import EvalTransform
from mmfoundry.models.adapters.lora import load_lora
from mmfoundry.models.clip import CLIP
from mmfoundry.models.interop.any_clip import AnyClip
from mmfoundry.models.vlm import VisionLanguageModel
from mmfoundry.models.vlm_text import VlmText
from mmfoundry.pipeline.errors import MmfoundryError
from mmfoundry.pipeline.torchvision_ops import declare_missing_ops
from mmfoundry.stages.captions import tokenizer_of

CAPTIONS = ("a photo of a dog", "3 red apples, on the left of a cup!")
QUESTION = "What is in the picture?"


def check_open_clip(folder: Path, clip: AnyClip) -> float:
    """The largest difference between the logits of open_clip's model in `folder` and ours.

    Raises:
        MmfoundryError: its tokenizer gives other ids.
    """
    declare_missing_ops()  # open_clip imports torchvision
    import open_clip

    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}", precision="fp32")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(list(CAPTIONS))
    _same_ids(folder, tokens, _tokens(clip))
    picture = _picture(clip.config.vision_cfg.image_size)
    with torch.no_grad():
        image = theirs.eval().encode_image(preprocess(picture)[None], normalize=True)
        found = theirs.logit_scale.exp() * image @ theirs.encode_text(tokens, normalize=True).T
        if theirs.logit_bias is not None:
            found += theirs.logit_bias
    return _difference(found, _clip_logits(clip, picture))


def check_clip_model(folder: Path, clip: CLIP, adapter: Path | None = None) -> float:
    """The largest difference between the logits of transformers' `CLIPModel` or `SiglipModel` in `folder` and ours.

    Args:
        folder: of the released model.
        clip: ours.
        adapter: folder of a released adapter; it is put on both.

    Raises:
        MmfoundryError: its tokenizer gives other ids.
    """
    declare_missing_ops()  # transformers imports torchvision
    from transformers import AutoModel, AutoProcessor

    theirs: Any = AutoModel.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    processor: Any = AutoProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    picture = _picture(clip.config.vision_cfg.image_size)
    inputs = processor(images=picture, text=list(CAPTIONS), padding="max_length", truncation=True, return_tensors="pt")
    ours = _tokens(clip)
    behind = torch.arange(ours.shape[1]) > ours.argmax(1, keepdim=True)  # padding differs, and is not looked at
    if clip.config.text_cfg.reads_padding:
        behind = torch.zeros_like(behind)
    _same_ids(folder, inputs["input_ids"].masked_fill(behind, 0), ours)
    with torch.no_grad():
        found = _adapted(theirs, adapter)(**inputs).logits_per_image
    return _difference(found, _clip_logits(clip, picture, adapter))


def check_vlm(folder: Path, model: VisionLanguageModel, text: VlmText, adapter: Path | None = None) -> float:
    """The largest difference between the logits of transformers' vision-language model in `folder` and ours.

    Args:
        folder: of the released model.
        model: ours; changed: it is widened to fp32 and gets the adapter.
        text: its text side.
        adapter: folder of a released adapter; it is put on both.

    Raises:
        MmfoundryError: its processor gives other ids.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    theirs: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    side, tiles = model.config.vision.image_size, model.config.tiles
    picture = _picture(side)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    cut = cut_tiles(np.array(picture), side, tiles.min_tiles, tiles.max_tiles)
    before, after = text.prompt(QUESTION, len(cut))
    ids = torch.tensor([before + after])
    _same_ids(folder, inputs["input_ids"], ids)
    model.float()
    if adapter is not None:
        load_lora(model, adapter)
    with torch.no_grad():
        found = _adapted(theirs, adapter)(**inputs).logits
        hidden = model.model.language_model(inputs_embeds=model.embed(ids, cut)).last_hidden_state
        return _difference(found, model.lm_head(hidden))


def _adapted(model: nn.Module, adapter: Path | None) -> nn.Module:
    if adapter is None:
        return model.eval()
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(adapter)).eval()  # type: ignore[arg-type]  # any module will do


def _clip_logits(clip: AnyClip, picture: Image.Image, adapter: Path | None = None) -> Tensor:
    ours = copy.deepcopy(clip).float().eval()
    if adapter is not None:
        load_lora(ours, adapter)
    prepare = EvalTransform(ours.config.vision_cfg.image_size, ours.config.preprocess_cfg.resize_mode)
    pixels = torch.from_numpy(prepare(np.asarray(picture)))[None]
    with torch.no_grad():
        output = ours({"image": pixels, "text": _tokens(clip)})
        return output.scale * output.image_bD @ output.text_bD.T + (0 if output.bias is None else output.bias)


def _tokens(clip: AnyClip) -> Tensor:
    return torch.from_numpy(tokenizer_of(clip.config.text_cfg)(CAPTIONS)).long()


def _picture(side: int) -> Image.Image:
    """Coloured noise, not square, twice as wide as a tower's picture; margins are even, so that all cut alike."""
    pixels = np.random.default_rng(0).integers(0, 256, (2 * side, 2 * side + 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _same_ids(folder: Path, found: Tensor, expected: Tensor) -> None:
    if found.tolist() != expected.tolist():
        raise MmfoundryError(
            f"{folder}: the released tokenizer gives other ids than training did: {found[0].tolist()[:24]}, not "
            f"{expected[0].tolist()[:24]}"
        )


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).abs().max())
