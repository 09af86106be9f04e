"""Questions about a scene whose answers are known, short, and as hard to guess as the type allows.

| type | asks | answers |
| --- | --- | --- |
| what | What is in the top left? | names |
| count | How many pictures are there? | one, two, three, four |
| where | Where is the dog? | the four cells |
| relation | On which side of the apple is the dog? | left, right, above, below |
| presence | Is there a dog? | yes, no: half each, where an even number of them, or one, is asked a scene |
| category | Which kind of thing is in the top right? | kinds |
| bigger | Which is bigger, the dog or the apple? | names; the bigger one is named first half the time |

Only questions with one right answer are asked: of a concept that comes twice nobody asks where it is.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmfoundry.data.concepts import Concept
from mmfoundry.data.scenes import CELLS, Scene, SceneObject, SceneStyle

NUMBERS = ("zero", "one", "two", "three", "four")
SIDES = ("left", "right", "above", "below")
CLEARLY = 1.3  # of two objects, the bigger one's longer side and root area are at least this many times the other's


@dataclass(frozen=True)
class Question:
    """One question with its answer.

    Attributes:
        type: a key of `QUESTION_TYPES`.
        question: as put to a model.
        answer: one to three words.
        reveals: facts that question and answer give away together.
        needs: facts that give the answer away: after a question that reveals one, this one tests nothing.
    """

    type: str
    question: str
    answer: str
    reveals: frozenset[tuple[str, ...]] = frozenset()
    needs: frozenset[tuple[str, ...]] = frozenset()

    def as_json(self) -> dict[str, str]:
        """What a scene's JSON says about it."""
        return {"type": self.type, "question": self.question, "answer": self.answer}


def _what(scene: Scene, rng: np.random.Generator) -> list[Question]:
    questions = []
    for item in scene.objects:
        at, name = ("at", item.concept.name, item.place), item.concept.name
        facts = frozenset([at, ("there", name)])
        questions.append(Question("what", f"What is in the {item.place}?", name, facts, frozenset([at])))
    return _shuffled(questions, rng)


def _count(scene: Scene, rng: np.random.Generator) -> list[Question]:
    answer = NUMBERS[len(scene.objects)]
    return [Question("count", "How many pictures are there?", answer)]


def _where(scene: Scene, rng: np.random.Generator) -> list[Question]:
    questions = []
    for item in _unrepeated(scene):
        name = item.concept.name
        at = ("at", name, item.place)
        facts = frozenset([at, ("there", name)])
        verb = _verb(item.concept)
        questions.append(Question("where", f"Where {verb} {_the(item.concept)}?", item.place, facts, frozenset([at])))
    return _shuffled(questions, rng)


