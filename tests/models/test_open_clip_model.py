"""models/open_clip_model.py, interop/any_clip.py: open_clip's modules say the same behind our interface."""

import json
import math
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.loss import CoCaLoss
from torch import Tensor

from mmfoundry.models.clip import CLIP, ClipConfig
from mmfoundry.models.flops import open_clip_work
from mmfoundry.models.interop.any_clip import (
    OPEN_CLIP_CONFIG,
    before_training,
    config_of,
    config_of_name,
    read_clip,
    save_any_clip,
)
from mmfoundry.models.interop.load import load_any_clip
from mmfoundry.models.interop.open_clip import to_open_clip_config
from mmfoundry.models.objectives import WEIGHTS, objective_with, weighted_sum, weights_of
from mmfoundry.models.open_clip_model import CaptionedOutput, OpenClip, OpenClipConfig, OpenClipPreprocess
from mmfoundry.models.param_groups import TowerRate, TowerRates, clip_param_groups
from mmfoundry.models.teachers import Taught
from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.errors import ConfigError, DamagedInput
from tests.models.tiny import pairs, tiny_config, tokens
from tests.models.tiny_open_clip import CONTEXT, KINDS, config, model_cfg


def model(kind: str, seed: int = 0, **changes: Any) -> OpenClip:
    """Weights with nothing at its neutral value."""
    made = OpenClip.from_seed(config(kind, **changes), seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in made.parameters():
            if weight.ndim == 1:
                weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return made


def batch(made: OpenClip, rows: int = 4) -> dict[str, Tensor]:
    side = made.config.vision_cfg.image_size
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (rows, 3, side, side), generator=generator, dtype=torch.uint8)
    return {"image": images, "text": tokens([3, 6, 2, 5][:rows])}


def trimmed(whole: dict[str, Tensor]) -> dict[str, Tensor]:
    return whole | {"text": whole["text"][:, :6]}  # as the loader pads: to the longest caption


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_theirs_however_captions_are_padded(kind: str) -> None:
    made = model(kind)
    whole, theirs = batch(made), made.open_clip
    with torch.no_grad():
        image = theirs.encode_image(made.pixels(whole["image"]), normalize=True)
        text = theirs.encode_text(whole["text"], normalize=True)
        for given in (whole, trimmed(whole)):
            output = made(given)
            torch.testing.assert_close(output.image_bD, image)
            torch.testing.assert_close(output.text_bD, text)
        torch.testing.assert_close(output.scale, theirs.logit_scale.exp())
        assert (output.bias is None) == (theirs.logit_bias is None)
    assert text.std(0).mean() > 1e-3  # captions differ
    assert made.trims == (kind in ("resnet", "convnext"))


@pytest.mark.parametrize("groups", [2, 4, 9])
@pytest.mark.parametrize("kind", ["resnet", "convnext"])
def test_groups_give_the_same_features_and_gradients_in_order(kind: str, groups: int) -> None:
    made = model(kind).double()
    if kind == "convnext":  # as configs that name the end of text
        made.open_clip.text.pool_type, made.open_clip.text.eos_id = "eos", int(batch(made)["text"].max())
    lengths, found = [], []
    for made.groups in (1, groups):
        reads = made._text.transformer.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[:2]))
        output = made(batch(made)).text_bD
        found.append((output, *torch.autograd.grad((output**3).sum(), list(made.parameters()), allow_unused=True)))
        reads.remove()
    torch.testing.assert_close(found[0], found[1], rtol=1e-7, atol=1e-7)  # fp64
    assert lengths[0] == (4, CONTEXT)
    assert len(lengths) == 1 + min(groups, 4)
    assert sum(rows for rows, _ in lengths[1:]) == 4
    assert {(1, 2), (1, 3), (1, 5), (1, 6)} == {*lengths[1:]} or groups == 2
    work = {}
    made.float()
    for made.groups in (1, groups):
        work[made.groups] = open_clip_work(made)(batch(made))
    assert work[groups].tokens < work[1].tokens
    assert work[groups].flops < work[1].flops


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_loads_in_open_clip_and_here(kind: str, tmp_path: Path) -> None:
    made = model(kind, max_logit_scale=5.0)  # below where it starts
    save_any_clip(made, tmp_path, seed=3)
    theirs = open_clip.create_model(f"local-dir:{tmp_path}", require_pretrained=True).eval()
    ours, whole = read_clip(tmp_path), batch(made)
    assert isinstance(ours, OpenClip)
    assert ours.config == made.config
    with torch.no_grad():
        output = made(whole)
        torch.testing.assert_close(theirs.encode_image(made.pixels(whole["image"]), normalize=True), output.image_bD)
        torch.testing.assert_close(theirs.encode_text(whole["text"], normalize=True), output.text_bD)
        torch.testing.assert_close(theirs.logit_scale.exp(), torch.tensor(5.0))
        torch.testing.assert_close(ours(whole), output)
    start, fresh = before_training(ours, tmp_path, 0).state_dict(), OpenClip.from_seed(made.config, 3).state_dict()
    assert all(torch.equal(value, start[name]) for name, value in fresh.items())
    with pytest.raises(ConfigError, match="only a plain ViT CLIP or a SigLIP can be used here"):
        load_any_clip(tmp_path)
    tree = json.loads((tmp_path / OPEN_CLIP_CONFIG).read_text())
    tree["model_cfg"]["text_cfg"]["width"] = 8
    (tmp_path / OPEN_CLIP_CONFIG).write_text(json.dumps(tree))
    with pytest.raises(DamagedInput, match="the weights do not fit the config"):
        read_clip(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_as_memory_had_it(kind: str) -> None:
    torch.use_deterministic_algorithms(True)  # fills what nobody initialised with not-a-number
    try:
        state = OpenClip.from_seed(config(kind), 0).state_dict()
    finally:
        torch.use_deterministic_algorithms(False)
    again = OpenClip.from_seed(config(kind), 0).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in state.items())
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize("padded", [True, False])
def test_coca_is_open_clips(padded: bool) -> None:
    made = model("coca")
    made.captions = True
    whole = batch(made)
    output = made(whole if padded else trimmed(whole))
    assert isinstance(output, CaptionedOutput)
    values = objective_with("coca", {"clip_loss_weight": 0.5, "caption_loss_weight": 3.0})(output, whole)
    said = made.open_clip(made.pixels(whole["image"]), whole["text"])
    clip, caption = CoCaLoss(caption_loss_weight=3.0, clip_loss_weight=0.5)(
        said["image_features"], said["text_features"], said["logits"], said["labels"], said["logit_scale"]
    )
    torch.testing.assert_close(values["loss"], clip + caption)
    torch.testing.assert_close(values["caption_loss"] * 3, caption.detach())
    torch.testing.assert_close(values["contrastive_loss"] / 2, clip.detach())
    weights, losses = list(made.parameters()), (values["loss"], clip + caption)
    ours, theirs = (torch.autograd.grad(loss, weights, materialize_grads=True) for loss in losses)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    right = (said["logits"].argmax(-1) == said["labels"]) & (said["labels"] != 0)
    torch.testing.assert_close(values["token_accuracy"], right.sum() / (said["labels"] != 0).sum())


