"""Every answer is checked against the scene by another way than the one that made it."""

from collections import Counter

import numpy as np
import pytest

from mmfoundry.data.questions import CLEARLY, QUESTION_TYPES, Question, answer_vocabulary, ask, conversation, side_of
from mmfoundry.data.scenes import Scene, SceneStyle, compose_scene, scene_rng
from tests.data.drawn import by_name, pictures

PICTURES = by_name(pictures(12, ("noto",)))
CONCEPTS = [styles["noto"].concept for styles in PICTURES.values()]
ALL = dict.fromkeys(QUESTION_TYPES, 4)
Asked = list[tuple[Scene, list[Question]]]


def asked(count: int, wanted: dict[str, int], **style: object) -> Asked:
    found = []
    for index in range(count):
        rng = scene_rng(0, "questions", index)
        scene = compose_scene(PICTURES, rng, SceneStyle(canvas_size=64, **style))  # type: ignore[arg-type]
        found.append((scene, ask(scene, rng, wanted, CONCEPTS, index)))
    return found


@pytest.fixture(scope="module")
def many() -> Asked:
    return asked(600, ALL)


def of_type(found: Asked, kind: str) -> list[tuple[Scene, Question]]:
    return [(scene, question) for scene, questions in found for question in questions if question.type == kind]


def centre(scene: Scene, name: str) -> tuple[float, float]:
    (item,) = [item for item in scene.objects if item.concept.name == name]
    return (item.box[0] + item.box[2]) / 2, (item.box[1] + item.box[3]) / 2


def cell_words(scene: Scene, name: str) -> str:
    x, y = centre(scene, name)
    return f"{'top' if y < 32 else 'bottom'} {'left' if x < 32 else 'right'}"


def test_what_is_answered_from_the_pixels_place(many: Asked) -> None:
    for scene, question in of_type(many, "what"):
        assert question.question == f"What is in the {cell_words(scene, question.answer)}?"


def test_where_is_answered_from_the_pixels_place(many: Asked) -> None:
    for scene, question in of_type(many, "where"):
        name = question.question.removesuffix("?").split()[-1]
        assert question.answer == cell_words(scene, name)


def test_count_is_the_number_of_objects(many: Asked) -> None:
    numbers = ["one", "two", "three", "four"]
    assert all(q.answer == numbers[len(scene.objects) - 1] for scene, q in of_type(many, "count"))


def test_relations_hold_between_centres(many: Asked) -> None:
    for scene, question in of_type(many, "relation"):
        words = question.question.removesuffix("?").split()
        other, one = words[words.index("of") + 2], words[-1]
        (x, y), (other_x, other_y) = centre(scene, one), centre(scene, other)
        expected = {
            "left": x < other_x - 8,
            "right": x > other_x + 8,
            "above": y < other_y - 8,
            "below": y > other_y + 8,
        }
        assert expected[question.answer]


def test_presence_is_half_yes_and_says_what_is_there() -> None:
    for count in (1, 2, 4):
        questions = of_type(asked(200, {"presence": count}), "presence")
        answers = Counter(question.answer for _, question in questions)
        assert answers["yes"] == answers["no"]
        for scene, question in questions:
            name = question.question.removesuffix("?").split()[-1]
            there = name in {item.concept.name for item in scene.objects}
            assert there == (question.answer == "yes")


def test_a_concept_says_nothing_about_presence() -> None:
    """Asked about as often where it is as where it is not, up to chance."""
    yes, no = Counter(), Counter()
    for _, question in of_type(asked(3000, {"presence": 2}), "presence"):
        (yes if question.answer == "yes" else no)[question.question] += 1
    assert yes.keys() == no.keys()
    for text in yes:
        total = yes[text] + no[text]
        assert abs(yes[text] - total / 2) < 4.5 * (total / 4) ** 0.5


