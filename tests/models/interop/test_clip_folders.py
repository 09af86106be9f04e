"""models/interop/clip_folders.py: the processor reads pictures and texts as open_clip and our evaluations do."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from transformers import CLIPProcessor

from mmfoundry.data.text import tokenize
from mmfoundry.data.transforms import EvalTransform, normalise
from mmfoundry.models.interop.clip_folders import (
    save_for_open_clip,
    save_for_transformers,
    to_clip_processor,
    to_clip_tokenizer,
)
from mmfoundry.models.interop.load import load_any_clip
from mmfoundry.pipeline.errors import ConfigError
from tests.models.tiny import pairs, tiny_clip, tiny_config

LENGTH = 16
TEXT = {"context_length": LENGTH, "vocab_size": 49_408, "width": 16, "heads": 2, "layers": 2}
CAPTIONS = [
    "a red apple",
    "The  Dog's café, 3 cats & 1,000 naïve\tthings",
    "🍎 an emoji, 東京, don't! we'll see ... (maybe)",
    "word " * 40,
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "",
]
SIZES = [(64, 64), (128, 128), (100, 60), (60, 300), (16, 20), (480, 640)]  # even margins: see `to_clip_processor`


def test_tokenizer_gives_open_clip_s_ids() -> None:
    tokenizer = to_clip_tokenizer(LENGTH)
    found = tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="np")["input_ids"]
    expected = tokenize(CAPTIONS, LENGTH)
    padding = np.arange(LENGTH) > expected.argmax(1)[:, None]
    np.testing.assert_array_equal(np.where(padding, 0, found), expected)
    assert (found[padding] == 49_407).all()  # the end's id, so that the first of them stays the first


@pytest.mark.parametrize("size", SIZES)
def test_pixels(size: tuple[int, int], tmp_path: Path) -> None:
    config = tiny_config(
        vision_cfg={"image_size": 32, "patch_size": 8, "width": 24, "layers": 1, "head_width": 8},
        text_cfg=TEXT,
        preprocess_cfg={"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)},
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    ours = normalise(torch.from_numpy(EvalTransform(32)(np.array(image)))[None], (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    theirs = image_transform(32, is_train=False, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))(image)[None]
    torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=0)
    to_clip_processor(config).save_pretrained(tmp_path)
    exact = CLIPProcessor.from_pretrained(tmp_path, backend="pil")
    torch.testing.assert_close(exact(images=image, return_tensors="pt")["pixel_values"], ours, atol=1e-6, rtol=0)
    # by default torchvision's filter: a few values in a hundred are one level of 255 off
    fast = CLIPProcessor.from_pretrained(tmp_path)(images=image, return_tensors="pt")["pixel_values"]
    off = (fast - ours).abs() * 255 * 0.4
    assert off.max() < 2.1
    assert (off > 0.1).float().mean() < 0.05


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    model, batch = tiny_clip(text_cfg=TEXT, quick_gelu=True), pairs(4)
    batch["text"] = torch.from_numpy(tokenize(CAPTIONS[:4], LENGTH))
    save_for_open_clip(model, tmp_path / "open_clip")
    save_for_transformers(model, tmp_path / "transformers")
    for folder in ("open_clip", "transformers"):
        found = load_any_clip(tmp_path / folder)
        assert found.config == model.config
        torch.testing.assert_close(found(batch).image_bD, model(batch).image_bD)
        torch.testing.assert_close(found(batch).text_bD, model(batch).text_bD)
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'open_clip'}")
    assert theirs.visual.preprocess_cfg["interpolation"] == "bicubic"


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vocab_size is 50: only models with CLIP's own tokenizer"):
        save_for_open_clip(tiny_clip(), tmp_path)
    with pytest.raises(ConfigError, match="no logit bias"):
        save_for_transformers(tiny_clip(text_cfg=TEXT, init_logit_bias=-10.0), tmp_path)
