"""The table of things that the sample pictures show, and how English names them."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from mmfoundry.pipeline.errors import DamagedInput, MissingInput

Split = Literal["train", "heldout"]
# How a name is used: "a dog", "an owl", "some rice" (mass), "some grapes" (plural), "the statue of liberty".
Noun = Literal["a", "an", "mass", "plural", "the"]
STYLES = ("noto", "twemoji")


@dataclass(frozen=True, kw_only=True)
class Concept:
    """One nameable thing.

    Attributes:
        name: lower-case English, unique in the table.
        noun: how the name takes an article.
        synonyms: further names; may be empty. No two concepts share one.
        kind: plain word for its category ("animal", "food"), as asked for and answered in questions.
        category: top category of the picture's source (10 of them, e.g. "Food & Drink").
        subcategory: the source's finer one, e.g. "food-fruit".
        split: whether a model may be trained on it; by concept, the same for every picture of it.
        question: one of the few that questions are asked about.
        adapt: held out, and used to show adaptation to new names.
        file: name of its picture in the source packages, e.g. "1f34e.png".
    """

    name: str
    noun: Noun
    synonyms: tuple[str, ...]
    kind: str
    category: str
    subcategory: str
    split: Split
    question: bool
    adapt: bool
    file: str

    @property
    def names(self) -> tuple[str, ...]:
        """The name, then the synonyms."""
        return (self.name, *self.synonyms)

    @property
    def phrase(self) -> str:
        """The name as a noun phrase: "a dog", "an owl", "rice", "grapes", "the statue of liberty"."""
        return with_article(self.name, self.noun)

    @property
    def slug(self) -> str:
        """The name with nothing but letters, digits and dashes; used in keys."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.name).split())

    def as_json(self) -> dict[str, Any]:
        """What a picture's JSON says about its concept; read back by `from_json`."""
        return {
            "concept": self.name,
            "names": list(self.names),
            "noun": self.noun,
            "kind": self.kind,
            "category": self.category,
            "subcategory": self.subcategory,
            "split": self.split,
            "question_concept": self.question,
            "adapt_concept": self.adapt,
            "file": self.file,
        }

    @classmethod
    def from_json(cls, meta: Mapping[str, Any]) -> "Concept":
        """The concept that a picture's JSON describes.

        Raises:
            DamagedInput: an entry is missing.
        """
        try:
            return cls(
                name=meta["concept"],
                noun=meta["noun"],
                synonyms=tuple(meta["names"][1:]),
                kind=meta["kind"],
                category=meta["category"],
                subcategory=meta["subcategory"],
                split=meta["split"],
                question=meta["question_concept"],
                adapt=meta["adapt_concept"],
                file=meta["file"],
            )
        except KeyError as error:
            raise DamagedInput(f"a picture's JSON lacks {error}; it is not from a pictures-*.tar") from error


def with_article(name: str, noun: Noun) -> str:
    """A name as it stands in a sentence: "a dog", "an owl", "rice", "the statue of liberty"."""
    return name if noun in ("mass", "plural") else f"{noun} {name}"


def indefinite(word: str) -> str:
    """A word with the article that its sound calls for; for names that the table has no article for."""
    return f"an {word}" if word[:1] in "aeiou" and not word.startswith("uni") else f"a {word}"


def read_concepts(path: str | Path) -> list[Concept]:
    """The concepts of a table such as `data/samples/concepts.csv`, in its order.

    Raises:
        MissingInput: no such file.
        DamagedInput: a column is missing, a value is not one of those allowed, or a name comes twice.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingInput(f"{path}: no such concept table")
    concepts = []
    with path.open(newline="", encoding="utf-8") as file:
        for line, row in enumerate(csv.DictReader(file), start=2):
            try:
                concepts.append(_concept(row))
            except (KeyError, ValueError) as error:
                raise DamagedInput(f"{path}: line {line}: {error}") from error
    seen: set[str] = set()
    for concept in concepts:
        for name in concept.names:
            if name in seen:
                raise DamagedInput(f"{path}: the name {name!r} comes twice")
            seen.add(name)
    return concepts


def _concept(row: Mapping[str, str]) -> Concept:
    if row["split"] not in ("train", "heldout"):
        raise ValueError(f"split is {row['split']!r}, not train or heldout")
    if row["noun"] not in ("a", "an", "mass", "plural", "the"):
        raise ValueError(f"noun is {row['noun']!r}, not a, an, mass, plural or the")
    return Concept(
        name=row["name"],
        noun=cast(Noun, row["noun"]),
        synonyms=tuple(name.strip() for name in row["synonyms"].split(";") if name.strip()),
        kind=row["kind"],
        category=row["category"],
        subcategory=row["subcategory"],
        split=cast(Split, row["split"]),
        question=row["question"] == "yes",
        adapt=row["adapt"] == "yes",
        file=row["file"],
    )
