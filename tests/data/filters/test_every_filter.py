"""What holds for every registered filter."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from mmfoundry.data.columns import column_named
from mmfoundry.data.filters.base import FILTERS, Filter
from mmfoundry.data.filters.tree import parse_filter
from tests.data.filters.rows import table
from tests.data.filters.small_wordnet import offset_of, write_wordnet

# what a recipe writes where a filter needs a parameter; FOLDER stands for one with the files that `given_files` writes
PARAMETERS = {
    "all": ["readable", {"min_side": 2}],
    "any": ["readable", {"min_side": 2}],
    "not": {"min_side": 2},
    "cap_per_cluster": {"column": "language", "count": 1},
    "clip_score": {"top": 0.5, "model": "b32"},
    "decontaminate": {"evals": "FOLDER/evals.parquet"},
    "expression": "width > 3",
    "image_based": {"reference": "FOLDER/target.npy", "centroids": "FOLDER/centroids.npy"},
    "metaclip": {"entries": "FOLDER/lists/en.txt"},
    "metaclip_worldwide": {"entries": "FOLDER/lists"},
    "names_entity": {"wordnet": "FOLDER/wordnet", "synsets": "FOLDER/ids.txt"},
    "sample": {"count": 1},
    "semantic_duplicate": {"embedding": "l14_img"},
    "text_based": {"wordnet": "FOLDER/wordnet", "synsets": "FOLDER/ids.txt"},
    "top": {"column": "width", "count": 1},
}
READS_IDENTITY_ONLY = ("unique_uid", "readable", "all", "any", "sample")


@pytest.fixture(scope="module", autouse=True)
def given_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The files that filters read besides the table."""
    folder = tmp_path_factory.mktemp("given")
    wordnet = write_wordnet(folder / "wordnet")
    (folder / "ids.txt").write_text(f"n{offset_of(wordnet, 'noun', 'dog'):08d}\n")
    np.save(folder / "target.npy", np.eye(2, dtype=np.float32)[:1])
    np.save(folder / "centroids.npy", np.eye(2, dtype=np.float32))
    (folder / "lists").mkdir()
    (folder / "lists" / "en.txt").write_text("dog\n")
    pl.DataFrame({"sha256": [b"b" * 32], "perceptual_hash": [b"\xff" * 64]}).write_parquet(folder / "evals.parquet")
    FOLDERS.append(folder)
    yield
    FOLDERS.remove(folder)


FOLDERS: list[Path] = []


def parameters(name: str) -> Any:
    text = json.dumps(PARAMETERS.get(name))
    return json.loads(text.replace("FOLDER", str(FOLDERS[-1])))


def make(name: str) -> Filter:
    return parse_filter({name: parameters(name)})


def rows() -> pl.DataFrame:
    seen = {
        "caption": "a dog on a beach",
        "caption_words": 5,
        "caption_characters": 16,
        "language": "en",
        "language_probability": 0.9,
        "width": 300,
        "height": 200,
        "aspect": 1.5,
        "sha256": b"a" * 32,
        "perceptual_hash": bytes(64),
        "pixel_deviation": 30.0,
        "caption_tokens": 5,
        "cld3_language": "en",
        "clip_b32_similarity_score": 0.3,
        "l14_img": [1.0, 0.0],
    }
    other = {"sha256": b"b" * 32, "perceptual_hash": b"\xff" * 64, "clip_b32_similarity_score": 0.1, "width": 1}
    return table(seen, seen | other, {"unreadable": "damaged image"})


@pytest.mark.parametrize("name", sorted(FILTERS))
def test_a_verdict_a_row(name: str) -> None:
    one = make(name)
    before = rows()
    verdict = one.keep(before)
    assert (verdict.dtype, len(verdict)) == (pl.Boolean, 3)
    assert before.equals(rows()), "a filter changed its table"
    assert all(column_named(column) is not None for column in one.columns())
    assert one.scope in ("row", "pool")
    assert verdict.equals(one.keep(before.select("uid", *one.columns() - {"uid"}))), "reads more than it declares"


@pytest.mark.parametrize("name", sorted(FILTERS))
def test_an_empty_table(name: str) -> None:
    assert make(name).keep(rows().clear()).to_list() == []


@pytest.mark.parametrize("name", sorted(FILTERS))
def test_nulls_cannot_be_judged(name: str) -> None:
    """A row with nothing known but its place is kept by no filter on what is unknown, turned around or not."""
    if name in READS_IDENTITY_ONLY:
        pytest.skip("reads what is always known")
    unknown = rows().clear().vstack(table({}, {}).match_to_schema(rows().schema, missing_columns="insert"))
    assert make(name).keep(unknown).to_list() == [None, None]
    assert parse_filter({"not": {name: parameters(name)}}).keep(unknown).to_list() == [None, None]


@pytest.mark.parametrize("name", sorted(FILTERS))
def test_row_filters_judge_each_row_by_itself(name: str) -> None:
    one = make(name)
    if one.scope == "pool":
        pytest.skip("compares rows")
    apart = [one.keep(rows()[[row]])[0] for row in range(3)]
    assert apart == one.keep(rows()).to_list()


def test_every_filter_says_what_it_is_for() -> None:
    assert {"all", "any", "not", "basic", "exact_duplicate", "near_duplicate", "expression"} <= set(FILTERS)
    for row in FILTERS.describe():
        assert row.summary.endswith((".", ":")) or len(row.summary) > 20, row
        for field, info in FILTERS[row.name].model_fields.items():
            assert info.description, f"{row.name}.{field}"
