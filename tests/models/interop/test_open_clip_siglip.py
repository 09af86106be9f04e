"""models/interop/open_clip_siglip.py: the same logits as open_clip's CustomTextCLIP with a SigLIP tower, both ways."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import CustomTextCLIP
from timm.models import _registry
from timm.models.vision_transformer import VisionTransformer

from mmfoundry.models.clip import CLIP
from mmfoundry.models.interop.clip_folders import save_for_open_clip
from mmfoundry.models.interop.load import OPEN_CLIP_CONFIG, load_any_clip
from mmfoundry.models.interop.open_clip import (
    from_open_clip,
    from_open_clip_config,
    named_config,
    to_open_clip_config,
    to_open_clip_state,
)
from mmfoundry.models.lock import lock_image_tower, lock_text_tower
from mmfoundry.pipeline.errors import ConfigError, DamagedInput
from mmfoundry.stages.release_check import check_open_clip
from tests.data.test_caption_tokenizer import write_words
from tests.models.tiny import SIGLIP, pairs, tiny_siglip
from tests.models.tiny import tokens as captions

TINY = "vit_tiny_patch8_siglip_16"  # the sizes of `tiny_siglip`
MODEL_CFG: dict[str, Any] = {
    "embed_dim": 24,
    "init_logit_bias": -10.0,
    "vision_cfg": {
        "image_size": 16,
        "timm_model_name": TINY,
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    },
    "text_cfg": {key: value for key, value in SIGLIP["text_cfg"].items() if key != "act_kwargs"},
}


@pytest.fixture(autouse=True, scope="module")
def tiny_tower() -> Iterator[None]:
    """A tower of timm's that is small enough, made as timm makes SigLIP's."""

    def build(**options: Any) -> VisionTransformer:
        known = {
            key: value for key, value in options.items() if key in ("num_classes", "global_pool", "patch_drop_rate")
        }
        sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "mlp_ratio": 2.0}
        return VisionTransformer(**sizes, class_token=False, **known)

    _registry._model_entrypoints[TINY] = lambda pretrained=False, pretrained_cfg=None, **options: build(**options)
    _registry._module_to_models.setdefault("tests", set()).add(TINY)
    _registry._model_to_module[TINY] = "tests"
    yield
    del _registry._model_entrypoints[TINY], _registry._model_to_module[TINY], _registry._module_to_models["tests"]


def their_model(**text: Any) -> CustomTextCLIP:
    torch.manual_seed(0)
    model = CustomTextCLIP(**MODEL_CFG | {"text_cfg": MODEL_CFG["text_cfg"] | text})
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model.eval()


def our_logits(model: CLIP, batch: dict) -> torch.Tensor:
    with torch.no_grad():
        output = model(batch)
    return output.scale * output.image_bD @ output.text_bD.T + output.bias


def batch_of() -> dict[str, torch.Tensor]:
    return {"image": pairs(6)["image"], "text": captions([2, 9, 4, 7, 3, 5])}


NO_PROJECTION = {"proj_type": "none", "proj_bias": False, "width": 24}


@pytest.mark.parametrize("text", [{}, {"act_kwargs": {"approximate": "tanh"}}, NO_PROJECTION], ids=str)
def test_theirs_in_ours_and_back(text: dict[str, Any]) -> None:
    theirs = their_model(**text)
    model_cfg = {**MODEL_CFG, "custom_text": True, "text_cfg": {**MODEL_CFG["text_cfg"], **text}}
    ours, batch = from_open_clip(model_cfg, theirs.state_dict()), batch_of()
    with torch.no_grad():
        expected = theirs.get_logits(ours.pixels(batch["image"]), batch["text"])[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(our_logits(ours, batch), expected, atol=2e-5, rtol=0)
    again = to_open_clip_state(ours)
    assert again.keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, again[name]) for name, value in theirs.state_dict().items())
    written = to_open_clip_config(ours.config)
    assert written["model_cfg"]["vision_cfg"] == MODEL_CFG["vision_cfg"]
    assert written["preprocess_cfg"] == {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    rebuilt = CustomTextCLIP(**{key: value for key, value in written["model_cfg"].items() if key != "custom_text"})
    rebuilt.load_state_dict(again)
    with torch.no_grad():
        found = rebuilt.eval().get_logits(ours.pixels(batch["image"]), batch["text"])[0]
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "ViT-SO400M-14-SigLIP-384"])
def test_a_model_by_its_name_is_theirs(name: str) -> None:
    config, said = named_config(name), open_clip.get_model_config(name)
    assert config.preprocess_cfg.resize_mode == "squash"
    assert config.text_cfg.hf_tokenizer_name == said["text_cfg"]["hf_tokenizer_name"]
    assert config.text_cfg.tokenizer_kwargs is not None
    assert config.text_cfg.tokenizer_kwargs.clean == "canonicalize"
    said.pop("custom_text")
    with torch.device("meta"):
        ours, theirs = CLIP(config), CustomTextCLIP(**said)
    assert {key: value.shape for key, value in to_open_clip_state(ours).items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }
    written = to_open_clip_config(config)["model_cfg"]["vision_cfg"]
    assert written["timm_model_name"] == said["vision_cfg"]["timm_model_name"]


@pytest.mark.slow
def test_every_siglip_of_theirs_is_known() -> None:
    names = [name for name in open_clip.list_models() if "SigLIP" in name]
    assert len(names) >= 20
    for name in names:
        said = open_clip.get_model_config(name)
        said.pop("custom_text")
        config = named_config(name)
        with torch.device("meta"):
            ours, theirs = CLIP(config), CustomTextCLIP(**said)
        assert {key: value.shape for key, value in to_open_clip_state(ours).items()} == {
            key: value.shape for key, value in theirs.state_dict().items()
        }, name


@pytest.mark.parametrize("tower", ["image", "text"])
def test_locked_groups_end_with_the_head(tower: str) -> None:
    for unlocked in range(4):
        model, theirs = tiny_siglip(), their_model()
        if tower == "text":
            lock_text_tower(model, unlocked)
            theirs.lock_text_tower(unlocked)
        else:
            lock_image_tower(model, unlocked)
        flags = {name: torch.full_like(each, float(each.requires_grad)) for name, each in model.named_parameters()}
        marked = tiny_siglip()
        marked.load_state_dict(flags)
        ours = {name: bool(value.max()) for name, value in to_open_clip_state(marked).items() if "logit" not in name}
        if tower == "text":
            free = {name: each.requires_grad for name, each in theirs.named_parameters() if "logit" not in name}
            assert ours == free
        else:  # open_clip finds no groups in this release of timm; ours: the head, the last block with the norm, ...
            learns = {
                name.split(".")[2] + "." + name.split(".")[3] for name, on in ours.items() if on and "trunk" in name
            }
            expected = ["attn_pool", "blocks.2", "blocks.1"][:unlocked]
            assert {each if each.startswith("blocks") else each.split(".")[0] for each in learns} - {"norm"} == {
                *expected
            }
            assert any(name.startswith("norm") for name in learns) == (unlocked >= 2)


def test_a_folder_for_open_clip_says_the_same_there(tmp_path: Path) -> None:
    write_words(tmp_path / "words")
    text = MODEL_CFG["text_cfg"] | {
        "hf_tokenizer_name": str(tmp_path / "words"),
        "tokenizer_kwargs": {"clean": "canonicalize"},
    }
    ours = from_open_clip({**MODEL_CFG, "custom_text": True, "text_cfg": text}, their_model().state_dict())
    save_for_open_clip(ours, tmp_path / "released")
    assert check_open_clip(tmp_path / "released", ours) < 1e-4
    again = load_any_clip(tmp_path / "released")
    assert again.config.text_cfg.hf_tokenizer_name == str(tmp_path / "released")
    assert torch.equal(our_logits(again, batch_of()), our_logits(ours, batch_of()))


def test_what_is_refused(tmp_path: Path) -> None:
    vision = MODEL_CFG["vision_cfg"]
    tree = {**MODEL_CFG, "custom_text": True}
    for key, value in (("timm_pool", "avg"), ("timm_proj", "linear"), ("timm_drop", 0.1), ("image_size", 32)):
        with pytest.raises(ConfigError, match=rf"vision_cfg\.{key}"):
            from_open_clip_config({**tree, "vision_cfg": {**vision, key: value}})
    with pytest.raises(ConfigError, match="timm has no vit_huge_patch8_siglip_16"):
        from_open_clip_config({**tree, "vision_cfg": {**vision, "timm_model_name": "vit_huge_patch8_siglip_16"}})
    with pytest.raises(ConfigError, match="custom_text"):
        from_open_clip_config({**tree, "vision_cfg": {**vision, "timm_model_name": "convnext_base"}})
    with pytest.raises(ConfigError, match=r"no SigLIP tower .* clip_formats: \[transformers\]"):
        to_open_clip_config(tiny_siglip().config)  # its GELU is the approximate one
    state = their_model().state_dict()
    with pytest.raises(DamagedInput, match=r"visual\.trunk\.cls_token is not a weight"):
        from_open_clip(tree, {**state, "visual.trunk.cls_token": torch.zeros(1)})
    with pytest.raises(DamagedInput, match=r"blocks\.0\.ls1\.weight is not a weight"):
        from_open_clip(tree, {**state, "visual.trunk.blocks.0.ls1.weight": torch.zeros(1)})
    del state["visual.trunk.attn_pool.kv.bias"]
    with pytest.raises(DamagedInput, match=r"attn_pool\.kv\.bias is missing"):
        from_open_clip(tree, state)


def test_a_folder_of_theirs_is_read_with_its_own_tokenizer(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    text = MODEL_CFG["text_cfg"] | {"hf_tokenizer_name": "somebody/tokenizer"}
    record = {"model_cfg": {**MODEL_CFG, "custom_text": True, "text_cfg": text}}
    (tmp_path / OPEN_CLIP_CONFIG).write_text(json.dumps(record))
    tensors = {name: value.contiguous() for name, value in their_model().state_dict().items()}
    save_file(tensors, tmp_path / "open_clip_model.safetensors")
    found = load_any_clip(tmp_path).config.text_cfg
    assert found.hf_tokenizer_name == str(tmp_path)
    assert found.tokenizer_kwargs is not None
    assert found.tokenizer_kwargs.clean == "whitespace"
