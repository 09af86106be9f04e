"""Every DataComp baseline, on a drawn pool of its format: our subset is the row-by-row reference's, uid for uid."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmfoundry.data.derived.base import sources_of
from mmfoundry.data.filters.passes import judge_parts
from mmfoundry.data.filters.plan import steps_of
from mmfoundry.data.filters.tree import parse_filter
from mmfoundry.data.parts import metadata_parts
from mmfoundry.data.wordnet import load_wordnet
from tests.data.filters import datacomp_reference as reference
from tests.data.filters.datacomp_pool import embeddings, write_pool
from tests.data.filters.datacomp_reference import Row, read_rows
from tests.data.filters.nltk_wordnet import nltk_reader
from tests.data.filters.small_wordnet import offset_of, write_wordnet

WIDTH = 8  # of the drawn embeddings


@dataclass(frozen=True)
class World:
    """A pool and what filters read besides it."""

    files: list[Path]
    rows: list[Row]
    wordnet: Path
    synsets: Path
    centroids: Path
    target: Path

    def image_based(self) -> dict[str, Any]:
        return {"image_based": {"reference": str(self.target), "centroids": str(self.centroids)}}


def make_world(folder: Path, rows: int, files: int) -> World:
    paths = write_pool(folder / "pool", rows, files, seed=3, width=WIDTH)
    wordnet = write_wordnet(folder / "wordnet")
    wanted = [offset_of(wordnet, "noun", name) for name in ("dog", "church", "woman", "knife")]
    # an offset that only a verb has: DataComp looks at numbers alone
    wanted.append(offset_of(wordnet, "verb", "walk"))
    (folder / "ids.txt").write_text("".join(f"n{offset:08d}\n" for offset in wanted))
    draw = np.random.default_rng(5)
    np.save(folder / "centroids.npy", draw.normal(size=(20, WIDTH)).astype(np.float32))
    np.save(folder / "target.npy", embeddings(draw, 4, WIDTH))
    return World(paths, read_rows(paths), wordnet, folder / "ids.txt", folder / "centroids.npy", folder / "target.npy")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("datacomp"), rows=4000, files=3)


def ours(files: Sequence[Path], tree: Any) -> list[str]:
    """The uids that a tree keeps of a pool's parts."""
    one = parse_filter(tree)
    steps = steps_of(one)
    columns = sources_of({"uid", "unreadable", "shard", "index"}.union(*(step.columns() for _, step in steps)))
    parts, damaged = metadata_parts(files, columns)
    assert not damaged
    tables = [part.read(columns) for part in parts]
    plan, standings = judge_parts(steps, tables, alone=False)
    kept = []
    for table, standing in zip(tables, standings, strict=True):
        mask = [verdict.of(standing.verdicts).fill_null(False).to_numpy() for verdict in plan.in_sequence]
        kept += table["uid"].filter(np.logical_and.reduce(mask)).to_list()
    return sorted(kept)


@cache
def fasttext(line: str) -> str:
    from mmfoundry.data.derived.language import _fasttext

    labels, _ = _fasttext().predict(line)
    return labels[0].removeprefix("__label__")


def cld3(line: str) -> str:
    gcld3 = pytest.importorskip("gcld3", reason="CLD3 is not installed (pip install cld3-py)")
    return gcld3.NNetLanguageIdentifier(min_num_bytes=0, max_num_bytes=1000).FindLanguage(text=line).language


def synsets_in(folder: Path) -> Callable[[str], list[int]]:
    """All synsets of a word by NLTK where it is there, otherwise the first by our own reading of WordNet."""
    try:
        reader = nltk_reader(folder)
    except ImportError:
        wordnet = load_wordnet(folder)
        return lambda word: [found] if (found := wordnet.first_synset(word)) is not None else []
    return lambda word: [synset.offset() for synset in reader.synsets(word)]


def ids_in(path: Path) -> list[int]:
    return [int(line[1:]) for line in path.read_text().split()]


L14, B32 = "clip_l14_similarity_score", "clip_b32_similarity_score"
BASELINES: dict[str, tuple[Callable[[World], Any], Callable[[World], list[str]]]] = {
    "basic": (lambda _: "basic", lambda world: reference.basic(world.rows, fasttext)),
    "clip_score threshold": (
        lambda _: {"clip_score": {"min": 0.25, "model": "b32"}},
        lambda world: reference.clip_score(world.rows, B32, 0.25),
    ),
    # in double precision a score of float32(0.29) would be below it
    "clip_score threshold l14": (
        lambda _: {"clip_score": {"min": 0.29, "model": "l14"}},
        lambda world: reference.clip_score(world.rows, L14, 0.29),
    ),
    **{
        f"clip_score top {fraction} {model}": (
            lambda _, fraction=fraction, model=model: {"clip_score": {"top": fraction, "model": model}},
            lambda world, fraction=fraction, key=key: reference.clip_score(
                world.rows, key, reference.threshold_of(world.rows, key, fraction)
            ),
        )
        for fraction in (0.1, 0.3, 0.9999, 1.0)
        for model, key in (("l14", L14), ("b32", B32))
    },
    "laion2b": (lambda _: "laion2b", lambda world: reference.laion2b(world.rows, cld3)),
    "text_based": (
        lambda world: {"text_based": {"wordnet": str(world.wordnet), "synsets": str(world.synsets)}},
        lambda world: reference.text_based(world.rows, fasttext, synsets_in(world.wordnet), ids_in(world.synsets)),
    ),
    "image_based": (
        lambda world: {"all": ["caption", world.image_based()]},
        lambda world: reference.image_based(world.rows, fasttext, np.load(world.centroids), np.load(world.target)),
    ),
    # DataComp-1B
    "image_based and clip_score": (
        lambda world: {"all": [{"clip_score": {"top": 0.3, "model": "l14"}}, "caption", world.image_based()]},
        lambda world: sorted(
            set(reference.image_based(world.rows, fasttext, np.load(world.centroids), np.load(world.target)))
            & set(reference.clip_score(world.rows, L14, reference.threshold_of(world.rows, L14, 0.3)))
        ),
    ),
}


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline(name: str, world: World) -> None:
    tree, expected = (one(world) for one in BASELINES[name])
    kept = ours(world.files, tree)
    assert kept == sorted(expected)
    if "0.9999" not in name:  # there the score at the place is not a number, so DataComp keeps nothing
        assert 0.02 < len(kept) / len(world.rows) < 1
    else:
        assert not kept


def test_edge_cases_are_on_both_sides(world: World) -> None:
    """The pool has rows that each rule alone decides, so that a wrong limit would show."""
    by_text = {row["text"]: row for row in world.rows[:60]}
    texts = {text for text in by_text if text is not None}
    assert {"a b c", "a bc d", "a dog", "a\u00a0big\u00a0dog"} <= texts
    assert [len(reference.tokens(text)) for text in ("a\u00a0big\u00a0dog", "a\nb", "\n", "a\x00b")] == [1, 3, 1, 2]


@pytest.mark.slow
def test_200000_rows(tmp_path: Path) -> None:
    world = make_world(tmp_path, rows=200_000, files=5)
    for name, (tree, expected) in BASELINES.items():
        assert ours(world.files, tree(world)) == sorted(expected(world)), name
