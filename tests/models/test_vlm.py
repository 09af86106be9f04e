"""models/vlm.py and vlm_io.py: image tokens in their places, saving, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmfoundry.data.tiles import cut_tiles
from mmfoundry.models.vlm import VlmSettings, branch_mask
from mmfoundry.models.vlm_io import Start, load_vlm, save_vlm, untrained_vlm
from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.errors import ConfigError, DamagedInput, MissingInput
from tests.models.tiny_vlm import logits_of, picture, tiny_language, tiny_settings, tiny_vlm

QUESTION = "Where is the dog?"


def test_image_tokens_take_the_places_of_their_placeholders() -> None:
    model, text = tiny_vlm()
    before, after = text.prompt(QUESTION, 5)
    ids = torch.tensor([before + after, before + after])
    tiles = torch.cat([cut_tiles(picture(seed), 16, 4, 4) for seed in (0, 1)])
    embedded = model.embed(ids, tiles)
    expected = model.image_tokens(tiles)
    assert expected.shape == (10, 1, 32)
    assert torch.equal(embedded[ids == text.patch_id], expected.flatten(0, 1))
    words = ids != text.patch_id
    assert torch.equal(embedded[words], model.model.language_model.embed_tokens(ids[words]))
    with pytest.raises(ValueError, match="10 placeholders for 5 image tokens"):
        model.embed(ids, tiles[:5])


def test_the_language_model_without_a_picture_is_itself() -> None:
    language = tiny_language()
    ids = torch.tensor([[5, 9, 30, 7]])
    with torch.no_grad():
        expected = language.model(ids).logits
        model, _ = tiny_vlm()
        hidden = model.model.language_model(inputs_embeds=model.embed(ids, None)).last_hidden_state
        assert torch.equal(model.lm_head(hidden), expected)


def test_branch_mask() -> None:
    mask = branch_mask(torch.tensor([[0, 0, 1, 1, 2, -1]]))[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("patch_token", [True, False])
def test_round_trip(tmp_path: Path, tie: bool, patch_token: bool) -> None:
    model, text = tiny_vlm(tie=tie, patch_token=patch_token)
    save_vlm(model, text, tmp_path)
    loaded, loaded_text = load_vlm(tmp_path)
    assert loaded.config == model.config
    assert not loaded.training
    assert (loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight) == tie
    before, after = text.prompt(QUESTION, 5)
    assert loaded_text.prompt(QUESTION, 5) == (before, after)
    assert before.count(text.patch_id) == 5
    tiles = cut_tiles(picture(0), 16, 4, 4)
    with torch.no_grad():
        ids = torch.tensor([before + after])
        assert torch.equal(logits_of(loaded, ids, tiles), logits_of(model, ids, tiles))


def test_tags_are_words_of_the_tokenizer(tmp_path: Path) -> None:
    """What the released processor writes, `<tile>_1`, is read as the tag's words."""
    model, text = tiny_vlm(image={"tile_tags": [f"tile {n}:" for n in range(1, 13)]})
    save_vlm(model, text, tmp_path)
    _, loaded = load_vlm(tmp_path)
    for side in (text, loaded):
        assert side.encode("<tile>_12<empty_output>")[0] == side.encode("tile 12:<empty_output>")[0]
        assert side.encode("<tile>_1<empty_output>")[0] == side.encode("tile 1:<empty_output>")[0]


def test_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match=r"config\.json: no such file"):
        load_vlm(tmp_path)
    model, text = tiny_vlm()
    save_vlm(model, text, tmp_path)
    with pytest.raises(MissingInput, match="start is not set"):
        untrained_vlm(tmp_path)
    weights = tmp_path / "model.safetensors"
    state = load_file(weights)
    save_file({name: value for name, value in state.items() if "linear_1" not in name}, weights)
    with pytest.raises(DamagedInput, match=r"multi_modal_projector\.linear_1\.weight is missing"):
        load_vlm(tmp_path)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(DamagedInput, match="not a whole safetensors file"):
        load_vlm(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"]["connector"]["typ"] = "mlp"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"model\.connector\.typ is not a known key; did you mean type"):
        load_vlm(tmp_path)


def test_untrained(tmp_path: Path) -> None:
    language = tiny_language()
    language.model.save_pretrained(tmp_path / "language")
    language.tokenizer.save_pretrained(tmp_path / "language")
    model, text = tiny_vlm(seed=4)  # another language model, another connector
    save_vlm(model, text, tmp_path / "vlm", Start(str(tmp_path / "language"), 0))
    start, _ = untrained_vlm(tmp_path / "vlm")
    for name, value in start.state_dict().items():
        if name.startswith("model.vision_tower."):
            assert torch.equal(value, model.state_dict()[name])
        if name.startswith("model.language_model."):
            assert torch.equal(value, language.model.state_dict()[name.replace("model.language_model.", "model.")])
    again, _ = untrained_vlm(tmp_path / "vlm")
    assert torch.equal(
        again.model.multi_modal_projector.linear_1.weight, start.model.multi_modal_projector.linear_1.weight
    )


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"tiles": {"min_tiles": 5, "max_tiles": 4}}, "min_tiles 5 is more than max_tiles 4"),
        ({"tiles": {"max_tiles": 4}, "image": {"tile_tags": ["a"]}}, "tile_tags 1"),
        ({"image": {"tile_tags": ["a", ""]}}, "must not be empty"),
        ({"image": {"end": "<empty_output>"}}, "end must not hold"),
    ],
)
def test_settings_that_do_not_fit(tree: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(VlmSettings, tree)


def test_the_end_of_an_answer_is_one_token() -> None:
    with pytest.raises(ConfigError, match="should be one token, not"):
        tiny_vlm(chat={"assistant_end": "the end"})
    assert tiny_settings().chat.assistant_end == "<|im_end|>"
