"""stages/filter.py on DataComp's metadata: no tars, many parts, and work that is not done twice."""

import json
from collections.abc import Callable
from multiprocessing import reduction
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from mmfoundry.data import crew, filter_jobs, near_rows, parts
from mmfoundry.data.derived import language
from mmfoundry.data.filters import semantic as semantic_filter
from mmfoundry.data.filters.sample import CapPerCluster
from mmfoundry.data.filters.subset import read_subset
from mmfoundry.data.parts import MetadataPart
from mmfoundry.pipeline.artifact import Artifact
from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.distributed import Runtime
from mmfoundry.pipeline.errors import MmfoundryError, TooManyUnreadable, UnknownColumn
from mmfoundry.pipeline.stage import run_stage
from mmfoundry.stages import filter_passes
from mmfoundry.stages.filter import STAGE, FilterConfig
from tests.data.derived.small_fasttext import write_model
from tests.data.filters.datacomp_pool import write_pool

ROWS, FILES = 120, 3
TREE = {"all": ["basic", {"clip_score": {"top": 0.5, "model": "l14"}}]}


def make_pool(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    texts = ["a dog runs along the beach", "ein Hund läuft am Strand entlang", "dog", None, ""]
    for number in range(FILES):
        rows = range(number * ROWS // FILES, (number + 1) * ROWS // FILES)
        table = pl.DataFrame(
            {
                "uid": [f"{7919 * row % 1000:032x}" for row in rows],
                "url": [f"https://images.example/{row}.jpg" for row in rows],
                "text": [texts[row % 7 % 5] for row in rows],
                "original_width": [(640, 190, 900)[row % 3] for row in rows],
                "original_height": [400 for _ in rows],
                "clip_l14_similarity_score": rng.uniform(0, 0.4, len(rows)),
            }
        )
        folder.mkdir(parents=True, exist_ok=True)
        table.write_parquet(folder / f"{number}.parquet")
    return folder


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    return make_pool(tmp_path / "metadata")


def run(pool: Path, output: Path, **changes: Any) -> Artifact:
    tree = {"pool": str(pool), "filters": TREE, "num_workers": 1} | changes
    return run_stage(STAGE, parse(FilterConfig, tree), output, Runtime())


def payload(artifact: Artifact) -> dict[str, bytes]:
    files = [p for p in sorted(artifact.path.rglob("*")) if p.suffix in (".parquet", ".npy", ".json")]
    return {str(p.relative_to(artifact.path)): p.read_bytes() for p in files if p.name != "manifest.json"}


def by_hand(pool: Path) -> list[str]:
    """basic, then the better half, row by row."""
    rows = [row for n in range(FILES) for row in pl.read_parquet(pool / f"{n}.parquet").to_dicts()]
    left = [
        row
        for row in rows
        if row["text"] == "a dog runs along the beach" and min(row["original_width"], row["original_height"]) >= 200
    ]
    scores = sorted((row["clip_l14_similarity_score"] for row in left), reverse=True)
    threshold = scores[int(len(scores) * 0.5)]
    return sorted(row["uid"] for row in left if row["clip_l14_similarity_score"] >= threshold)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_metadata_folder_is_a_pool(pool: Path, tmp_path: Path, alone: bool, num_workers: int) -> None:
    made = run(pool, tmp_path / "out", alone=alone, num_workers=num_workers)
    expected = by_hand(pool)
    assert 5 < len(expected) < 40
    assert read_subset(made.path / "subset.npy") == expected
    kept = pl.read_parquet(made.path / "kept" / "*.parquet")
    dropped = pl.read_parquet(made.path / "dropped" / "*.parquet")
    assert sorted(kept["uid"]) == expected
    assert kept["language"].to_list() == ["en"] * len(expected)
    assert sorted([*kept["uid"], *dropped["uid"]]) == sorted(f"{7919 * row % 1000:032x}" for row in range(ROWS))
    funnel = json.loads((made.path / "funnel.json").read_text())
    assert (funnel["samples"], funnel["kept"], funnel["shards"]) == (
        ROWS,
        len(expected),
        [f"{n}.parquet" for n in range(3)],
    )
    assert (funnel["overlap"] is None) == (not alone)
    assert not (made.path / "shards").exists()


def test_a_list_of_filters_means_all_of_them(pool: Path) -> None:
    config = parse(FilterConfig, {"pool": str(pool), "filters": ["basic", {"near_duplicate": 3}]})
    assert config == parse(FilterConfig, {"pool": str(pool), "filters": {"all": ["basic", {"near_duplicate": 3}]}})
    with pytest.raises(MmfoundryError, match="give a list of filters"):
        parse(FilterConfig, {"pool": str(pool), "filters": []})


def test_how_the_pool_is_cut_changes_nothing(pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(pool, tmp_path / "whole")
    monkeypatch.setattr(parts, "MAX_ROWS", 17)
    cut = run(pool, tmp_path / "cut")
    assert (cut.path / "subset.npy").read_bytes() == (whole.path / "subset.npy").read_bytes()
    assert (cut.path / "funnel.json").read_bytes() == (whole.path / "funnel.json").read_bytes()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_language_model_of_the_users_own(pool: Path, tmp_path: Path, num_workers: int) -> None:
    """Its guesses count, and those of another model are not taken for them."""
    changes = {"num_workers": num_workers, "cache_dir": str(tmp_path / "cache"), "filters": {"basic": {}}}

    def captions(output: str, **more: Any) -> set[str]:
        made = run(pool, tmp_path / output, **changes, **more)
        kept = pl.read_parquet(made.path / "kept" / "*.parquet")
        assert set(kept["language"]) == {"en"}
        return set(kept["caption"])

    english, german = "a dog runs along the beach", "ein Hund läuft am Strand entlang"
    assert captions("packaged") == {english}
    model = write_model(tmp_path / "lid.bin", {"dog": "de", "Hund": "en"})
    assert captions("own", language_model=str(model)) == {german}
    write_model(model, {"dog": "en", "Hund": "en"})
    assert captions("own", language_model=str(model)) == {english, german}
    assert "language_model" in Artifact.open(tmp_path / "own").manifest.inputs


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many captions each call to the language model was about."""
    counts: list[int] = []
    real = language._guesses

    def counting(captions: Any, *model: Any) -> Any:
        counts.append(len(captions))
        return real(captions, *model)

    monkeypatch.setattr(language, "_guesses", counting)
    return counts


def test_what_is_dear_is_asked_only_of_what_is_left(pool: Path, tmp_path: Path, looked_at: list[int]) -> None:
    run(pool, tmp_path / "out", alone=False)
    passes = (pl.col("text").str.split(" ").list.len() > 2) & (
        pl.min_horizontal("original_width", "original_height") >= 200
    )
    texts = [pl.read_parquet(pool / f"{n}.parquet").filter(passes)["text"] for n in range(FILES)]
    assert looked_at == [of_part.n_unique() for of_part in texts], "each caption once a part"
    assert sum(looked_at) < sum(map(len, texts)) < ROWS


def test_a_changed_filter_repeats_only_what_depends_on_it(pool: Path, tmp_path: Path, looked_at: list[int]) -> None:
    first = run(pool, tmp_path / "out", alone=False)
    assert looked_at
    looked_at.clear()
    tree = {"all": ["basic", {"clip_score": {"top": 0.9, "model": "l14"}}]}
    second = run(pool, tmp_path / "out", alone=False, filters=tree)
    assert looked_at == [], "the languages were known"
    assert second.manifest.metrics["kept"] > first.manifest.metrics["kept"]
    assert payload(second) == payload(run(pool, tmp_path / "anew", alone=False, filters=tree))
    looked_at.clear()
    run(pool, tmp_path / "out", alone=False, filters={"all": [{"basic": {"min_words": 4}}]})
    assert sum(looked_at) > 0, "other rows reach the language now"


def test_a_run_cut_off_in_any_job_goes_on(pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = payload(run(pool, tmp_path / "whole"))
    tasks: dict[str, Callable[..., Any]] = {
        name: getattr(filter_jobs, name) for name in ("take_pass", "merge", "count")
    }
    left = 0  # jobs that may be done before the run is cut off

    def counted(name: str) -> Callable[..., Any]:
        def call(*job: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return tasks[name](*job)

        return call

    for name in tasks:
        monkeypatch.setattr(filter_passes, name, counted(name))
    stops = 0
    for allowed in range(100):
        left = allowed
        try:
            made = run(pool, tmp_path / "cut")
        except KeyboardInterrupt:
            stops += 1
            continue
        assert payload(made) == expected
        break
    assert stops >= 15, "every run ended one job later than the one before"


def test_merges_are_shared_out_cut_off_and_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Near duplicates: workers search bands and clusters, and whoever does it, however often, writes the same."""
    pool = tmp_path / "pool"
    write_pool(pool, 1500, files=2, width=8, names=("b32_img",), hashes=True)
    semantic = {"semantic_duplicate": {"num_clusters": 9, "iterations": 3}}
    tree = {"any": [{"all": ["caption_near_duplicate", "near_duplicate"]}, semantic]}
    settings = {"filters": tree, "alone": True, "max_unreadable": 0.9}
    expected = payload(run(pool, tmp_path / "whole", **settings))
    monkeypatch.setattr(near_rows, "SHARED", 100)
    monkeypatch.setattr(semantic_filter, "_BUCKET_BYTES", 20_000)
    assert payload(run(pool, tmp_path / "two", **settings, num_workers=2)) == expected
    make, done, left = crew._make, 0, 0  # jobs that are done in all, and that may be before the run is cut off

    def counted(task: Callable[..., Any], piece: Any) -> None:
        nonlocal done, left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        before = piece.place.exists()
        make(task, piece)
        done += not before

    monkeypatch.setattr(crew, "_make", counted)
    for allowed in (1, 25, 60):
        left = allowed
        with pytest.raises(KeyboardInterrupt):
            run(pool, tmp_path / "cut", **settings)
    left = 10**6
    made = run(pool, tmp_path / "cut", **settings)
    assert payload(made) == expected
    assert not (tmp_path / "cut.cache" / "merging").exists() or not list((tmp_path / "cut.cache" / "merging").iterdir())
    once = done
    run(pool, tmp_path / "again", **settings)
    assert done == 2 * once, "nothing was done twice for being cut off"


def test_a_partial_that_was_cut_short_is_made_again(pool: Path, tmp_path: Path) -> None:
    expected = payload(run(pool, tmp_path / "whole"))
    run(pool, tmp_path / "out")
    made = [path for path in sorted((tmp_path / "out.cache").rglob("*.*")) if path.suffix in (".arrow", ".parquet")]
    assert len(made) > 10
    for path in made[::2]:
        path.write_bytes(path.read_bytes()[:-7])
    assert payload(run(pool, tmp_path / "again", cache_dir=str(tmp_path / "out.cache"))) == expected


def test_rows_and_files_that_cannot_be_used_are_counted(pool: Path, tmp_path: Path) -> None:
    table = pl.read_parquet(pool / "0.parquet")
    table.with_columns(uid=pl.Series([None, "no hex", *table["uid"][2:]])).write_parquet(pool / "0.parquet")
    made = run(pool, tmp_path / "some", max_unreadable=0.1)
    funnel = json.loads((made.path / "funnel.json").read_text())
    assert funnel["unreadable"] == {"uid is not 32 hex digits": 2}
    (pool / "1.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(TooManyUnreadable, match=r"40 x metadata file cannot be read; for one, .*1\.parquet"):
        run(pool, tmp_path / "broken", max_unreadable=0.1)
    made = run(pool, tmp_path / "half", max_unreadable=0.5)
    funnel = json.loads((made.path / "funnel.json").read_text())
    assert funnel["damaged"] == {"metadata file cannot be read": 40}
    assert made.manifest.metrics["samples"] == ROWS


def test_repeated_uids_and_conflicts_are_told(pool: Path, tmp_path: Path) -> None:
    table = pl.read_parquet(pool / "0.parquet")
    pl.concat([table[:2], table[:1].with_columns(text=pl.lit("another text for it"))]).write_parquet(pool / "9.parquet")
    funnel = json.loads((run(pool, tmp_path / "out").path / "funnel.json").read_text())
    found = funnel["repeated_uids"]
    assert (found["uids"], found["samples"], found["conflicting"]) == (2, 5, 1)
    assert found["examples"] == [table["uid"][0]]
    assert funnel["filters"][1]["sequence"]["dropped"] == 3


def test_repeated_uids_cost_a_pass_and_change_nothing_else(pool: Path, tmp_path: Path) -> None:
    """A uid that comes twice, dropped where it comes again, leaves what would have been kept without it."""
    expected = read_subset(run(pool, tmp_path / "once").path / "subset.npy")
    again = pl.concat([pl.read_parquet(pool / f"{number}.parquet") for number in range(FILES)])[::3]
    again.with_columns(clip_l14_similarity_score=pl.lit(0.9)).write_parquet(pool / "9.parquet")
    for alone in (True, False):
        made = run(pool, tmp_path / f"twice-{alone}", alone=alone)
        assert read_subset(made.path / "subset.npy") == expected
    late = {"all": [*TREE["all"], "unique_uid"]}
    assert len(read_subset(run(pool, tmp_path / "late", filters=late).path / "subset.npy")) >= len(expected)


@pytest.mark.parametrize("what", ["as it is", "no uid", "a uid twice"])
def test_without_tables_subset_and_account_are_the_same(pool: Path, tmp_path: Path, what: str) -> None:
    table = pl.read_parquet(pool / "0.parquet")
    if what == "no uid":
        table = table.with_columns(uid=pl.Series([None, "no hex", *table["uid"][2:]]))
    if what == "a uid twice":
        table = table.with_columns(uid=pl.Series([table["uid"][9], *table["uid"][1:]]))
    table.write_parquet(pool / "0.parquet")
    for alone in (True, False):
        both = [
            run(pool, tmp_path / f"{alone}-{tables}", alone=alone, tables=tables, max_unreadable=0.1)
            for tables in (True, False)
        ]
        assert not (both[1].path / "kept").exists()
        for name in ("subset.npy", "funnel.json"):
            assert (both[0].path / name).read_bytes() == (both[1].path / name).read_bytes(), name


@pytest.mark.parametrize("dear", [True, False])
def test_the_last_verdicts_are_kept_where_they_are_dear(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dear: bool
) -> None:
    monkeypatch.setattr(CapPerCluster, "dear", dear)
    tree = {"all": ["basic", {"cap_per_cluster": {"column": "language", "count": 5}}]}
    made = run(pool, tmp_path / "out", alone=False, filters=tree)
    kept = {path.name.rpartition("-")[2] for path in (tmp_path / "out.cache" / "verdicts").iterdir()}
    assert kept == ({"0", "1"} if dear else {"0"})
    again = run(pool, tmp_path / "again", alone=False, filters=tree, cache_dir=str(tmp_path / "out.cache"))
    assert payload(again) == payload(made)


def test_columns_that_only_images_tell(pool: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownColumn, match=r"0\.parquet: a filter reads pixel_deviation, which has to be computed"):
        run(pool, tmp_path / "out", filters={"not_blank": None})


def test_nothing_kept(pool: Path, tmp_path: Path) -> None:
    with pytest.raises(MmfoundryError, match="no sample of 120 passes"):
        run(pool, tmp_path / "out", filters={"expression": "width > 5000"})


def test_parts_are_sent_to_workers_without_their_rows() -> None:
    part = MetadataPart(0, "a.parquet", "0" * 32, Path("a.parquet"), 0, 10)
    assert len(reduction.ForkingPickler.dumps(part)) < 500