def test_a_coca_says_captions_only_where_it_is_asked() -> None:
    made = model("coca")
    with pytest.raises(ValueError, match="captioning needs a model that writes captions"):
        objective_with("coca", {})(made(batch(made)), {})
    with pytest.raises(ConfigError, match="contrastive cannot have the captioning part again"):
        objective_with("coca", {"contrastive": {"captioning": 1.0}})
    siglip = objective_with("coca", {"contrastive": {"siglip": 1.0}})
    assert siglip.needs == {"captions", "bias"}  # type: ignore[attr-defined]


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
def test_embeddings_and_loss_are_in_full_precision_under_autocast(precision: torch.dtype) -> None:
    for kind in KINDS:
        made = model(kind)
        made.captions = kind == "coca"
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            output = made(trimmed(batch(made)))
        assert {part.dtype for part in output if part is not None and part.is_floating_point()} == {torch.float32}


def test_what_is_summed_taught_or_cut_to_widths_weighs_captions_all_the_same() -> None:
    given = {"text": tokens([3, 6, 2, 5])}
    counted = {"captioning": 2.0 + 5 + 1 + 4}  # the first token is not foreseen
    alone = objective_with("coca", {})
    summed = weighted_sum({"coca": 1.0, "siglip": 0.5})
    inside = objective_with("matryoshka", {"over": {"coca": 1.0}})
    for each in (alone, summed, inside, Taught(summed, {}), weighted_sum({"captioning": 1.0})):
        assert weights_of(each, given) == counted
    assert weights_of(objective_with("siglip", {}), given) == {}
    output = CaptionedOutput(*(torch.ones(4, 2) for _ in "it"), torch.tensor(1.0), None, *(torch.ones(4, 3),) * 3)
    half = objective_with("captioning", {})(output, {WEIGHTS: {"captioning": torch.tensor(0.5)}})
    assert half["loss"] == half["token_accuracy"] == 0.5


def test_scale_is_held() -> None:
    made = model("resnet", max_logit_scale=10.0)
    assert float(made.scale().detach()) == pytest.approx(10.0)
    made.config = made.config.model_copy(update={"max_logit_scale": None})
    assert float(made.scale().detach()) == pytest.approx(math.exp(float(made.logit_scale.detach())))


def test_blocks_and_what_is_not_decayed() -> None:
    coca, resnet, convnext = (model(kind) for kind in ("coca", "resnet", "convnext"))
    assert len(coca.repeated_blocks()) == 2 + 2 + 2 * 2  # picture, text, decoder with its cross-attention
    assert len(resnet.repeated_blocks()) == 2  # its picture tower has batch norms
    assert len(convnext.repeated_blocks()) == 2 + 2 + 2 + 6 + 2
    spared = coca.no_weight_decay()
    for name in ("visual.positional_embedding", "text.positional_embedding", "text.cls_emb", "logit_scale"):
        assert f"open_clip.{name}" in spared
    assert "open_clip.text_decoder.text_projection" not in spared
    rates = TowerRates(image=TowerRate(lr_scale=0.5), text=TowerRate(lr_scale=2.0))
    groups = clip_param_groups(coca, 0.1, rates)
    assert sum(len(group["params"]) for group in groups) == len(list(coca.parameters()))
    by_part = {group["part"]: group["lr_scale"] for group in groups}
    assert by_part == {"image": 0.5, "text": 2.0, "joint": 1.0}