def test_categories_are_those_of_the_thing_there(many: Asked) -> None:
    for scene, question in of_type(many, "category"):
        kinds = {cell_words(scene, item.concept.name): item.concept.kind for item in scene.objects}
        assert question.answer == kinds[question.question.removesuffix("?").split("in the ")[-1]]


def test_bigger_is_asked_where_it_is_clear(many: Asked) -> None:
    first = 0
    questions = of_type(many, "bigger")
    for scene, question in questions:
        sides = {item.concept.name: item.box[2] - item.box[0] for item in scene.objects}
        _, _, names = question.question.removesuffix("?").partition(", ")
        one, other = (name.removeprefix("the ") for name in names.split(" or "))
        small, big = sorted((one, other), key=sides.__getitem__)
        assert question.answer == big
        assert sides[big] >= CLEARLY * sides[small]
        first += one == big
    assert abs(first - len(questions) / 2) < 4.5 * (len(questions) / 4) ** 0.5


@pytest.mark.parametrize("kind", ["where", "relation", "count"])
def test_no_answer_of_a_place_or_number_is_more_likely(many: Asked, kind: str) -> None:
    answers = Counter(question.answer for _, question in of_type(many, kind))
    expected = sum(answers.values()) / 4
    assert len(answers) == 4
    assert max(abs(count - expected) for count in answers.values()) < 4.5 * expected**0.5


def test_every_answer_is_in_the_vocabulary(many: Asked) -> None:
    known = answer_vocabulary(CONCEPTS, SceneStyle())
    assert all(question.answer in known[question.type] for _, questions in many for question in questions)
    assert {question.type for _, questions in many for question in questions} == set(QUESTION_TYPES)


def test_no_scene_is_asked_twice_or_more_than_wanted(many: Asked) -> None:
    for _, questions in many:
        assert len({question.question for question in questions}) == len(questions)
        assert all(count <= ALL[kind] for kind, count in Counter(q.type for q in questions).items())


def test_what_comes_twice_is_not_asked_for_by_name() -> None:
    found = asked(200, ALL, repeats=True, min_objects=4)
    twice = 0
    for scene, questions in found:
        times = Counter(item.concept.name for item in scene.objects)
        twice += max(times.values()) > 1
        for question in questions:
            if question.type in ("where", "relation", "bigger"):
                words = question.question.removesuffix("?").replace(",", "").split()
                assert all(times[word] == 1 for word in words if word in times)
    assert twice > 20


def test_conversations_put_the_image_first_and_tell_nothing_twice(many: Asked) -> None:
    for _, questions in many:
        turns = conversation(questions)
        assert turns[0]["content"].startswith("<image>\n")
        assert sum("<image>" in turn["content"] for turn in turns) == 1
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        assert len(conversation(questions, independent=False)) == 2 * len(questions)
        told = ""
        for user, assistant in zip(turns[::2], turns[1::2], strict=True):
            text = user["content"].removeprefix("<image>\n")
            if text.startswith(("Is there", "Are there")):
                assert text.removesuffix("?").split()[-1] not in told.split()
            told += " " + text.replace("?", " ").replace(",", " ") + " " + assistant["content"]


def test_sides_need_a_common_row_or_column() -> None:
    (scene, _), *_ = asked(1, {}, min_objects=4)
    at = {item.cell: item for item in scene.objects}
    assert [side_of(at[0], at[1]), side_of(at[1], at[0])] == ["left", "right"]
    assert [side_of(at[0], at[2]), side_of(at[2], at[0])] == ["above", "below"]
    assert side_of(at[0], at[3]) is None


def test_few_concepts_leave_presence_out_rather_than_unbalanced() -> None:
    rng = np.random.default_rng(0)
    scene = compose_scene(PICTURES, rng, SceneStyle(canvas_size=64, min_objects=4), CONCEPTS[:4])
    assert ask(scene, rng, {"presence": 2}, CONCEPTS[:4]) == []
    assert len(ask(scene, rng, {"presence": 4}, CONCEPTS[:5])) == 2
