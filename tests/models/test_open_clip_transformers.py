"""open_clip's models that read captions by transformers: a tokenizer of the hub (CLIPA), and whole text towers."""

import json
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from mmfoundry.data.caption_tokenizer import FolderTokenizer
from mmfoundry.models.interop.any_clip import config_of_name, read_clip, save_any_clip
from mmfoundry.models.interop.open_clip import named_model_cfg
from mmfoundry.models.open_clip_model import OpenClip, OpenClipConfig
from mmfoundry.models.teachers import check_teacher
from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.errors import ConfigError, DamagedInput, MissingInput
from mmfoundry.stages.captions import tokenizer_of
from tests.models.tiny_open_clip import config as plain_config
from tests.models.tiny_open_clip import model_cfg
from tests.models.tiny_transformers import WORDS, bert, bert_tokenizer

LENGTH = 9
CAPTIONS = ["a red square", "Blue all over, indeed!", "", "green " * 20]
KINDS = ("clipa", "tower")


def tree(kind: str, folder: Path) -> dict[str, Any]:
    """open_clip's keys of a model whose captions a tokenizer in `folder` splits, or a whole tower there reads."""
    made = model_cfg("siglip") | {"init_logit_bias": None}
    if kind == "clipa":
        own = {"vocab_size": len(WORDS), "hf_tokenizer_name": str(bert_tokenizer(folder))}
        made["text_cfg"] |= own | {"tokenizer_kwargs": {"strip_sep_token": True}}
        return made
    name = str(bert(folder))
    return made | {
        "text_cfg": {
            "context_length": LENGTH,
            "hf_model_name": name,
            "hf_tokenizer_name": name,
            "hf_pooler_type": "mean_pooler",
            "hf_proj_type": "linear",
        }
    }


def config(kind: str, folder: Path) -> OpenClipConfig:
    return parse(OpenClipConfig, {"open_clip": tree(kind, folder)})


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert_tokenizer(tmp_path_factory.mktemp("words"))


@given(captions=st.lists(st.lists(st.sampled_from([*WORDS[5:15], "[SEP]", "Zebra"]), max_size=12).map(" ".join)))
def test_stripped_ids_are_those_of_open_clip(words: Path, captions: list[str]) -> None:
    captions = [*CAPTIONS, *captions]
    tokenizer = FolderTokenizer(words, LENGTH, "whitespace", strip_sep_token=True)
    theirs = open_clip.tokenizer.HFTokenizer(str(words), context_length=LENGTH, strip_sep_token=True)(captions).numpy()
    np.testing.assert_array_equal(tokenizer(captions), theirs)
    assert not (theirs == WORDS.index("[SEP]")).any()
    travelled = ForkingPickler.loads(ForkingPickler.dumps(tokenizer))
    np.testing.assert_array_equal(travelled(captions), theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_open_clips_here_and_from_what_is_saved(kind: str, tmp_path: Path) -> None:
    made = OpenClip.from_seed(config(kind, tmp_path / "source"), 0).eval()
    ids = torch.from_numpy(tokenizer_of(made.config.text_cfg)(CAPTIONS)).long()
    with torch.no_grad():
        text = made.encode_text(ids)
        torch.testing.assert_close(text, made.open_clip.encode_text(ids, normalize=True))
        assert text.std(0).mean() > 1e-3

        save_any_clip(made, tmp_path / "saved", seed=0)
        if kind == "tower":  # its weights are those that were saved with the rest
            (tmp_path / "source" / "model.safetensors").unlink()
        ours = read_clip(tmp_path / "saved")
        assert isinstance(ours, OpenClip)
        tokenizer = tokenizer_of(ours.config.text_cfg)
        assert tokenizer.folder == tmp_path / "saved"  # type: ignore[union-attr]
        torch.testing.assert_close(ours.encode_text(torch.from_numpy(tokenizer(CAPTIONS)).long()), text)

        place = f"local-dir:{tmp_path / 'saved'}"
        theirs = open_clip.create_model(place, require_pretrained=True).eval()
        their_ids = open_clip.get_tokenizer(place)(CAPTIONS)
        torch.testing.assert_close(their_ids, ids)
        torch.testing.assert_close(theirs.encode_text(their_ids, normalize=True), text)
    save_any_clip(ours, tmp_path / "again")
    torch.testing.assert_close(read_clip(tmp_path / "again").state_dict(), made.state_dict())


def test_a_tower_starts_from_published_weights_unless_told_otherwise(tmp_path: Path) -> None:
    published = load_file(bert(tmp_path) / "model.safetensors")
    asked = config("tower", tmp_path)
    key = "embeddings.word_embeddings.weight"
    found, again = (OpenClip.from_seed(asked, seed).open_clip.text for seed in (0, 1))
    torch.testing.assert_close(found.transformer.state_dict()[key], published[key])
    assert not torch.equal(found.proj.weight, again.proj.weight)  # what is not published follows from the seed

    asked.open_clip["text_cfg"]["hf_model_pretrained"] = False
    found, again, other = (OpenClip.from_seed(asked, seed).open_clip.text.state_dict() for seed in (0, 0, 1))
    assert not torch.equal(found[f"transformer.{key}"], published[key])
    torch.testing.assert_close(found, again)
    assert not torch.equal(found[f"transformer.{key}"], other[f"transformer.{key}"])


def test_a_tower_that_is_not_to_be_had_is_told(tmp_path: Path) -> None:
    asked = config("tower", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(DamagedInput, match=r"hf_model_name: .*header"):
        OpenClip.from_seed(asked, 0)
    asked.open_clip["text_cfg"]["hf_model_name"] = str(tmp_path / "nowhere")
    with pytest.raises(MissingInput, match="nowhere: no such file or folder"):
        OpenClip.from_seed(asked, 0)


def test_all_but_one_of_open_clips_configs_have_a_config_here() -> None:
    folder = Path(open_clip.__file__).parent / "model_configs"
    names = sorted(file.stem for file in folder.glob("*.json"))
    assert len(names) > 140
    refused = []
    for name in names:
        try:
            made = config_of_name(name).text_cfg
        except ConfigError:
            refused.append(name)
            continue
        assert made.hf_tokenizer_name == named_model_cfg(name)["text_cfg"].get("hf_tokenizer_name")
    assert refused == ["coca_roberta-ViT-B-32"]


def test_a_teacher_reads_the_students_tokenizer(tmp_path: Path) -> None:
    plain = plain_config("siglip")
    student = config("clipa", tmp_path)
    check_teacher("t", student, student)
    for teacher, learner in ((plain, student), (student, plain)):
        with pytest.raises(ConfigError, match=r"teachers\.t: its captions are split by another tokenizer"):
            check_teacher("t", teacher, learner)


def test_a_saved_tokenizer_names_its_class(tmp_path: Path) -> None:
    save_any_clip(OpenClip.from_seed(config("clipa", tmp_path / "source"), 0), tmp_path / "saved")
    said = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert said["tokenizer_class"].startswith("BertTokenizer")
