"""A SigLIP through the stages: trained on from transformers' folder, measured, released, loaded without our code."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from mmfoundry.data.shards import write_shards
from mmfoundry.models.io import load_clip
from mmfoundry.pipeline import torchvision_ops
from mmfoundry.pipeline.artifact import Artifact
from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.distributed import init_runtime
from mmfoundry.pipeline.errors import ConfigError, MissingInput
from mmfoundry.pipeline.stage import run_stage
from mmfoundry.stages.adapt_clip import PromptClassifier
from mmfoundry.stages.captions import tokenizer_of
from mmfoundry.stages.eval import STAGE as EVAL
from mmfoundry.stages.eval import EvalConfig
from mmfoundry.stages.evaluations import as_clip
from mmfoundry.stages.filter_encoders import load_encoder
from mmfoundry.stages.pretrain import STAGE as PRETRAIN
from mmfoundry.stages.pretrain import PretrainConfig
from mmfoundry.stages.release import CLIP_TRANSFORMERS, ReleaseConfig
from mmfoundry.stages.release import STAGE as RELEASE
from tests.data.drawn import write_pictures
from tests.models.tiny_vlm import picture
from tests.stages.clip_folders import siglip_folder

CAPTIONS = ["a picture for 3", "another line"]
OUTSIDE = """
import importlib.util, sys

sys.modules["mmfoundry"] = None  # an import of it fails
ops, folder, picture, out, *captions = sys.argv[1:]
spec = importlib.util.spec_from_file_location("ops", ops)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.declare_missing_ops()
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained(folder).eval()
processor = AutoProcessor.from_pretrained(folder, backend="pil")
options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
inputs = processor(images=Image.open(picture), text=captions, **options)
with torch.no_grad():
    logits = model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"]).logits_per_image
