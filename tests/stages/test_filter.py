"""stages/filter.py: from a pool to curated shards, on the shipped sample pool and on small ones made to fail."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from mmfoundry.data import filter_jobs
from mmfoundry.data.filters.subset import read_subset
from mmfoundry.data.index import drop_index, open_index
from mmfoundry.data.reader import Pool
from mmfoundry.data.sample import to_sample
from mmfoundry.data.shards import write_shards
from mmfoundry.models.clip import CLIP, ClipConfig
from mmfoundry.models.io import save_clip
from mmfoundry.pipeline.artifact import Artifact
from mmfoundry.pipeline.config import load_yaml, parse
from mmfoundry.pipeline.distributed import Runtime
from mmfoundry.pipeline.errors import ConfigError, MissingInput, MmfoundryError, TooManyUnreadable, UnknownColumn
from mmfoundry.pipeline.stage import run_stage, work_folder
from mmfoundry.stages.filter import STAGE, FilterConfig
from tests.data.conftest import encode, samples, smooth
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "configs" / "filter" / "samples.yaml"
TREE = {"all": ["readable", {"basic": {"min_side": 8, "min_words": 2}}, "exact_duplicate"]}
CLIP_CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 16, "width": 16, "heads": 2, "layers": 1},
}


def config(pool: Any, **changes: Any) -> FilterConfig:
    return parse(FilterConfig, {"pool": str(pool), "filters": TREE, "max_unreadable": 0.5} | changes)


def run(pool: Any, output: Path, **changes: Any) -> Artifact:
    return run_stage(STAGE, config(pool, **changes), output, Runtime())


def make_pool(folder: Path, count: int = 30, per_shard: int = 10) -> Path:
    write_shards(samples(count), folder, max_count=per_shard)
    return folder


def payload(artifact: Artifact) -> dict[str, bytes]:
    """Everything the stage wrote, without what tells how the run went and without sidecar indexes."""
    files = [p for p in sorted(artifact.path.rglob("*")) if p.suffix in (".tar", ".parquet", ".npy", ".json")]
    return {str(p.relative_to(artifact.path)): p.read_bytes() for p in files if p.name != "manifest.json"}


@pytest.fixture(scope="module")
def sample_run(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("samples")
    for shard in (ROOT / "data" / "samples").glob("pool-*.tar"):
        shutil.copy(shard, folder)
    tree = load_yaml(RECIPE) | {"pool": str(folder / "pool-*.tar")}
    return run_stage(STAGE, parse(FilterConfig, tree, RECIPE), folder / "filter", Runtime())


def test_sample_pool_is_cleaned(sample_run: Artifact) -> None:
    metrics = sample_run.manifest.metrics
    assert metrics["bad_dropped"] >= 0.9
    assert metrics["good_dropped"] <= 0.05
    funnel = json.loads((sample_run.path / "funnel.json").read_text())
    for kind, found in funnel["truth"]["bad"].items():
        assert found["samples"] >= 10, kind
        if found["seen"]:
            assert metrics[f"bad_dropped_{kind}"] >= 0.8, kind
    assert metrics["kept"] + metrics["dropped"] == metrics["samples"] == 852
    assert set(metrics) >= {"samples_per_second", "unreadable", "captions_kept"}


def test_every_output_tells_the_same(sample_run: Artifact) -> None:
    kept = pl.read_parquet(sample_run.path / "kept" / "*.parquet")
    dropped = pl.read_parquet(sample_run.path / "dropped" / "*.parquet")
    table = pl.read_parquet(sample_run.path / "table" / "*.parquet")
    uids = set(kept["uid"])
    assert not uids & set(dropped["uid"])
    assert uids | set(dropped["uid"]) == set(table["uid"])
    assert read_subset(sample_run.path / "subset.npy") == sorted(uids)
    pool = Pool(sample_run.path / "shards")
    curated = [to_sample(pool.get(number)) for number in range(len(pool))]
    assert {sample.meta["uid"] for sample in curated} == {sample.key for sample in curated} == uids
    captions = {uid: captions for uid, captions in kept.group_by("uid", maintain_order=True).agg("caption").iter_rows()}
    assert {sample.key: sample.text for sample in curated} == captions
    funnel = json.loads((sample_run.path / "funnel.json").read_text())
    steps = [step["name"] for step in funnel["filters"]]
    assert set(dropped["reason"]) <= set(steps)
    counts = dict(dropped["reason"].value_counts().iter_rows())
    assert counts == {s["name"]: s["sequence"]["dropped"] for s in funnel["filters"] if s["sequence"]["dropped"]}
    assert set(dropped["shard"]) | set(kept["shard"]) == set(funnel["shards"])


def test_curated_samples_have_their_own_bytes(sample_run: Artifact) -> None:
    pool = Pool(str(ROOT / "data" / "samples" / "pool-*.tar"), save_index=False)
    images = {}
    for number in range(len(pool)):
        members = pool.get(number).members
        images[json.loads(members["json"])["uid"]] = {k: v for k, v in members.items() if k not in ("json", "txt")}
    curated = Pool(sample_run.path / "shards")
    for number in range(len(curated)):
        raw = curated.get(number)
        assert {k: v for k, v in raw.members.items() if k not in ("json", "txt")} == images[raw.key]


def test_examples_are_pictures_of_what_each_step_did(sample_run: Artifact) -> None:
    examples = pl.read_parquet(sample_run.path / "examples.parquet")
    dropped = dict(pl.read_parquet(sample_run.path / "dropped" / "*.parquet").select("uid", "reason").iter_rows())
    assert examples.height > 100
    for row in examples.iter_rows(named=True):
        assert (row["png"] is None) == (row["unreadable"] is not None)
        if row["png"] is not None:
            assert row["png"].startswith(b"\x89PNG")
        if not row["kept"]:
            assert dropped[row["uid"]] == row["filter"]
    assert examples.filter(~pl.col("kept"))["filter"].n_unique() >= 7


def test_no_filter_reads_truth(sample_run: Artifact, tmp_path: Path) -> None:
    """The same pool without `truth` gives the same subset."""
    pool = Pool(str(ROOT / "data" / "samples" / "pool-*.tar"), save_index=False)

    def told_nothing() -> Any:
        for number in range(len(pool)):
            raw = pool.get(number)
            meta = json.loads(raw.members["json"])
            del meta["truth"]
            yield {"__key__": raw.key, **raw.members, "json": meta}

    write_shards(told_nothing(), tmp_path / "pool")
    blind = run(tmp_path / "pool", tmp_path / "filter", filters=load_yaml(RECIPE)["filters"])
    assert (blind.path / "subset.npy").read_bytes() == (sample_run.path / "subset.npy").read_bytes()
    assert "bad_dropped" not in blind.manifest.metrics
    assert json.loads((blind.path / "funnel.json").read_text())["truth"] is None


def test_a_cut_off_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool(tmp_path / "pool", 40)
    whole = run(pool, tmp_path / "whole")
    real, read = filter_jobs.describe_shard, []

    def dies_at_the_third(request: Any, number: int, shard: Path) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return real(request, number, shard)

    monkeypatch.setattr(filter_jobs, "describe_shard", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(pool, tmp_path / "cut")
    monkeypatch.setattr(filter_jobs, "describe_shard", lambda r, n, s: (read.append(n), real(r, n, s))[1])
    resumed = run(pool, tmp_path / "cut")
    assert read == [2, 3]
    assert payload(resumed) == payload(whole)


def test_the_same_pool_gives_the_same_bytes_anywhere(tmp_path: Path) -> None:
    pool = make_pool(tmp_path / "pool")
    shutil.copytree(pool, tmp_path / "elsewhere" / "pool")
    first = run(pool, tmp_path / "first")
    second = run(tmp_path / "elsewhere" / "pool", tmp_path / "second", num_workers=2)
    assert payload(first) == payload(second)


def filter_on_ranks(group: Any, pool: Path, output: Path) -> dict[str, bytes]:
    import torch.distributed as dist

    runtime = Runtime(rank=dist.get_rank(group), world_size=dist.get_world_size(group), group=group)
    return payload(run_stage(STAGE, config(pool), output, runtime))


def test_ranks_agree_with_one_process(tmp_path: Path) -> None:
    pool = make_pool(tmp_path / "pool", 50)
    alone = run(pool, tmp_path / "one")
    assert run_ranks(filter_on_ranks, 2, pool, tmp_path / "two") == [payload(alone)] * 2


def make_clip(folder: Path) -> Path:
    save_clip(CLIP.from_seed(ClipConfig.model_validate(CLIP_CONFIG), 3), folder, seed=3)
    return folder


def test_clip_scores_choose_captions(tmp_path: Path) -> None:
    """Half of the pairs by score; a sample stays with those of its captions that are among them."""
    import torch

    from mmfoundry.data.text import tokenize
    from mmfoundry.data.transforms import EvalTransform

    pool = make_pool(tmp_path / "pool")
    clip = make_clip(tmp_path / "clip")
    tree = {"all": ["readable", {"clip_score": {"top": 0.5, "model": "ours"}}]}
    made = run(pool, tmp_path / "out", filters=tree, scorers={"ours": {"model": str(clip), "batch_size": 7}})
    table = pl.concat([pl.read_parquet(made.path / "kept" / f"{n:05d}.parquet") for n in range(3)])
    # scored pair by pair
    model = CLIP.from_seed(ClipConfig.model_validate(CLIP_CONFIG), 3).eval()
    expected = {}
    with torch.no_grad():
        for number in range(30):
            pixels = model.pixels(torch.from_numpy(EvalTransform(16)(smooth(number)))[None])
            for caption in (f"picture {number}", f"another line for {number}"):
                text = model.encode_text(torch.from_numpy(tokenize(caption, 16)))
                expected[f"{number:032x}", caption] = float((model.encode_image(pixels) * text).sum())
    threshold = sorted(expected.values(), reverse=True)[30]
    column = "clip_ours_similarity_score"
    scores = {(uid, caption): score for uid, caption, score in table.select("uid", "caption", column).iter_rows()}
    assert set(scores) == {pair for pair, score in expected.items() if score >= threshold}
    for pair, score in scores.items():
        assert score == pytest.approx(expected[pair], abs=1e-5)
    curated = Pool(made.path / "shards")
    texts = {(s.key, t) for n in range(len(curated)) for s in [to_sample(curated.get(n))] for t in s.text}
    assert texts == set(scores)


def test_models_look_only_at_what_is_left(tmp_path: Path) -> None:
    """Without the account of each filter alone, pairs that earlier filters dropped get no scores; the rest is equal."""
    pool = make_pool(tmp_path / "pool")
    scorers = {"ours": {"model": str(make_clip(tmp_path / "clip"))}}
    first = {"expression": "caption_words < 3"}
    tree = {"all": ["readable", first, {"clip_score": {"top": 0.5, "model": "ours"}}]}
    every = run(pool, tmp_path / "every", filters=tree, scorers=scorers)
    left = run(pool, tmp_path / "left", filters=tree, scorers=scorers, alone=False)
    assert (left.path / "subset.npy").read_bytes() == (every.path / "subset.npy").read_bytes()
    assert payload(left)["kept/00000.parquet"] == payload(every)["kept/00000.parquet"]

    def scored(name: str) -> int:
        scores = pl.read_parquet(tmp_path / f"{name}.cache" / "scores" / "**" / "*.parquet")
        return scores["clip_ours_similarity_score"].count()

    assert (scored("every"), scored("left")) == (60, 30)


def test_indexes_can_lie_elsewhere(tmp_path: Path) -> None:
    pool = make_pool(tmp_path / "pool")
    expected = payload(run(pool, tmp_path / "beside"))
    for shard in pool.glob("*.tar"):
        drop_index(shard)
    before = sorted(path.name for path in pool.iterdir())
    made = run(pool, tmp_path / "elsewhere", index_dir=str(tmp_path / "indexes"), num_workers=2)
    assert payload(made) == expected
    assert sorted(path.name for path in pool.iterdir()) == before
    assert len(list((tmp_path / "indexes").iterdir())) == 3


def test_scores_need_a_model(tmp_path: Path) -> None:
    with pytest.raises(UnknownColumn, match=r"b32_img, which takes a model: give scorers\.b32"):
        run(
            make_pool(tmp_path / "pool"),
            tmp_path / "out",
            filters={"cap_per_cluster": {"column": "b32_img", "count": 1}},
        )


def test_scores_in_the_pools_json_need_none(tmp_path: Path) -> None:
    pairs = [sample | {"json": {"similarity": n / 10}} for n, sample in enumerate(samples(10))]
    write_shards(pairs, tmp_path / "pool")
    made = run(tmp_path / "pool", tmp_path / "out", filters={"expression": "json.similarity >= 0.55 & width == 16"})
    assert made.manifest.metrics["kept"] == 4


def test_without_resharding_there_are_no_shards(tmp_path: Path) -> None:
    made = run(make_pool(tmp_path / "pool"), tmp_path / "out", reshard=False, examples=0)
    assert not (made.path / "shards").exists()
    assert len(read_subset(made.path / "subset.npy")) == 30
    assert pl.read_parquet(made.path / "examples.parquet").height == 0


def test_a_config_that_cannot_be_meant_names_its_place() -> None:
    with pytest.raises(ConfigError, match=r"x\.yaml: filter\.filters: all\.0\.basic\.min_sidee .* min_side\?"):
        parse(FilterConfig, {"pool": "p", "filters": {"all": [{"basic": {"min_sidee": 1}}]}}, "x.yaml", "filter")
    with pytest.raises(ConfigError, match=r"filters: expression\.formula: unknown column 'widht'; did you mean width"):
        config("pool", filters={"expression": "widht > 3"})
    with pytest.raises(
        ConfigError, match=r"unknown column 'caption_word'; did you mean caption_words\? known: .*language"
    ):
        config("pool", filters={"expression": "caption_word > 3"})


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        (
            {"clip_score": {"model": "b32", "min": 0.2}},
            r"clip_score can judge none, as no sample has a value of clip_b32_similarity_score; scorers\.b32 would",
        ),
        (
            {"expression": "json.nothing > 0.5"},
            r"expression can judge none, as no sample has a value of json\.nothing$",
        ),
        ({"min_side": 4000}, r"min_side drops 30 of the 30 that reach it: loosen it$"),
    ],
)
def test_where_nothing_is_kept_the_reason_is_told(tmp_path: Path, tree: dict[str, Any], says: str) -> None:
    with pytest.raises(MmfoundryError, match=rf"no sample of 30 passes the filters; {says}"):
        run(make_pool(tmp_path / "pool"), tmp_path / "out", filters=tree)


def test_faces_that_nobody_marked_are_not_taken_for_blurred(tmp_path: Path) -> None:
    pool = make_pool(tmp_path / "pool")
    with pytest.raises(
        MissingInput, match=r"blur_faces: .*pool says of no kept sample where faces are .*detectors\.faces"
    ):
        run(pool, tmp_path / "out", blur_faces=True)
    assert not (tmp_path / "out").exists()
    run(pool, tmp_path / "out", blur_faces=True, reshard=False)


def test_no_pool(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match=r"filter\.pool: .*gone"):
        run(tmp_path / "gone", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingInput, match="empty"):
        run(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "empty" / "shard.tar").write_bytes(bytes(10240))
    with pytest.raises(MissingInput, match="no readable sample"):
        run(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_truncated_shard_is_counted_and_capped(tmp_path: Path) -> None:
    pool = make_pool(tmp_path / "pool", 20)
    shard = pool / "shard-00001.tar"
    keep = open_index(shard).members(7)[1].offset + 5
    drop_index(shard)  # as of a shard that was cut off before anybody indexed it
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(TooManyUnreadable, match=r"cut off.*max_unreadable allows 1\.00%"):
        run(pool, tmp_path / "out", max_unreadable=0.01)
    made = run(pool, tmp_path / "out", max_unreadable=0.2)
    assert made.manifest.metrics["kept"] == 17
    damaged = json.loads((made.path / "funnel.json").read_text())["damaged"]
    assert damaged["cut off"] == 1
    assert made.manifest.metrics["dropped"] == sum(damaged.values())


def test_too_many_unreadable_stops_early_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = [sample | {"png": sample["png"][:-80]} if n % 2 else sample for n, sample in enumerate(samples(40))]
    write_shards(bad, tmp_path / "pool", max_count=10)
    real, read = filter_jobs.describe_shard, []
    monkeypatch.setattr(filter_jobs, "describe_shard", lambda r, n, s: (read.append(n), real(r, n, s))[1])
    says = r"10 of 40 .*10 x damaged image; for one, 000001 in shard-00000\.tar.*20\.00%"
    with pytest.raises(TooManyUnreadable, match=says):
        run(tmp_path / "pool", tmp_path / "out", max_unreadable=0.2)
    assert read == [0, 1]


def test_nothing_kept_says_which_step_drops_most(tmp_path: Path) -> None:
    pool = make_pool(tmp_path / "pool")
    with pytest.raises(MmfoundryError, match=r"no sample of 30 passes .* min_side drops 30 of the 30"):
        run(pool, tmp_path / "out", filters={"all": ["readable", {"min_side": 500}]})
    assert (work_folder(tmp_path / "out") / "funnel.json").is_file()


def test_a_repeated_uid_is_one_sample(tmp_path: Path) -> None:
    pairs = [sample | {"json": {"uid": f"{n // 2:032x}"}} for n, sample in enumerate(samples(6))]
    write_shards(pairs, tmp_path / "pool", max_count=4)
    made = run(tmp_path / "pool", tmp_path / "out")
    assert made.manifest.metrics["kept"] == 3
    assert pl.read_parquet(made.path / "dropped" / "*.parquet")["reason"].to_list() == ["unique_uid"] * 3


def test_captions_that_fail_are_cut_from_samples_that_stay(tmp_path: Path) -> None:
    texts = ["a dog that runs on the beach\nein Hund läuft am Strand entlang\nok", "ein Hund läuft am Strand entlang"]
    pairs = [{"__key__": str(n), "png": encode(smooth(n)), "txt": text} for n, text in enumerate(texts)]
    write_shards(pairs, tmp_path / "pool")
    made = run(tmp_path / "pool", tmp_path / "out")
    assert to_sample(Pool(made.path / "shards").get(0)).text == ["a dog that runs on the beach"]
    assert (made.manifest.metrics["kept"], made.manifest.metrics["captions_kept"]) == (1, 1)
    assert np.load(made.path / "subset.npy").shape == (1,)
