"""stages/filter_scorers.py: one file a shard, its rows those of the shard's table, its numbers those of the models."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mmfoundry.data.columns import column_named
from mmfoundry.data.decode import DecodeLimits
from mmfoundry.data.scores import Scoring
from mmfoundry.data.shards import write_shards
from mmfoundry.data.table import Request, describe_shard, write_parquet
from mmfoundry.pipeline.config import inputs_of, parse
from mmfoundry.pipeline.errors import ConfigError, MissingInput
from mmfoundry.stages import filter_scorers
from mmfoundry.stages.filter_encoders import load_encoder
from mmfoundry.stages.filter_scorers import ScoreJob, ScoringConfig, score_shard
from tests.data.conftest import encode, samples, smooth
from tests.data.detectors.test_detectors import written
from tests.stages import clip_folders

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `ours` and `other`, a head, and a shard with its table."""
    folder = tmp_path_factory.mktemp("models")
    clip_folders.ours(folder / "ours", seed=0)
    clip_folders.open_clip_folder(folder / "other", seed=1)
    torch.manual_seed(0)
    save_file(dict(nn.Linear(16, 1).state_dict()), folder / "head.safetensors")
    made: list[dict[str, Any]] = samples(6)
    made[2]["png"] = made[2]["png"][:-30]  # cut off
    del made[4]["txt"]  # no captions
    made.append({"__key__": "text", "png": encode(written("HELLO", (240, 120), (40, 40))[0]), "txt": "hello\nhello"})
    (shard,) = write_shards(made, folder / "pool")
    write_parquet(describe_shard(Request(frozenset(), DecodeLimits()), 5, shard)[0], folder / "table.parquet")
    return folder


def tree(models: Path, **changes: Any) -> dict[str, Any]:
    return {
        "scorers": {"a": {"model": str(models / "ours"), "batch_size": 4}, "b": {"model": str(models / "other")}},
        "heads": {"aesthetic": {"weights": str(models / "head.safetensors"), "scorer": "a"}},
        "detectors": {"text": "rapidocr"},
    } | changes


def job(models: Path, output: Path, columns: set[str], **changes: Any) -> ScoreJob:
    config = changes.pop("config", None) or parse(ScoringConfig, tree(models))
    (shard,) = (models / "pool").glob("*.tar")
    return ScoreJob(shard, models / "table.parquet", output, frozenset(columns), config, **changes)


def test_columns_are_those_of_the_models(models: Path, tmp_path: Path) -> None:
    pytest.importorskip("rapidocr_onnxruntime", reason="the extra `ocr` is not installed")
    columns = {f"clip_{name}_similarity_score" for name in ("a", "b", "a_masked")}
    columns |= {"a_img", "b_txt", "aesthetic_score", "text_area"}
    out = tmp_path / "scores" / "00005.parquet"
    score_shard(job(models, out, columns))
    found, table = pl.read_parquet(out), pl.read_parquet(models / "table.parquet")
    assert found.columns == ["shard", "index", "caption_index", *sorted(columns)]
    assert found.select("shard", "index", "caption_index").equals(table.select("shard", "index", "caption_index"))
    encoders = {
        name: load_encoder(models / folder, None, CPU, "fp32") for name, folder in (("a", "ours"), ("b", "other"))
    }
    head = filter_scorers.load_head(models / "head.safetensors")
    for row, said in zip(found.iter_rows(named=True), table.iter_rows(named=True), strict=True):
        if row["index"] == 2:
            assert [row[name] for name in columns] == [None] * len(columns)
            continue
        plain = smooth(row["index"]) if row["index"] < 6 else written("HELLO", (240, 120), (40, 40))[0]
        image = {name: one.embed_images([one.prepare(plain)])[0] for name, one in encoders.items()}
        np.testing.assert_allclose(row["a_img"], image["a"], atol=1e-6)
        assert row["aesthetic_score"] == pytest.approx(float(head(torch.from_numpy(image["a"][None]))[0]), abs=1e-5)
        assert (row["text_area"] > 0.05) == (row["index"] == 6)
        if said["caption"] is None:
            assert row["b_txt"] is None
            assert row["clip_a_similarity_score"] is None
            continue
        for name, one in encoders.items():
            text = one.embed_texts([said["caption"]])[0]
            assert row[f"clip_{name}_similarity_score"] == pytest.approx(float(image[name] @ text), abs=1e-5)
        same = row["clip_a_masked_similarity_score"] == row["clip_a_similarity_score"]
        assert same == (row["index"] != 6)


def test_only_what_is_asked_for_is_loaded(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Scoring] = []
    real = filter_scorers.score_pairs
    monkeypatch.setattr(filter_scorers, "score_pairs", lambda pool, table, scoring, limits: (
        seen.append(scoring), real(pool, table, scoring, limits))[1])  # fmt: skip
    for columns in ({"b_txt"}, {"aesthetic_score"}, {"text_area"}):
        score_shard(job(models, tmp_path / "out.parquet", columns))
    assert [sorted(each.encoders) for each in seen] == [["b"], ["a"], []]
    assert [each.text is not None for each in seen] == [False, False, True]
    again = filter_scorers.scoring_of(job(models, tmp_path / "again.parquet", {"b_txt"}))
    assert again.encoders["b"] is seen[0].encoders["b"]  # stays loaded