print(type(model).__name__)
save_file({"logits": logits.contiguous()}, out)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`google`, a SigLIP as transformers writes it, and `pool`, pictures with captions."""
    folder = tmp_path_factory.mktemp("siglip")
    siglip_folder(folder / "google")
    samples = [
        {"__key__": f"{number:03}", "png": _png(number, folder), "txt": f"picture for {number}"} for number in range(24)
    ]
    write_shards(samples, folder / "pool")
    return folder


def _png(number: int, folder: Path) -> bytes:
    Image.fromarray(picture(number, 40, 36)).save(folder / "drawn.png")
    return (folder / "drawn.png").read_bytes()


def tree(place: Path, **changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "data": [{"path": str(place / "pool")}],
        "initial": str(place / "google"),
        "objectives": {"siglip": 1.0},
        "trainer": {"train_batch_size": 8, "max_steps": 20, "optimizer": {"lr": 3e-3}, "logging_steps": 5},
    }
    return config | changes


@pytest.fixture(scope="module")
def trained(place: Path) -> Artifact:
    return run_stage(PRETRAIN, parse(PretrainConfig, tree(place)), place / "pretrain", init_runtime())


def losses(artifact: Artifact) -> list[float]:
    lines = (artifact.path / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def test_it_learns_and_keeps_its_tokenizer(place: Path, trained: Artifact) -> None:
    found = losses(trained)
    assert np.mean(found[-3:]) < np.mean(found[:3])
    model = load_clip(trained.path)
    assert model.config.text_cfg.hf_tokenizer_name == str(trained.path)
    ours, theirs = (tokenizer_of(load_text) for load_text in (model.config.text_cfg, load_google(place)))
    assert ours is not theirs
    np.testing.assert_array_equal(ours(CAPTIONS), theirs(CAPTIONS))
    assert ours.encode(CAPTIONS[1]).tolist() == [4, 5, 1, 0, 0, 0, 0, 0]  # padded: the tower reads that


def load_google(place: Path) -> Any:
    from mmfoundry.models.interop.load import load_any_clip

    return load_any_clip(place / "google").config.text_cfg


def test_going_on_is_exact_and_frozen_towers_stay(place: Path, tmp_path: Path) -> None:
    config = tree(place, lock_image=True, lock_image_unlocked_groups=1, force_patch_dropout=0.5)
    config["trainer"] = config["trainer"] | {"max_steps": 2}
    one = run_stage(PRETRAIN, parse(PretrainConfig, config), tmp_path / "one", init_runtime())
    other = run_stage(PRETRAIN, parse(PretrainConfig, config), tmp_path / "other", init_runtime())
    assert losses(one) == losses(other)
    before, after = (load_file(each / "model.safetensors") for each in (place / "google", one.path))
    changed = {name for name, value in after.items() if not np.array_equal(value.ravel(), before[name].ravel())}
    vision = {name for name in after if name.startswith("vision_model.")}
    assert changed & vision == {name for name in vision if ".head." in name}


def test_it_is_measured_and_released(place: Path, trained: Artifact, tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "data", count=4)
    task = {"task": "zero_shot", "pictures": {"data": "pictures"}, "label": "concept", "templates": "plain", "top": [1]}
    measure = {"clip": str(trained.path), "data": {"pictures": str(pictures)}, "tasks": {"names": task}}
    measured = run_stage(EVAL, parse(EvalConfig, measure), tmp_path / "eval", init_runtime())
    assert 0 <= measured.manifest.metrics["names"] <= 1
    card = {"license": "apache-2.0", "description": "Random.", "data": [], "command": "none"}
    config = {"name": "tiny", "clip": str(trained.path), "clip_formats": ["transformers"], "card": card}
    made = run_stage(RELEASE, parse(ReleaseConfig, config), tmp_path / "release", init_runtime())
    assert made.manifest.metrics["max_difference"] < 1e-4
    Image.fromarray(picture(3, 50, 36)).save(tmp_path / "picture.png")
    arguments = [torchvision_ops.__file__, str(made.path / CLIP_TRANSFORMERS), str(tmp_path / "picture.png")]
    done = subprocess.run(
        [sys.executable, "-I", "-c", OUTSIDE, *arguments, str(tmp_path / "out"), *CAPTIONS],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["SiglipModel"]
    model = load_clip(trained.path)
    clip = as_clip(model)
    assert clip.resize_mode == "squash"
    encoder = load_encoder(trained.path, None, torch.device("cpu"), "fp32")
    image = encoder.embed_images([encoder.prepare(picture(3, 50, 36))])
    text = clip.encode_text(CAPTIONS).detach().numpy()
    assert model.logit_bias is not None
    expected = model.scale().item() * image @ text.T + model.logit_bias.item()
    np.testing.assert_allclose(load_file(tmp_path / "out")["logits"], expected, atol=1e-4, rtol=0)
    np.testing.assert_allclose(encoder.embed_texts(CAPTIONS), text, atol=1e-6)


def test_prompts_are_not_cut(trained: Artifact) -> None:
    model = load_clip(trained.path)
    ids = torch.from_numpy(tokenizer_of(model.config.text_cfg)(CAPTIONS))
    assert model.text_model.trimmed(ids) is ids
    images = torch.from_numpy(np.stack([picture(1, 32, 32).transpose(2, 0, 1)]))
    assert PromptClassifier(model, ids[:, None])({"image": images}).shape == (1, 2)


def test_what_is_refused(place: Path, tmp_path: Path) -> None:
    for key, value in ("text_groups", 2), ("text_packing", True):
        config = parse(PretrainConfig, tree(place, **{key: value}))
        with pytest.raises(ConfigError, match=f"{key}: the model reads its captions' padding"):
            run_stage(PRETRAIN, config, tmp_path / key, init_runtime())
    siglip_folder(tmp_path / "wordless")
    (tmp_path / "wordless" / "tokenizer.json").unlink()
    config = parse(PretrainConfig, tree(place, initial=str(tmp_path / "wordless")))
    with pytest.raises(MissingInput, match=r"wordless: no tokenizer for captions: neither tokenizer\.json"):
        run_stage(PRETRAIN, config, tmp_path / "no-words", init_runtime())
