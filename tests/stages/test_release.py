"""stages/release.py: what is released says the same elsewhere, with none of our code; and its cards tell the truth."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.numpy import load_file

from mmfoundry.data.decode import decode_image
from mmfoundry.data.text import tokenize
from mmfoundry.data.tiles import cut_tiles
from mmfoundry.data.transforms import EvalTransform
from mmfoundry.models.adapters.lora import load_lora
from mmfoundry.models.clip import CLIP
from mmfoundry.models.generate import answer
from mmfoundry.models.io import load_clip
from mmfoundry.models.vlm_io import load_vlm
from mmfoundry.pipeline import torchvision_ops
from mmfoundry.pipeline.artifact import Artifact
from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.distributed import Runtime
from mmfoundry.pipeline.stage import run_stage
from mmfoundry.stages.release import FOLDERS, STAGE, ReleaseConfig
from tests.models.tiny_vlm import logits_of, picture
from tests.stages.released import make_models, release_tree

CAPTIONS = ["a red apple", "a dog"]  # those of the cards
QUESTION = "What is in the picture?"
OUTSIDE = """
import importlib.util, os, re, runpy, sys

sys.modules["mmfoundry"] = None  # an import of it, or of anything in it, fails
ops, *folders = sys.argv[1:]
spec = importlib.util.spec_from_file_location("ops", ops)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.declare_missing_ops()
from safetensors.torch import save_file

for folder in folders:
    code = re.search("```python\\n(.*?)```", open(os.path.join(folder, "README.md")).read(), re.S)[1]
    with open(f"{folder}.py", "w") as file:
        file.write(code)
    found = runpy.run_path(f"{folder}.py")
    kept = {"logits": found["logits"]}
    if "ids" in found:
        kept |= {"asked": found["inputs"]["input_ids"], "written": found["ids"]}
    save_file({name: value.contiguous() for name, value in kept.items()}, f"{folder}.out")

from peft import AutoPeftModel

for folder in ("clip-lora", "vlm-lora"):
    print(folder, type(AutoPeftModel.from_pretrained(folder).base_model.model).__name__)
assert not [name for name, module in sys.modules.items() if name.startswith("mmfoundry") and module is not None]
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def released(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    config = parse(ReleaseConfig, release_tree(models))
    return run_stage(STAGE, config, tmp_path_factory.mktemp("run") / "release", Runtime())


@pytest.fixture(scope="module")
def outside(released: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders moved elsewhere, where each card's code was run by a Python that cannot import mmfoundry."""
    place = tmp_path_factory.mktemp("elsewhere") / "folders"
    shutil.copytree(released.path, place)
    Image.fromarray(picture(3, 50, 36)).save(place / "picture.png")
    command = [sys.executable, "-I", "-c", OUTSIDE, torchvision_ops.__file__, *FOLDERS]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (place / "printed").write_text(done.stdout)
    return place


def clip_logits(model: CLIP, png: bytes) -> np.ndarray:
    """Of a picture as bytes and captions as text, the way our evaluations go."""
    pixels = torch.from_numpy(EvalTransform(model.config.vision_cfg.image_size)(decode_image(png)))[None]
    tokens = torch.from_numpy(tokenize(CAPTIONS, model.config.text_cfg.context_length))
    with torch.no_grad():
        image, text = model.encode_image(model.pixels(pixels)), model.encode_text(tokens)
        return (model.scale() * image @ text.T).numpy()


@pytest.mark.parametrize("folder", ["clip-open_clip", "clip-transformers", "clip-lora"])
def test_clip_says_the_same_elsewhere(folder: str, models: Path, outside: Path) -> None:
    model = load_clip(models / "pretrain")
    png = (outside / "picture.png").read_bytes()
    plain = clip_logits(model, png)
    expected = plain
    if folder == "clip-lora":
        load_lora(model, models / "adapt" / "clip-lora")
        expected = clip_logits(model, png)
        assert abs(expected - plain).max() > 0.05  # the adapter does something
    assert abs(expected[0, 0] - expected[0, 1]) > 0.01
    np.testing.assert_allclose(load_file(outside / f"{folder}.out")["logits"], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("folder", ["vlm", "vlm-lora"])
def test_vlm_says_the_same_elsewhere(folder: str, models: Path, outside: Path) -> None:
    model, text = load_vlm(models / "instruct")
    if folder == "vlm-lora":
        load_lora(model, models / "adapt" / "vlm-lora")
    tiles = cut_tiles(decode_image((outside / "picture.png").read_bytes()), model.config.vision.image_size, 4, 4)
    before, after = text.prompt(QUESTION, len(tiles))
    with torch.no_grad():
        expected = logits_of(model, torch.tensor([before + after]), tiles)
    assert expected.abs().max() > 1
    found = load_file(outside / f"{folder}.out")
    assert found["asked"].tolist() == [before + after]
    np.testing.assert_allclose(found["logits"], expected.numpy(), atol=1e-4, rtol=0)
    written = found["written"][0, len(before + after) :].tolist()
    assert text.decode(written) == answer(model, text, [tiles], [QUESTION], [0], max_new_tokens=16)[0]


def test_adapters_know_their_base(outside: Path) -> None:
    printed = (outside / "printed").read_text().splitlines()[-2:]
    assert printed == ["clip-lora CLIPModel", "vlm-lora AyaVisionForConditionalGeneration"]


def test_the_artifact(released: Artifact) -> None:
    files = [file for file in released.path.rglob("*") if file.is_file() and file.parent.name in FOLDERS]
    assert released.manifest.metrics == {"folders": 5.0, "bytes": float(sum(file.stat().st_size for file in files))}
    assert {name.split("/")[0] for name in released.manifest.files if "/" in name} == set(FOLDERS)
    assert set(released.manifest.inputs) == {"clip", "vlm", "adapters", "eval"}
