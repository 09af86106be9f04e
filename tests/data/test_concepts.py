from pathlib import Path

import pytest

from mmfoundry.data.concepts import Concept, indefinite, read_concepts
from mmfoundry.pipeline.errors import DamagedInput, MissingInput
from tests.data.drawn import concept

HEADER = "file,name,noun,synonyms,kind,category,subcategory,split,question,adapt\n"


def table(tmp_path: Path, *rows: str) -> Path:
    path = tmp_path / "concepts.csv"
    path.write_text(HEADER + "".join(f"{row}\n" for row in rows), encoding="utf-8")
    return path


def test_a_row_becomes_a_concept(tmp_path: Path) -> None:
    path = table(tmp_path, '1.png,hot dog,a,frankfurter; wiener,food,"Food, Drink",prepared,heldout,,yes')
    (found,) = read_concepts(path)
    assert found.names == ("hot dog", "frankfurter", "wiener")
    assert (found.category, found.split, found.question, found.adapt) == ("Food, Drink", "heldout", False, True)
    assert found.phrase == "a hot dog"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("1.png,dog,a,,animal,x,y,test,,", "line 2: split is 'test'"),
        ("1.png,dog,der,,animal,x,y,train,,", "line 2: noun is 'der'"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: str, says: str) -> None:
    with pytest.raises(DamagedInput, match=says):
        read_concepts(table(tmp_path, row))


def test_a_name_must_not_come_twice(tmp_path: Path) -> None:
    rows = ("1.png,dog,a,hound,animal,x,y,train,,", "2.png,hound,a,,animal,x,y,train,,")
    with pytest.raises(DamagedInput, match="'hound' comes twice"):
        read_concepts(table(tmp_path, *rows))


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match=r"nothing\.csv"):
        read_concepts(tmp_path / "nothing.csv")


@pytest.mark.parametrize(
    ("noun", "phrase"), [("a", "a thing1"), ("mass", "thing1"), ("plural", "thing1"), ("the", "the thing1")]
)
def test_names_take_the_article_of_their_noun(noun: str, phrase: str) -> None:
    assert concept(1, noun=noun).phrase == phrase


def test_articles_follow_the_sound() -> None:
    assert [indefinite(word) for word in ("owl", "unicorn", "dog")] == ["an owl", "a unicorn", "a dog"]


def test_json_gives_the_concept_back() -> None:
    assert Concept.from_json(concept(4).as_json()) == concept(4)
    with pytest.raises(DamagedInput, match="noun"):
        Concept.from_json({"concept": "dog"})


def test_slugs_have_no_dots_or_spaces() -> None:
    assert concept(1, name="jack-o'-lantern no. 2").slug == "jack-o-lantern-no-2"
