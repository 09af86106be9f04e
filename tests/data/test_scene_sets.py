import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from mmfoundry.data.pictures import load_pictures, select_concepts
from mmfoundry.data.scene_sets import SceneSet, SceneSource
from mmfoundry.data.shards import write_shards
from mmfoundry.pipeline.errors import ConfigError, DamagedInput
from tests.data.drawn import pictures, write_pictures

PICTURES = pictures()
SMALL = {"canvas_size": 32}


def source(**spec: Any) -> SceneSource:
    return SceneSource.of("demo", SceneSet(**{"count": 10, "layout": SMALL} | spec), PICTURES)


def test_pictures_come_back_from_their_shards(tmp_path: Path) -> None:
    found = load_pictures(write_pictures(tmp_path))
    assert [(p.concept, p.style) for p in found] == [(p.concept, p.style) for p in PICTURES]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(found, PICTURES, strict=True))
    assert found[0].visible == (2, 2, 14, 14)


@pytest.mark.parametrize(
    ("sample", "says"),
    [
        ({"png": b"no picture", "json": PICTURES[0].concept.as_json()}, "unknown image format"),
        ({"png": b"", "json": {"concept": "dog"}}, "lacks 'noun'"),
        ({"txt": "a dog", "json": PICTURES[0].concept.as_json()}, "no image"),
        ({"png": b"", "json": "{"}, "Expecting"),
    ],
)
def test_a_damaged_picture_is_named(tmp_path: Path, sample: dict[str, Any], says: str) -> None:
    write_shards([{"__key__": "noto-dog"} | sample], tmp_path)
    with pytest.raises(DamagedInput, match=f"shard-00000.tar: noto-dog: .*{says}"):
        load_pictures(tmp_path)


@pytest.mark.parametrize(
    ("group", "count"), [("train", 16), ("heldout", 4), ("question", 4), ("adapt", 4), ("all", 20)]
)
def test_groups_are_those_of_the_table(group: str, count: int) -> None:
    assert len(select_concepts(PICTURES, group)) == count


def test_scenes_show_only_what_the_set_allows() -> None:
    train = source(concepts="train", styles=["twemoji"])
    heldout = source(concepts="heldout")
    named = source(concepts=["thing3", "thing4"], layout=SMALL | {"max_objects": 2})
    for index in range(40):
        meta = train.sample(0, index)["json"]
        assert (meta["split"], meta["style"], meta["set"]) == ("train", "twemoji", "demo")
        assert heldout.sample(0, index)["json"]["split"] == "heldout"
        assert {item["concept"] for item in named.sample(0, index)["json"]["objects"]} <= {"thing3", "thing4"}


def test_a_sample_depends_on_seed_and_index_alone() -> None:
    one = source(questions={"what": 2, "presence": 2})
    assert one.sample(0, 5) == one.sample(0, 5) == source(questions={"what": 2, "presence": 2}).sample(0, 5)
    assert one.sample(1, 5) != one.sample(0, 5) != one.sample(0, 6)


def test_a_sample_has_image_captions_questions_and_a_conversation() -> None:
    sample = source(questions={"what": 2, "count": 1}).sample(0, 0)
    meta = sample["json"]
    assert sample["__key__"] == "demo-000000"
    assert Image.open(io.BytesIO(sample["png"])).size == (32, 32)
    assert sample["txt"].splitlines() == meta["captions"]
    assert len(meta["hard_negatives"]) == len(meta["hard_negative_kinds"]) > 0
    assert {question["type"] for question in meta["questions"]} == {"what", "count"}
    assert meta["messages"][0]["content"].startswith("<image>\n")
    assert "messages" not in source().sample(0, 0)["json"]


def test_single_objects_take_turns() -> None:
    single = source(concepts="adapt", layout=SMALL | {"arrangement": "single"})
    found = [single.sample(0, index)["json"] for index in range(12)]
    assert set(Counter(meta["concept"] for meta in found).values()) == {3}
    assert all(meta["names"][0] == meta["concept"] and meta["kind"] for meta in found)


def test_the_summary_lists_the_answers_of_what_is_asked() -> None:
    answers = source(questions={"count": 1, "where": 0}, layout=SMALL | {"max_objects": 2}).summary()["answers"]
    assert answers == {"count": ["one", "two"]}


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"concepts": ["dragon"]}, "sets.demo: concepts: no picture shows 'dragon'"),
        ({"styles": ["oil"]}, "sets.demo.styles: .* style 'oil'; styles: noto, twemoji"),
        ({"concepts": ["thing1", "thing2"]}, "sets.demo: 4 objects a scene need as many concepts, not 2"),
    ],
)
def test_what_the_pictures_lack_is_named(spec: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        source(**spec)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"questions": {"who": 1}}, "no such question type: who"),
        ({"questions": {"what": -1}}, "below 0"),
        ({"questions": {"what": 1}, "layout": {"arrangement": "single"}}, "cells of a grid"),
    ],
)
def test_sets_that_cannot_be_are_refused(spec: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        SceneSet(count=1, **spec)