def test_a_file_of_open_clips_keys_stands_for_a_model(tmp_path: Path) -> None:
    record = to_open_clip_config(tiny_config())
    for name, tree in (("folder.json", record), ("plain.json", record["model_cfg"])):
        (tmp_path / name).write_text(json.dumps(tree))
        assert config_of_name(str(tmp_path / name)) == config_of(record["model_cfg"], record["preprocess_cfg"])
        plain = parse(OpenClipConfig, {"open_clip": str(tmp_path / name)})
        assert plain.open_clip == record["model_cfg"]
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "broken.json").write_text("{")
    for name, says in [("list", "not a JSON object"), ("broken", "not JSON"), ("none", "no such file")]:
        with pytest.raises(ConfigError, match=rf"{name}\.json: .*{says}"):
            config_of_name(str(tmp_path / f"{name}.json"))
        with pytest.raises(ConfigError, match=rf"open_clip: .*{name}\.json: .*{says}"):
            parse(OpenClipConfig, {"open_clip": str(tmp_path / f"{name}.json")})


def test_names_and_folders_are_ours_where_they_can_be(tmp_path: Path) -> None:
    for name in ("ViT-B-32", "ViT-B-16-SigLIP-384"):
        assert isinstance(config_of_name(name), ClipConfig)
    assert isinstance(config_of(to_open_clip_config(tiny_config())["model_cfg"]), ClipConfig)
    for name, side in (("RN50x4", 288), ("convnext_base_w", 256), ("coca_ViT-B-32", 224)):
        found = config_of_name(name)
        assert isinstance(found, OpenClipConfig)
        assert found.vision_cfg.image_size == side
    plain = OpenClip.from_seed(parse(OpenClipConfig, {"open_clip": to_open_clip_config(tiny_config())["model_cfg"]}), 0)
    save_any_clip(plain, tmp_path)
    assert isinstance(read_clip(tmp_path), OpenClip)  # it was asked for, so it stays one
    assert isinstance(load_any_clip(tmp_path), CLIP)
    given = pairs(4)
    torch.testing.assert_close(load_any_clip(tmp_path)(given).text_bD, plain.eval()(given).text_bD)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"open_clip": "coca_roberta-ViT-B-32"}, r"hf_model_name: this CoCa's text tower and its decoder differ"),
        ({"open_clip": "coca_ViT-B-23"}, r"open_clip has no model 'coca_ViT-B-23'; near: coca_ViT-B-32"),
        ({"vision_cfg": {"timm_model_name": "hf-hub:a/b"}}, r"timm_model_name: hf-hub:a/b names a hub or a folder"),
        ({"vision_cfg": {"image_size": [16, 32]}}, r"image_size is \[16, 32\]; pictures are squares here"),
        ({"text_cfg": {"pad_id": 1}}, "captions are padded with 0"),
        ({"text_cfg": {"hf_model_name": "roberta-base"}}, "a text tower of transformers reads its own tokenizer's ids"),
        ({"text_cfg": {"hf_tokenizer_name": "a/b", "tokenizer_mode": "clips"}}, "tokenizer_mode: clips is a way of"),
        ({"text_cfg": {"tokenizer_kwargs": {"clean": "lower"}}}, "tokenizer_kwargs is for a tokenizer of transformers"),
        (
            {"text_cfg": {"hf_tokenizer_name": "a/b", "tokenizer_kwargs": {"strip_sep": True}}},
            r"text_cfg\.tokenizer_kwargs\.strip_sep is not a known key; did you mean strip_sep_token",
        ),
        ({"vision_cfg": None}, "has a mapping vision_cfg"),
    ],
)
def test_what_cannot_be_built_is_refused(changes: dict[str, Any], message: str) -> None:
    tree = {"open_clip": model_cfg("siglip") | changes} if "open_clip" not in changes else changes
    with pytest.raises(ConfigError, match=message) as caught:
        parse(OpenClipConfig, tree)
    assert "\n" not in str(caught.value)


def test_what_open_clip_refuses_and_what_stages_refuse() -> None:
    with pytest.raises(ConfigError, match=r"open_clip cannot build this CustomTextCLIP: .*tilt"):
        OpenClip(OpenClipConfig(open_clip=model_cfg("siglip") | {"tilt": 1}))
    blurred = config("coca", preprocess_cfg={"interpolation": "bilinear"})
    with pytest.raises(
        ConfigError, match=r"preprocess_cfg\.interpolation is bilinear: this stage resizes with bicubic"
    ):
        blurred.check_resizing()
    assert blurred.text_cfg.context_length == CONTEXT
    with pytest.raises(ConfigError, match="resize_mode"):
        parse(OpenClipPreprocess, {"resize_mode": "longest"})
    config("coca", preprocess_cfg={"resize_mode": "squash"}).check_resizing()
