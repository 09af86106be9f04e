"""Captions of a scene, and hard negatives: almost the same words, but not true of it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

from mmfoundry.data.concepts import Concept, indefinite, with_article
from mmfoundry.data.questions import NUMBERS, side_of
from mmfoundry.data.scenes import CELLS, Scene, SceneObject

CaptionKind = Literal["full", "list", "relation", "part", "kind"]
_RELATIONS = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
_SINGLE = ("{thing}", "a picture of {thing}", "this is {thing}", "one picture: {thing}")
_KINDS = ("{kinds}", "a picture of {kinds}", "this picture shows {kinds}", "something of the kind: {kinds}")
_OPENINGS = ("{things}", "a picture of {things}", "this picture shows {things}", "{things} on a plain background")
_NUM_NEGATIVES = 3


def caption(scene: Scene, kind: CaptionKind, rng: np.random.Generator) -> str:
    """One true caption.

    Args:
        scene: what is described.
        kind: full: every object, with places if there are at most two, with their number if there are more;
            list: every object and nothing else; relation: two objects and how they lie to each other (where there are
            no two in one row or column: as list); part: one object and its place; kind: only what kinds of things the
            objects are. Without a grid no place is told, and every kind but the last one names the object.
        rng: draws order and wording.
    """
    if scene.objects[0].cell is None and kind != "kind":
        return _single(scene, rng)
    return _WRITERS[kind](scene, rng)


def _full(scene: Scene, rng: np.random.Generator) -> str:
    items = _in_any_order(scene, rng)
    return full_caption([(item.concept, item.cell) for item in items], len(items))


def full_caption(items: Sequence[tuple[Concept, int | None]], count: int) -> str:
    """The full caption of concepts in cells, with `count` as the number that it gives."""
    if len(items) > 2:
        return f"{NUMBERS[count]} pictures: {enumerate_phrases([concept.phrase for concept, _ in items])}"
    return " and ".join(
        concept.phrase if cell is None else f"{concept.phrase} in the {CELLS[cell]}" for concept, cell in items
    )


def _list(scene: Scene, rng: np.random.Generator) -> str:
    things = enumerate_phrases([item.concept.phrase for item in _in_any_order(scene, rng)])
    return _OPENINGS[int(rng.integers(len(_OPENINGS)))].format(things=things)


def _relation(scene: Scene, rng: np.random.Generator) -> str:
    items = _in_any_order(scene, rng)
    for one in items:
        for other in items:
            side = side_of(one, other)
            if side is not None:
                return f"{one.concept.phrase} {_RELATIONS[side]} {other.concept.phrase}"
    return _list(scene, rng)


def _part(scene: Scene, rng: np.random.Generator) -> str:
    item = _in_any_order(scene, rng)[0]
    return f"there {'are' if item.concept.noun == 'plural' else 'is'} {item.concept.phrase} in the {item.place}"


def _kind(scene: Scene, rng: np.random.Generator) -> str:
    """What is said of a thing whose name is not known, so that kinds can be told of things never seen."""
    kinds = enumerate_phrases([indefinite(item.concept.kind) for item in _in_any_order(scene, rng)])
    return _KINDS[int(rng.integers(len(_KINDS)))].format(kinds=kinds)


def _single(scene: Scene, rng: np.random.Generator) -> str:
    """One object alone, at times by a synonym."""
    concept = scene.objects[0].concept
    thing = concept.phrase
    if concept.synonyms and rng.random() < 0.2:
        synonym = concept.synonyms[int(rng.integers(len(concept.synonyms)))]
        thing = with_article(synonym, concept.noun) if concept.noun in ("mass", "plural") else indefinite(synonym)
    return _SINGLE[int(rng.integers(len(_SINGLE)))].format(thing=thing)


_WRITERS: Mapping[CaptionKind, Callable[[Scene, np.random.Generator], str]] = {
    "full": _full,
    "list": _list,
    "relation": _relation,
    "part": _part,
    "kind": _kind,
}


def captions_with_negatives(
    scene: Scene, rng: np.random.Generator, concepts: Sequence[Concept], kinds: Sequence[CaptionKind]
) -> tuple[list[str], list[dict[str, str]]]:
    """A full caption first, then one of each kind; and what is almost the first one but wrong.

    Args:
        scene: what is described.
        rng: draws order, wording and what is replaced.
        concepts: what may stand in for an object in a wrong caption.
        kinds: of the captions after the first; a caption that comes twice is kept once.
    Returns:
        The captions, and up to three hard negatives of the first as `{"kind": "replace" | "place" | "swap" | "count",
        "text": ...}`; none is true of the scene.
    """
    items = _in_any_order(scene, rng)
    first = full_caption([(item.concept, item.cell) for item in items], len(items))
    captions = list(dict.fromkeys([first, *(caption(scene, kind, rng) for kind in kinds)]))
    makers = [_replaced, _counted, _replaced] if len(items) > 2 else [_replaced, _swapped, _misplaced, _replaced]
    negatives: dict[str, str] = {}
    for make in makers:
        made = make(items, rng, concepts)
        if made and made[1] not in captions and len(negatives) < _NUM_NEGATIVES:
            negatives.setdefault(made[1], made[0])
    return captions, [{"kind": kind, "text": text} for text, kind in negatives.items()]


def _replaced(
    items: Sequence[SceneObject], rng: np.random.Generator, concepts: Sequence[Concept]
) -> tuple[str, str] | None:
    """Another concept in the place of one object; of the same kind half of the time, if there is one."""
    present = {item.concept.name for item in items}
    wrong = int(rng.integers(len(items)))
    absent = [concept for concept in concepts if concept.name not in present]
    alike = [concept for concept in absent if concept.kind == items[wrong].concept.kind]
    pool = alike if alike and rng.random() < 0.5 else absent
    if not pool:
        return None
    other = pool[int(rng.integers(len(pool)))]
    changed = [(other if i == wrong else item.concept, item.cell) for i, item in enumerate(items)]
    return "replace", full_caption(changed, len(items))


def _swapped(
    items: Sequence[SceneObject], rng: np.random.Generator, concepts: Sequence[Concept]
) -> tuple[str, str] | None:
    """Two objects with their places exchanged."""
    if len(items) != 2 or items[0].concept.name == items[1].concept.name or items[0].cell is None:
        return None
    one, other = items
    return "swap", full_caption([(other.concept, one.cell), (one.concept, other.cell)], 2)


def _misplaced(
    items: Sequence[SceneObject], rng: np.random.Generator, concepts: Sequence[Concept]
) -> tuple[str, str] | None:
    """One object in a cell that is empty."""
    taken = [item.cell for item in items]
    empty = [cell for cell in range(len(CELLS)) if cell not in taken]
    if None in taken or not empty:
        return None
    wrong, cell = int(rng.integers(len(items))), empty[int(rng.integers(len(empty)))]
    changed = [(item.concept, cell if i == wrong else item.cell) for i, item in enumerate(items)]
    return "place", full_caption(changed, len(items))


def _counted(
    items: Sequence[SceneObject], rng: np.random.Generator, concepts: Sequence[Concept]
) -> tuple[str, str] | None:
    """The same list with another number before it."""
    wrong = [count for count in range(2, len(CELLS) + 1) if count != len(items)]
    return "count", full_caption([(item.concept, item.cell) for item in items], wrong[int(rng.integers(len(wrong)))])


def enumerate_phrases(phrases: Sequence[str]) -> str:
    """ "a dog", "a dog and a cat", "a dog, a cat and an owl"."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _in_any_order(scene: Scene, rng: np.random.Generator) -> list[SceneObject]:
    return [scene.objects[i] for i in rng.permutation(len(scene.objects))]
