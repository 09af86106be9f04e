from collections import Counter

import numpy as np
import pytest

from mmfoundry.data.questions import side_of
from mmfoundry.data.scene_captions import caption, captions_with_negatives, enumerate_phrases, full_caption
from mmfoundry.data.scenes import Scene, SceneStyle, compose_scene, scene_rng
from tests.data.drawn import by_name, pictures

PICTURES = by_name(pictures(12, ("noto",)))
CONCEPTS = [styles["noto"].concept for styles in PICTURES.values()]


def scenes(count: int, **style: object) -> list[tuple[Scene, np.random.Generator]]:
    found = []
    for index in range(count):
        rng = scene_rng(0, "captions", index)
        found.append((compose_scene(PICTURES, rng, SceneStyle(canvas_size=16, **style)), rng))  # type: ignore[arg-type]
    return found


def named(text: str) -> Counter[str]:
    """The concepts that a text names, by words; synonyms count as their concept."""
    return Counter(word.replace("item", "thing") for word in text.replace(",", "").split() if word[-1].isdigit())


def test_full_and_list_captions_name_every_object_once() -> None:
    for scene, rng in scenes(100):
        there = Counter(item.concept.name for item in scene.objects)
        assert named(caption(scene, "full", rng)) == there
        assert named(caption(scene, "list", rng)) == there


def test_full_captions_tell_places_or_the_number() -> None:
    for scene, rng in scenes(100):
        text = caption(scene, "full", rng)
        if len(scene.objects) > 2:
            assert text.startswith({3: "three pictures: ", 4: "four pictures: "}[len(scene.objects)])
            continue
        for part in text.split(" and "):
            (name,) = named(part)
            (item,) = [item for item in scene.objects if item.concept.name == name]
            assert part == f"{item.concept.phrase} in the {item.place}"


def test_relations_and_parts_are_true() -> None:
    words = {"to the left of": "left", "to the right of": "right", "above": "above", "below": "below"}
    told = 0
    for scene, rng in scenes(200):
        items = {item.concept.name: item for item in scene.objects}
        text = caption(scene, "relation", rng)
        phrase = next((phrase for phrase in words if f" {phrase} " in text), None)
        if phrase:
            one, other = (next(iter(named(side))) for side in text.split(f" {phrase} "))
            assert side_of(items[one], items[other]) == words[phrase]
            told += 1
        part = caption(scene, "part", rng)
        (name,) = named(part)
        assert part.endswith(f"{items[name].concept.phrase} in the {items[name].place}")
    assert told > 100


def test_hard_negatives_are_false_and_close() -> None:
    kinds: Counter[str] = Counter()
    for scene, rng in scenes(300):
        captions, negatives = captions_with_negatives(scene, rng, CONCEPTS, ["full", "list", "relation", "part"])
        there = Counter(item.concept.name for item in scene.objects)
        assert 1 <= len(negatives) <= 3
        assert len({negative["text"] for negative in negatives}) == len(negatives)
        true = {full_caption([(i.concept, i.cell) for i in order], len(order)) for order in orders(scene)}
        for negative in negatives:
            kinds[negative["kind"]] += 1
            assert negative["text"] not in true
            assert (named(negative["text"]) != there) == (negative["kind"] == "replace")
            words, first = negative["text"].split(), captions[0].split()
            assert abs(len(words) - len(first)) <= 2
    assert kinds.keys() == {"replace", "place", "swap", "count"}


def orders(scene: Scene) -> list[tuple]:
    from itertools import permutations

    return list(permutations(scene.objects))


def test_repeated_objects_give_no_negative_that_is_true() -> None:
    for scene, rng in scenes(200, repeats=True, min_objects=2, max_objects=2):
        true = {full_caption([(i.concept, i.cell) for i in order], len(order)) for order in orders(scene)}
        _, negatives = captions_with_negatives(scene, rng, CONCEPTS, [])
        assert not true & {negative["text"] for negative in negatives}


def test_a_single_object_is_named_without_a_place() -> None:
    for scene, rng in scenes(50, arrangement="single"):
        captions, negatives = captions_with_negatives(scene, rng, CONCEPTS, ["list", "part"])
        assert captions[0] == scene.objects[0].concept.phrase
        assert all(named(text) == Counter([scene.objects[0].concept.name]) for text in captions)
        assert {negative["kind"] for negative in negatives} == {"replace"}


@pytest.mark.parametrize(
    ("phrases", "text"),
    [(["a dog"], "a dog"), (["a dog", "rice"], "a dog and rice"), (["a", "b", "c"], "a, b and c")],
)
def test_phrases_are_joined_as_english_does(phrases: list[str], text: str) -> None:
    assert enumerate_phrases(phrases) == text


@pytest.mark.parametrize("arrangement", ["grid", "single"])
def test_kind_captions_name_every_kind_and_no_object(arrangement: str) -> None:
    for scene, rng in scenes(60, arrangement=arrangement):
        text = caption(scene, "kind", rng)
        assert not named(text)
        words = Counter(text.replace(",", "").removeprefix("something of the kind: ").split())
        for kind, count in Counter(item.concept.kind for item in scene.objects).items():
            assert words[kind] == count
