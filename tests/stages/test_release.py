"""stages/release.py: what is released says the same elsewhere, with none of our code; and its cards tell the truth."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

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
from mmfoundry.models.interop import clip_folders
from mmfoundry.models.interop.open_clip import to_open_clip_state
from mmfoundry.models.io import load_clip, save_clip
from mmfoundry.models.vlm_io import load_vlm
from mmfoundry.pipeline import torchvision_ops
from mmfoundry.pipeline.artifact import Artifact
from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.distributed import Runtime
from mmfoundry.pipeline.errors import ConfigError, MissingInput, MmfoundryError
from mmfoundry.pipeline.stage import run_stage
from mmfoundry.stages import release as stage
from mmfoundry.stages.release import FOLDERS, STAGE, ReleaseConfig
from tests.models.tiny import tiny_clip
from tests.models.tiny_vlm import logits_of, picture
from tests.stages.released import TEXT, made, make_models, release_tree

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
    metrics = dict(released.manifest.metrics)
    assert 0 < metrics.pop("max_difference") < 1e-4
    assert metrics == {"folders": 5.0, "bytes": float(sum(file.stat().st_size for file in files))}
    assert {name.split("/")[0] for name in released.manifest.files if "/" in name} == {*FOLDERS, "checks"}
    assert set(released.manifest.inputs) == {"clip", "vlm", "adapters", "eval"}


def test_a_card_tells_what_the_manifests_know(released: Artifact, models: Path) -> None:
    head, text = card(released.path / "clip-transformers")
    assert head == {
        "license": "apache-2.0",
        "language": ["en"],
        "library_name": "transformers",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["mmfoundry", "clip"],
    }
    made = Artifact.open(models / "pretrain").manifest
    row = json.loads((models / "eval" / "results.json").read_text())["rows"][0]
    span = f"{row['low']:.3f} - {row['high']:.3f}"
    assert f"| {row['metric']} | {row['value']:.3f} | {span} | 12 | 0.167 | 0.167 | {row['untrained']:.3f} |" in text
    for said in (
        "Random weights: good for nothing.",
        "- [Squares](https://example.org), CC-BY 4.0: drawn here",
        "mmfoundry run tiny.yaml",
        f"`mmfoundry pretrain pretrain.yaml output={models / 'pretrain'}`",
        f"mmfoundry {made.code_version} | `{made.digest[:12]}`",
        f"data: {models / 'data'}\n",
        "| vision tower | 3 layers of width 24, pictures of 16 pixels, patches of 8 |",
    ):
        assert said in text
    assert "- Parent, MIT" not in text
    assert "- Parent, MIT" in card(released.path / "vlm-lora")[1]
    assert f"`mmfoundry eval eval.yaml output={models / 'eval'}`" in text
    assert "Shares of 1, with 95%" in card(released.path / "clip-lora")[1]
    assert "Shares of 1 (losses in nats a token), with 95%" in card(released.path / "vlm-lora")[1]


def test_files_have_one_mode(released: Artifact) -> None:
    assert len({file.stat().st_mode for folder in FOLDERS for file in (released.path / folder).iterdir()}) == 1


def test_a_card_names_the_base(released: Artifact) -> None:
    assert card(released.path / "vlm")[0]["base_model"] == "owner/language-model"
    head, text = card(released.path / "clip-lora")
    assert (head["base_model"], head["base_model_relation"], head["library_name"]) == (
        "clip-transformers",
        "adapter",
        "peft",
    )
    assert "| clip_after | 0.500 | 0.400 - 0.600 | 7 | 0.100 | 0.200 | - |" in text
    assert "clip_gain +0.250 (+0.125 to +0.500)" in text
    assert "mmfoundry adapt adapt.yaml" in text
    assert "mmfoundry pretrain pretrain.yaml" in text  # its base is made first
    assert "| rank | 4 |" in text
    record = json.loads((released.path / "clip-lora" / "adapter_config.json").read_text())
    assert record["base_model_name_or_path"] == "clip-transformers"


def card(folder: Path) -> tuple[dict, str]:
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def release(models: Path, output: Path, **changes: Any) -> Artifact:
    return run_stage(STAGE, parse(ReleaseConfig, release_tree(models, **changes)), output, Runtime())


def test_a_cut_off_run_goes_on(models: Path, released: Artifact, tmp_path: Path, monkeypatch: Any) -> None:
    written: list[str] = []

    def dies(part: Any, *arguments: Any) -> None:
        if part.folder == "vlm":
            (tmp_path / "release.work" / "vlm.writing").mkdir()  # cut off in the middle of it
            raise KeyboardInterrupt
        written.append(part.folder)
        write(part, *arguments)

    write = stage._write
    monkeypatch.setattr(stage, "_write", dies)
    with pytest.raises(KeyboardInterrupt):
        release(models, tmp_path / "release")
    assert written == ["clip-open_clip", "clip-transformers"]
    kept = (tmp_path / "release.work" / "clip-open_clip" / "README.md").stat().st_mtime_ns
    monkeypatch.setattr(stage, "_write", write)
    found = release(models, tmp_path / "release")
    assert (found.path / "clip-open_clip" / "README.md").stat().st_mtime_ns == kept
    assert set(found.manifest.files) - {"messages.txt"} == set(released.manifest.files) - {"messages.txt"}
    assert found.manifest.metrics == pytest.approx(released.manifest.metrics)


def test_only_some(models: Path, tmp_path: Path) -> None:
    found = release(models, tmp_path / "clip", vlm=None, adapters=None, clip_formats=["open_clip"])
    assert found.manifest.metrics["folders"] == 1
    # adapters of a model in transformers' layout need not come with it
    base = tmp_path / "base"
    clip_folders.save_for_transformers(load_clip(models / "pretrain"), base)
    lora = made(
        "adapt",
        tmp_path / "adapt",
        lambda work: [shutil.copytree(models / "adapt", work, dirs_exist_ok=True), shutil.rmtree(work / "vlm-lora")],
        clip={"model": str(base)},
    )
    alone = release(models, tmp_path / "lora", clip=None, vlm=None, eval=None, adapters=str(lora))
    assert alone.manifest.metrics["folders"] == 1
    assert "max_difference" not in alone.manifest.metrics  # there was nothing to put it on
    head, text = card(alone.path / "clip-lora")
    assert head["base_model"] == str(base)
    assert f'AutoModel.from_pretrained("{base}")' in text
    assert "loaded again" not in text
    with pytest.raises(ConfigError, match=r"clip-lora goes on .*pretrain, which transformers cannot load"):
        release(models, tmp_path / "release", clip=None, vlm=None, eval=None)


def test_what_does_not_belong_together_is_refused(models: Path, tmp_path: Path) -> None:
    other = made("pretrain", tmp_path / "other", lambda work: save_clip(tiny_clip(1, text_cfg=TEXT), work))
    with pytest.raises(ConfigError, match=r"adapters: .*clip-lora goes on another clip"):
        release(models, tmp_path / "release", clip=str(other), eval=None)
    with pytest.raises(ConfigError, match=r"eval: .* measured another clip"):
        release(models, tmp_path / "release", clip=str(other), adapters=None)
    with pytest.raises(MissingInput, match=r"holds neither clip-lora/ nor vlm-lora/"):
        release(models, tmp_path / "release", adapters=str(models / "pretrain"))
    with pytest.raises(ConfigError, match="nothing to release"):
        parse(ReleaseConfig, {"name": "tiny", "card": {"license": "mit"}})
    with pytest.raises(ConfigError, match=r"card\.license"):
        parse(ReleaseConfig, release_tree(models, card={"license": "Apache 2.0"}))


def test_a_folder_that_says_something_else_is_not_released(models: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def spoilt(model: CLIP) -> dict[str, torch.Tensor]:
        state = to_open_clip_state(model)
        return state | {"visual.ln_post.bias": state["visual.ln_post.bias"] + 0.01}

    monkeypatch.setattr(clip_folders, "to_open_clip_state", spoilt)
    with pytest.raises(MmfoundryError, match=r"clip-open_clip, loaded again, gives logits that differ .* by 0\.\d+"):
        release(models, tmp_path / "release", vlm=None, adapters=None)
    assert not (tmp_path / "release").exists()
    found = release(models, tmp_path / "release", vlm=None, adapters=None, max_difference=None)
    assert "max_difference" not in found.manifest.metrics