def test_the_process_gets_its_threads_back(models: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        score_shard(job(models, tmp_path / "out.parquet", {"a_txt"}))
        assert torch.get_num_threads() == 2
        with pytest.raises(ConfigError):
            score_shard(job(models, tmp_path / "out.parquet", {"c_txt"}))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_another_process_writes_the_same_bytes(models: Path, tmp_path: Path) -> None:
    columns = {"clip_a_similarity_score", "clip_b_similarity_score", "a_img"}
    score_shard(job(models, tmp_path / "here.parquet", columns))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as workers:
        workers.submit(score_shard, job(models, tmp_path / "there.parquet", columns)).result()
    assert (tmp_path / "here.parquet").read_bytes() == (tmp_path / "there.parquet").read_bytes()


def test_rows_that_nobody_asks_about_are_left_out(models: Path, tmp_path: Path) -> None:
    table = pl.read_parquet(models / "table.parquet")
    keep = pl.Series("keep", [None if i % 3 == 0 else i % 3 == 1 for i in range(table.height)], dtype=pl.Boolean)
    write_parquet(keep.to_frame(), tmp_path / "keep.parquet")
    columns = {"clip_a_similarity_score"}
    score_shard(job(models, tmp_path / "all.parquet", columns))
    score_shard(job(models, tmp_path / "some.parquet", columns, only=tmp_path / "keep.parquet"))
    whole, some = pl.read_parquet(tmp_path / "all.parquet"), pl.read_parquet(tmp_path / "some.parquet")
    expected = pl.select(pl.when(keep.fill_null(False)).then(whole["clip_a_similarity_score"])).to_series()
    assert some["clip_a_similarity_score"].null_count() > whole["clip_a_similarity_score"].null_count()
    np.testing.assert_allclose(some["clip_a_similarity_score"].to_numpy(), expected.to_numpy(), atol=1e-6)
    write_parquet((keep & False).to_frame(), tmp_path / "keep.parquet")
    score_shard(job(models, tmp_path / "none.parquet", columns, only=tmp_path / "keep.parquet"))
    none = pl.read_parquet(tmp_path / "none.parquet")
    assert none.schema == whole.schema
    assert none["clip_a_similarity_score"].is_null().all()


def test_inputs_are_found_under_their_dotted_names(models: Path, tmp_path: Path) -> None:
    config = parse(ScoringConfig, tree(models, scorers={"a": {"model": "owner/model"}}))
    assert inputs_of(config) == {
        "scorers.a.model": "owner/model",
        "heads.aesthetic.weights": str(models / "head.safetensors"),
    }
    out = tmp_path / "out.parquet"
    columns = {"clip_a_similarity_score"}
    score_shard(job(models, out, columns, config=config, inputs={"scorers.a.model": models / "ours"}))
    assert pl.read_parquet(out)["clip_a_similarity_score"].is_not_null().any()
    with pytest.raises(MissingInput, match="owner/model"):
        score_shard(job(models, out, columns, config=config))


def test_columns_that_can_be_had(models: Path) -> None:
    config = parse(ScoringConfig, tree(models, detectors={}))
    assert set(config.columns()) == {
        "clip_a_similarity_score", "a_img", "a_txt", "clip_b_similarity_score", "b_img", "b_txt", "aesthetic_score",
    }  # fmt: skip
    both = parse(ScoringConfig, tree(models, detectors={"text": "rapidocr", "faces": {"yunet": {"weights": "x.onnx"}}}))
    assert set(both.columns()) - set(config.columns()) == {
        "text_area", "face_bboxes", "clip_a_masked_similarity_score", "clip_b_masked_similarity_score",
    }  # fmt: skip
    for name, column in config.columns().items():
        known = column_named(name)
        if known is not None:
            assert known.dtype == column.dtype, name
    scorers = {"a": {"model": "x", "write": ["img", "score"]}, "b": {"model": "y"}}
    written_anyway = parse(ScoringConfig, {"scorers": scorers}).written()
    assert written_anyway == {"a_img", "clip_a_similarity_score"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scorers": {"a": {}}, "heads": {}}, "give model"),
        ({"scorers": {"a": {"open_clip": "ViT-B-32"}}, "heads": {}}, "ARCHITECTURE/TAG"),
        ({"scorers": {"a_masked": {"model": "x"}}, "heads": {}}, "not _masked at the end"),
        ({"scorers": {"a b": {"model": "x"}}, "heads": {}}, "letters, digits and _"),
        ({"heads": {"n": {"weights": "x", "scorer": "c"}}}, "no scorer 'c'; there are a, b"),
        ({"detectors": {"text": "yunet"}}, "finds faces, not text"),
        (
            {"scorers": {"a": {"model": "x"}}, "heads": {"clip_a_similarity": {"weights": "x", "scorer": "a"}}},
            "one name",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(models: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(ScoringConfig, tree(models, **changes))


def test_columns_that_nothing_makes_and_heads_that_do_not_fit_are_named(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no scorer, head or detector makes c_img, face_bboxes"):
        score_shard(job(models, tmp_path / "out.parquet", {"c_img", "face_bboxes"}))
    save_file(dict(nn.Linear(12, 1).state_dict()), tmp_path / "narrow.safetensors")
    head = {"n": {"weights": str(tmp_path / "narrow.safetensors"), "scorer": "a"}}
    config = parse(ScoringConfig, tree(models, heads=head))
    with pytest.raises(ConfigError, match=r"heads\.n: .* reads embeddings of 12 numbers, but those of a have 16"):
        score_shard(job(models, tmp_path / "out.parquet", {"n_score"}, config=config))
    assert not (tmp_path / "out.parquet").exists()