def _relation(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Only of objects in one row or one column, so that one side is right and the others are wrong."""
    questions = []
    items = _unrepeated(scene)
    for one in items:
        for other in items:
            side = side_of(one, other)
            if side is None:
                continue
            text = f"On which side of {_the(other.concept)} {_verb(one.concept)} {_the(one.concept)}?"
            pair = ("side", *sorted((one.concept.name, other.concept.name)))
            facts = frozenset([pair, ("there", one.concept.name), ("there", other.concept.name)])
            questions.append(Question("relation", text, side, facts, frozenset([pair])))
    return _shuffled(questions, rng)


def side_of(one: SceneObject, other: SceneObject) -> str | None:
    """On which side of `other` `one` is; None if they are in one cell or diagonal to each other."""
    if one.cell is None or other.cell is None:
        return None
    (row, column), (other_row, other_column) = divmod(one.cell, 2), divmod(other.cell, 2)
    if row == other_row and column != other_column:
        return "left" if column < other_column else "right"
    if column == other_column and row != other_row:
        return "above" if row < other_row else "below"
    return None


def _category(scene: Scene, rng: np.random.Generator) -> list[Question]:
    questions = []
    for item in scene.objects:
        fact = frozenset([("kind", item.place)])
        text = f"Which kind of thing is in the {item.place}?"
        questions.append(Question("category", text, item.concept.kind, fact, fact))
    return _shuffled(questions, rng)


def _bigger(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Only of objects whose sizes differ clearly, whichever way one measures."""
    questions = []
    items = _unrepeated(scene)
    for i, one in enumerate(items):
        for other in items[i + 1 :]:
            bigger = _clearly_bigger(one, other)
            if bigger is None:
                continue
            first, second = (one, other) if rng.random() < 0.5 else (other, one)
            text = f"Which is bigger, {_the(first.concept)} or {_the(second.concept)}?"
            pair = ("size", *sorted((one.concept.name, other.concept.name)))
            facts = frozenset([pair, ("there", one.concept.name), ("there", other.concept.name)])
            questions.append(Question("bigger", text, bigger.concept.name, facts, frozenset([pair])))
    return _shuffled(questions, rng)


def _clearly_bigger(one: SceneObject, other: SceneObject) -> SceneObject | None:
    sizes = []
    for item in (one, other):
        width, height = item.box[2] - item.box[0], item.box[3] - item.box[1]
        sizes.append((max(width, height), float(width * height) ** 0.5))
    if all(a >= CLEARLY * b for a, b in zip(*sizes, strict=True)):
        return one
    if all(b >= CLEARLY * a for a, b in zip(*sizes, strict=True)):
        return other
    return None


def _presence(
    scene: Scene, rng: np.random.Generator, concepts: Sequence[Concept], count: int, first: int
) -> list[Question]:
    """At most `count` of them, alternating between yes and no; `first` came before this scene.

    Two a present concept at most, so that there are as many of yes as of no. Absent concepts are drawn uniformly from
    those that scenes are drawn from, so that a concept says nothing about the answer.
    """
    present = {item.concept.name: item.concept for item in scene.objects}
    absent = [concept for concept in concepts if concept.name not in present]
    yes = _shuffled(list(present.values()), rng)
    no = [absent[i] for i in rng.permutation(len(absent))[:count]]
    questions = []
    for number in range(min(count, 2 * len(yes), 2 * len(no))):
        is_yes = (first + number) % 2 == 0
        concept = (yes if is_yes else no)[number // 2]
        text = f"{_verb(concept).capitalize()} there {_any(concept)}?"
        fact = frozenset([("there", concept.name)])
        questions.append(Question("presence", text, "yes" if is_yes else "no", fact, fact))
    return questions


QUESTION_TYPES: Mapping[str, Callable[[Scene, np.random.Generator], list[Question]] | None] = {
    "what": _what,
    "count": _count,
    "where": _where,
    "relation": _relation,
    "presence": None,  # made apart: it also needs the concepts that are not there
    "category": _category,
    "bigger": _bigger,
}


def ask(
    scene: Scene,
    rng: np.random.Generator,
    wanted: Mapping[str, int],
    concepts: Sequence[Concept],
    index: int = 0,
) -> list[Question]:
    """Questions about a scene, in random order.

    Args:
        scene: on a grid.
        rng: draws which objects are asked about, the concepts that are not there, and the order.
        wanted: type -> how many at most; a scene that has not enough objects for them gets fewer.
        concepts: what scenes of this set are drawn from.
        index: number of the scene in its set; yes and no alternate over the whole set.
    Raises:
        KeyError: a type that is not in `QUESTION_TYPES`.
    """
    questions: list[Question] = []
    for kind, count in wanted.items():
        make = QUESTION_TYPES[kind]
        if make is None:
            questions += _presence(scene, rng, concepts, count, index * count)
        else:
            questions += make(scene, rng)[:count]
    return _shuffled(questions, rng)


def conversation(questions: Sequence[Question], independent: bool = True) -> list[dict[str, str]]:
    """The questions as turns of a chat, the image in the first.

    Args:
        questions: in the order in which they are asked.
        independent: leave out what an earlier turn has already told ("Where is the dog?", then "Is there a dog?"), so
            that no answer can be copied from the text before it.
    Returns:
        Turns `{"role": "user" | "assistant", "content": str}`; the first user turn starts with "<image>" and a newline.
    """
    turns: list[dict[str, str]] = []
    known: set[tuple[str, ...]] = set()
    for question in questions:
        if independent and known & question.needs:
            continue
        known |= question.reveals
        turns.append({"role": "user", "content": question.question if turns else f"<image>\n{question.question}"})
        turns.append({"role": "assistant", "content": question.answer})
    return turns


def answer_vocabulary(concepts: Sequence[Concept], style: SceneStyle) -> dict[str, list[str]]:
    """Every answer that a question of each type can have, in a fixed order."""
    names = [concept.name for concept in concepts]
    return {
        "what": names,
        "count": list(NUMBERS[style.min_objects : style.max_objects + 1]),
        "where": list(CELLS),
        "relation": list(SIDES),
        "presence": ["yes", "no"],
        "category": list(dict.fromkeys(concept.kind for concept in concepts)),
        "bigger": names,
    }


def _unrepeated(scene: Scene) -> list[SceneObject]:
    """The objects whose concept comes once."""
    times = Counter(item.concept.name for item in scene.objects)
    return [item for item in scene.objects if times[item.concept.name] == 1]


def _the(concept: Concept) -> str:
    return f"the {concept.name}"


def _any(concept: Concept) -> str:
    return f"any {concept.name}" if concept.noun in ("mass", "plural") else concept.phrase


def _verb(concept: Concept) -> str:
    return "are" if concept.noun == "plural" else "is"


def _shuffled(items: list[Any], rng: np.random.Generator) -> list[Any]:
    return [items[i] for i in rng.permutation(len(items))]
