"""The evaluations end to end, on coloured squares and on models that know colours, or do not."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmfoundry.data.reader import Pool
from mmfoundry.data.shards import write_shards
from mmfoundry.evals.answer_loss import read_conversations
from mmfoundry.evals.questions import Score, Talk
from mmfoundry.evals.samples import Samples, select
from mmfoundry.evals.suite import load_suite, parse_task, selections
from mmfoundry.evals.task import EVAL_TASKS, Bench, Clip, Selection, TaskResult, Vlm
from mmfoundry.pipeline.errors import ConfigError, DamagedInput, MissingInput

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
SPLITS = ("train", "heldout")


def square(colour: str, shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (20, 20), tuple(max(0, value - shade) for value in COLOURS[colour])).save(out, "PNG")
    return out.getvalue()


def squares() -> list[dict]:
    samples = []
    for number in range(80):
        name = list(COLOURS)[number % 4]
        other = list(COLOURS)[(number + 1) % 4]
        is_yes = number // 4 % 2 == 0
        meta = {
            "colour": name,
            "split": SPLITS[number // 4 % 2],
            "captions": [f"{name} number {number}", f"picture {number}: {name}"],
            "hard_negatives": [f"{other} number {number}", f"{other} picture"],
            "hard_negative_kinds": ["replace", ""],
            "questions": [
                {"type": "what", "question": "Which colour?", "answer": name},
                {
                    "type": "presence",
                    "question": f"Is it {name if is_yes else other}?",
                    "answer": "yes" if is_yes else "no",
                },
            ],
        }
        samples.append({"__key__": f"{number:03}", "png": square(name, number // 4), "json": meta})
    return samples


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    folder = tmp_path_factory.mktemp("squares")
    write_shards(squares(), folder, max_count=30)
    return Pool(folder)


def knows_colours() -> Clip:
    """Embeds a picture by its hue and a text by the colour in it; whatever else the text says shifts it a little."""
    table = torch.tensor(list(COLOURS.values())) / 255 - 0.5

    def encode_image(pictures: torch.Tensor) -> torch.Tensor:
        mean = pictures.float().mean(dim=(2, 3))
        return torch.nn.functional.normalize(mean / mean.amax(1, keepdim=True) - 0.5, dim=1)

    def encode_text(texts: list[str]) -> torch.Tensor:
        rows = []
        for text in texts:
            row = sum((table[i] for i, name in enumerate(COLOURS) if name in text), torch.zeros(3))
            rows.append(row + 0.01 * torch.tensor([math.sin(len(text) + sum(map(ord, text)) + i) for i in range(3)]))
        return torch.nn.functional.normalize(torch.stack(rows), dim=1)

    return Clip(encode_image, encode_text, image_size=8)


def knows_nothing() -> Clip:
    generator = torch.Generator().manual_seed(0)

    def random_rows(things: torch.Tensor | list[str]) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(len(things), 3, generator=generator), dim=1)

    return Clip(random_rows, random_rows, image_size=8)


def sees_colours(pictures: list[np.ndarray], questions: list[str], picture_of: list[int]) -> list[str]:
    answers = []
    for picture, question in zip([pictures[i] for i in picture_of], questions, strict=True):
        pixel = picture[0, 0].astype(int)
        name = min(COLOURS, key=lambda each: np.abs(np.array(COLOURS[each]) * (pixel.max() / 255) - pixel).sum())
        answers.append(f"{name.capitalize()}." if question == "Which colour?" else "Yes" if name in question else "No.")
    return answers


def always_yes(pictures: list[np.ndarray], questions: list[str], picture_of: list[int]) -> list[str]:
    return ["yes"] * len(questions)


def foresees(nats: float) -> Score:
    """A token a letter, each as hard as another; vowels are foreseen."""

    def score(talks: list[Talk]) -> np.ndarray:
        said = ["".join(turn[-1]["content"] for turn in talk.conversations) for talk in talks]
        return np.array([[nats * len(text), len(text), sum(map(text.count, "aeiou"))] for text in said])

    return score


def measure(pool: Pool, tree: dict, **bench: object) -> TaskResult:
    def opened(selection: Selection) -> Samples:
        return select(pool, selection.where, selection.limit)

    ready = {"clip": knows_colours(), "untrained_clip": knows_nothing()} | {
        "vlm": Vlm(sees_colours, foresees(0.5)),
        "untrained_vlm": Vlm(always_yes, foresees(2.0)),
    }
    return parse_task("it", tree).run("it", Bench(open=opened, **(ready | bench)))


def rows_of(result: TaskResult) -> dict[str, tuple]:
    return {row.metric: (row.value, row.chance, row.constant) for row in result.rows}


HELDOUT = {"data": "squares", "where": {"split": "heldout"}}


def test_zero_shot(pool: Pool) -> None:
    tree = {
        "task": "zero_shot",
        "pictures": HELDOUT,
        "label": "colour",
        "templates": ["a {} thing", "{}"],
        "top": [1, 2],
    }
    result = measure(pool, tree)
    assert rows_of(result) == {
        "it_top1": (1.0, 0.25, 0.25),
        "it_top2": (1.0, 0.5, 0.5),
        "it_mean_per_class_recall": (1.0, 0.25, 0.25),
    }
    assert result.rows[0].untrained < 0.6
    assert (result.rows[0].n, result.rows[0].low, result.rows[0].high) == (40, 1.0, 1.0)
    assert result.predictions[0]["top"][0] == result.predictions[0]["label"] == "red"
    assert sorted(result.predictions[0]["top"]) == sorted(COLOURS)
    # more candidate classes than the pictures have: chance falls, a class without a picture is no row of the recall
    wide = measure(pool, tree | {"pictures": HELDOUT | {"where": {"colour": ["red", "blue"]}}, "labels_among": HELDOUT})
    assert rows_of(wide)["it_top1"] == (1.0, 0.25, 0.5)


def test_class_embeddings_average_normalised_prompts() -> None:
    from mmfoundry.evals.zero_shot import class_embeddings

    raw = {"a x": [3.0, 0.0], "b x": [0.0, 1.0], "a y": [-1.0, 0.0], "b y": [0.0, -5.0]}
    clip = Clip(lambda p: p, lambda texts: torch.tensor([raw[text] for text in texts]), 8)
    half = math.sqrt(0.5)  # CLIP_benchmark's rule: each prompt counts alike, however long its vector is
    np.testing.assert_allclose(class_embeddings(clip, ["x", "y"], ["a {}", "b {}"]), [[half, half], [-half, -half]])


def test_linear_probe(pool: Pool) -> None:
    train = {"data": "squares", "where": {"split": "train"}}
    result = measure(
        pool, {"task": "linear_probe", "train": train, "test": HELDOUT, "label": "colour", "cluster_by": "colour"}
    )
    assert rows_of(result) == {"it": (1.0, 0.25, 0.25)}
    assert result.rows[0].untrained < 0.6
    with pytest.raises(ConfigError, match="one class only"):
        measure(pool, {"task": "linear_probe", "train": train, "test": HELDOUT, "label": "split"} | {"test": train})


def test_retrieval_knows_the_colour_but_not_which_of_its_pictures(pool: Pool) -> None:
    result = measure(pool, {"task": "retrieval", "scenes": {"data": "squares"}, "ks": [1, 80]})
    found = rows_of(result)
    assert found["image_to_text_r80"][0] == found["text_to_image_r80"][0] == 1.0
    assert found["text_to_image_r80"][1] == 1.0
    assert 0 <= found["image_to_text_r1"][0] < 0.3
    assert found["text_to_image_r1"][1:] == pytest.approx((1 / 80, 1 / 80))
    assert all("red" in text for text in result.predictions[0]["found_captions"])
    assert len(result.examples[-1].pictures) == 5
    assert len(result.examples[-1].marked) == 5


def test_hard_negatives(pool: Pool) -> None:
    result = measure(pool, {"task": "hard_negatives", "scenes": {"data": "squares"}})
    assert rows_of(result) == {
        "it": pytest.approx((1.0, 1 / 3, 1 / 3)),
        "it_pairwise": (1.0, 0.5, 0.5),
        "it_replace": (1.0, 0.5, 0.5),
    }
    blind = measure(pool, {"task": "hard_negatives", "scenes": {"data": "squares"}}, clip=constant_clip())
    assert rows_of(blind)["it_pairwise"][0] == 0.0  # ties do not count


def constant_clip() -> Clip:
    return Clip(lambda pictures: torch.ones(len(pictures), 3), lambda texts: torch.ones(len(texts), 3), 8)


def test_questions(pool: Pool) -> None:
    tree = {"task": "vqa", "scenes": {"data": "squares"}}
    result = measure(pool, tree)
    assert rows_of(result) == {"it_what": (1.0, 0.25, 0.25), "it_presence": (1.0, 0.5, 0.5)}
    assert {row.metric: row.untrained for row in result.rows} == {"it_what": 0.0, "it_presence": 0.5}
    assert len(result.predictions) == 160
    few = measure(pool, tree | {"types": ["what"], "per_type": 10})
    assert [row.n for row in few.rows] == [10]
    with pytest.raises(DamagedInput, match="smell"):
        measure(pool, tree | {"types": ["smell"]})


def test_pope_asks_nothing_twice(pool: Pool) -> None:
    asked: list[str] = []

    def counting(pictures: list[np.ndarray], questions: list[str], picture_of: list[int]) -> list[str]:
        asked.extend(questions)
        assert set(picture_of) == set(range(len(pictures)))  # each picture once, however much is asked about it
        return always_yes(pictures, questions, picture_of)

    bench = Bench(
        open=lambda selection: select(pool, selection.where, selection.limit), vlm=Vlm(counting, foresees(1.0))
    )
    scenes = {"scenes": {"data": "squares"}}
    parse_task("vqa", {"task": "vqa", **scenes}).run("vqa", bench)
    assert len(asked) == 160
    result = parse_task("pope", {"task": "pope", **scenes}).run("pope", bench)
    assert len(asked) == 160
    assert rows_of(result) == {
        "pope_accuracy": (0.5, 0.5, 0.5),
        "pope_precision": (0.5, 0.5, 0.5),
        "pope_recall": (1.0, 0.5, 1.0),
        "pope_f1": (pytest.approx(2 / 3), 0.5, pytest.approx(2 / 3)),
        "pope_yes_ratio": (1.0, None, None),
    }


def test_answer_loss(pool: Pool) -> None:
    tree = {"task": "answer_loss", "scenes": {"data": "squares"}}
    result = measure(pool, tree)
    said = [each["answer"] for sample in squares() for each in sample["json"]["questions"]]
    letters, vowels = (sum(map(len, said)), sum(sum(map(text.count, "aeiou")) for text in said))
    assert rows_of(result) == {
        "it_loss": (pytest.approx(0.5), None, None),
        "it_token_accuracy": (pytest.approx(vowels / letters), None, None),
    }
    loss, accuracy = result.rows
    assert (loss.unit, loss.n, loss.shown(), accuracy.unit) == ("nats", 80, "0.5000", "share")
    assert loss.untrained == pytest.approx(2.0)
    assert accuracy.low < accuracy.value < accuracy.high  # words differ in their vowels
    few = measure(pool, tree | {"types": ["what"], "per_type": 10, "untrained_pictures": 0})
    assert [(row.n, row.untrained) for row in few.rows] == [(10, None)] * 2
    with pytest.raises(DamagedInput, match="smell"):
        measure(pool, tree | {"types": ["smell"]})


def test_messages_are_scored_where_there_are_no_questions(pool: Pool) -> None:
    asked = select(pool, {"colour": "red"}, limit=2)
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "red"}]
    told, silent = asked.meta[1] | {"questions": [], "messages": turns}, {"colour": "red"}
    samples = Samples(pool, [0, 1, 2], [[]] * 3, [asked.meta[0], told, silent])
    found = read_conversations(samples)
    assert [(row, len(conversations)) for row, conversations in found.items()] == [(0, 2), (1, 1)]
    assert found[1] == [turns]
    assert [*read_conversations(samples, ["what"])] == [0]
    with pytest.raises(DamagedInput, match="no sample has questions or messages"):
        read_conversations(Samples(pool, [2], [[]], [silent]))


@pytest.mark.parametrize("name", sorted(EVAL_TASKS))
def test_a_task_without_its_model_says_so(pool: Pool, name: str) -> None:
    selection = {"data": "squares"}
    fields = {key: selection for key in EVAL_TASKS[name].model_fields if key in ("pictures", "train", "test", "scenes")}
    label = {"label": "colour"} if "label" in EVAL_TASKS[name].model_fields else {}
    with pytest.raises(ConfigError, match=r"`clip`|`vlm`"):
        measure(pool, {"task": name, **fields, **label}, clip=None, vlm=None)


def test_the_shipped_suite_parses_and_names_its_data() -> None:
    tasks = {name: parse_task(name, tree) for name, tree in load_suite("emoji").items()}
    named = {selection.data for task in tasks.values() for selection in selections(task)}
    assert named == {"pictures", "scenes", "questions"}
    lossless = {*EVAL_TASKS} - {"answer_loss"}  # which says little without the loss of the training beside it
    assert {type(task) for task in tasks.values()} == {EVAL_TASKS[name] for name in lossless}
    with pytest.raises(ConfigError, match=r"unknown suite 'emojy'; did you mean emoji\?"):
        load_suite("emojy")
    with pytest.raises(ConfigError, match=r"tasks.it.lable is not a known key; did you mean label\?"):
        parse_task("it", {"task": "zero_shot", "pictures": {"data": "p"}, "lable": "x"})


def test_samples_that_cannot_be_read_or_found(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="colour=pink"):
        select(pool, {"colour": "pink"})
    with pytest.raises(DamagedInput, match="has no 'name'"):
        select(pool, {}).field("name")
    broken = squares()[:3]
    broken[1]["png"] = broken[1]["png"][:60]
    write_shards(broken, tmp_path)
    samples = select(Pool(tmp_path), {})
    with pytest.raises(DamagedInput, match=r"sample 001.*every sample"):
        samples.picture(1)
    assert json.loads(json.dumps(samples.meta[0]))["colour"] == "red"
