"""Released vision-language models: the same pixels, ids, logits and answers, in a process without our code."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from mmfoundry.data.tiles import cut_tiles
from mmfoundry.models.adapters.lora import LoraSettings, add_lora, save_lora
from mmfoundry.models.generate import answer
from mmfoundry.models.interop.transformers_vlm import save_for_transformers, to_processor
from mmfoundry.pipeline.errors import ConfigError
from tests.models.tiny import tiny_siglip
from tests.models.tiny_vlm import logits_of, picture, tiny_vlm

QUESTION = "How many pictures are there?"
OUTSIDE = """
import sys
sys.modules["mmfoundry"] = None  # an import of it fails
import torch
for name in ("nms(Tensor dets, Tensor scores, float t)", "qnms(Tensor dets, Tensor scores, float t)"):
    try:  # a CPU build of torch beside another torchvision
        torch.library.define(f"torchvision::{name.split('(')[0]}", name[name.index("("):] + " -> Tensor")
    except RuntimeError:
        pass
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, adapter, picture, question, out = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder).eval()
if adapter:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, adapter).eval()
processor = AutoProcessor.from_pretrained(folder)
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(images=[Image.open(picture)], text=[prompt], return_tensors="pt", add_special_tokens=False)
with torch.no_grad():
    logits = model(**inputs).logits
    written = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1]:]
print(type(model).__name__, "|", processor.tokenizer.decode(written, skip_special_tokens=True).strip())
save_file({"logits": logits.contiguous(), "ids": inputs["input_ids"], "pixels": inputs["pixel_values"]}, out)
"""


def run_outside(tmp_path: Path, folder: Path, image: np.ndarray, adapter: Path | None = None) -> tuple[str, dict]:
    Image.fromarray(image).save(tmp_path / "picture.png")
    arguments = [str(folder), str(adapter or ""), str(tmp_path / "picture.png"), QUESTION, str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", OUTSIDE, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().split("\n")[-1], load_file(tmp_path / "out")


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize(
    ("connector", "kind"),
    [("pixel_shuffle", "AyaVisionForConditionalGeneration"), ("mlp", "LlavaForConditionalGeneration")],
)
def test_same_outside(tmp_path: Path, connector: str, kind: str, tower: str) -> None:
    model, text = tiny_vlm(connector, clip=tiny_siglip() if tower == "siglip" else None)
    save_for_transformers(model, text, tmp_path / "released")
    image = picture(3, 40, 36)
    shown, found = run_outside(tmp_path, tmp_path / "released", image)
    tiles = cut_tiles(image, 16, model.config.tiles.min_tiles, model.config.tiles.max_tiles)
    before, after = text.prompt(QUESTION, len(tiles))
    assert found["ids"].tolist() == [before + after]
    with torch.no_grad():
        expected = logits_of(model, torch.tensor([before + after]), tiles)
    assert expected.abs().max() > 1
    np.testing.assert_allclose(found["logits"], expected.numpy(), atol=1e-4, rtol=0)
    assert shown == f"{kind} | {answer(model, text, [tiles], [QUESTION], [0])[0]}"


def test_adapter_on_the_released_model(tmp_path: Path) -> None:
    model, text = tiny_vlm()
    save_for_transformers(model, text, tmp_path / "released")
    config = add_lora(model, LoraSettings(rank=4, modules=["q_proj", "down_proj"]), "model.language_model.layers", 0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    save_lora(model, config, tmp_path / "adapter", str(tmp_path / "released"))
    image = picture(4)
    _, found = run_outside(tmp_path, tmp_path / "released", image, tmp_path / "adapter")
    tiles = cut_tiles(image, 16, 4, 4)
    before, after = text.prompt(QUESTION, len(tiles))
    with torch.no_grad():
        expected = logits_of(model, torch.tensor([before + after]), tiles)
    np.testing.assert_allclose(found["logits"], expected.numpy(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(128, 128), (64, 64), (100, 61), (61, 300), (17, 23), (640, 480)])
@pytest.mark.parametrize(
    ("connector", "low", "high"),
    [("pixel_shuffle", 4, 4), ("pixel_shuffle", 1, 6), ("pixel_shuffle", 1, 1), ("mlp", 1, 1)],
)
def test_pixels_of_the_processor(size: tuple[int, int], connector: str, low: int, high: int) -> None:
    model, text = tiny_vlm(connector, tiles={"min_tiles": low, "max_tiles": high}, image={"whole_tag": ""})
    image = picture(5, *size)
    found = to_processor(model, text).image_processor([Image.fromarray(image)], return_tensors="pt")
    expected = model.config.preprocess
    tiles = cut_tiles(image, 16, low, high)
    mean, std = (torch.tensor(each)[:, None, None] for each in (expected.mean, expected.std))
    assert torch.equal(found["pixel_values"].mul(std).add(mean).mul(255).round().to(torch.uint8), tiles)


def test_what_transformers_cannot_say() -> None:
    model, text = tiny_vlm("mlp", image={"whole_tag": "whole:"})
    with pytest.raises(ConfigError, match=r"image\.whole_tag"):
        to_processor(model, text)
    model, text = tiny_vlm("mlp", tiles={"min_tiles": 4, "max_tiles": 4})
    with pytest.raises(ConfigError, match="has no tiles"):
        save_for_transformers(model, text, "unused")
