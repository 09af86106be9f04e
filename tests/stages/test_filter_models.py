"""The `filter` stage with models: the recipes that need a CLIP, and filters on what heads and detectors find."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import save_file

from mmfoundry.data.filters.subset import read_subset
from mmfoundry.data.shards import write_shards
from mmfoundry.pipeline.artifact import Artifact
from mmfoundry.pipeline.config import apply_overrides, load_yaml, parse
from mmfoundry.pipeline.distributed import Runtime
from mmfoundry.pipeline.stage import run_stage
from mmfoundry.stages.filter import STAGE, FilterConfig
from tests.data.conftest import encode, samples
from tests.data.detectors.test_detectors import written
from tests.stages import clip_folders

RECIPES = Path(__file__).parents[2] / "configs" / "filter"


def make_pool(folder: Path, count: int = 12) -> Path:
    """Pictures, every third with text on it; two captions each."""
    made: list[dict[str, Any]] = samples(count)
    for number in range(0, count, 3):
        made[number]["png"] = encode(written(f"N {number}", (200, 100), (30, 30))[0])
    write_shards(made, folder, max_count=5)
    return folder


def run(tree: dict[str, Any], output: Path) -> Artifact:
    return run_stage(STAGE, parse(FilterConfig, tree), output, Runtime())


@pytest.mark.parametrize(
    ("recipe", "column", "share", "changes"),
    [
        ("dfn", "clip_dfn_similarity_score", 0.15, ["scorers.dfn.model={model}"]),
        (
            "t-mars",
            "clip_b32_masked_similarity_score",
            0.5,
            ["scorers.b32.open_clip=null", "scorers.b32.model={model}"],
        ),
    ],
)
def test_recipes_keep_the_share_that_fits_best(
    recipe: str, column: str, share: float, changes: list[str], tmp_path: Path
) -> None:
    if recipe == "t-mars":
        pytest.importorskip("rapidocr_onnxruntime", reason="the extra `ocr` is not installed")
    model = clip_folders.open_clip_folder(tmp_path / "model")
    overrides = [f"pool={make_pool(tmp_path / 'pool')}", *(change.format(model=model) for change in changes)]
    tree = apply_overrides(load_yaml(RECIPES / f"{recipe}.yaml"), overrides)
    artifact = run(tree, tmp_path / "out")
    whole = run(apply_overrides(tree, ["filters.clip_score.top=1"]), tmp_path / "whole")
    scores = sorted(pl.read_parquet(whole.path / "kept" / "*.parquet")[column], reverse=True)
    kept = pl.read_parquet(artifact.path / "kept" / "*.parquet")
    assert len(scores) == len(set(scores)) == 24
    assert sorted(kept[column], reverse=True) == scores[: int(24 * share) + 1]
    assert set(read_subset(artifact.path / "subset.npy")) == set(kept["uid"])
    assert list((artifact.path / "shards").glob("*.tar"))


def test_formulas_read_heads_and_detectors(tmp_path: Path) -> None:
    pytest.importorskip("rapidocr_onnxruntime", reason="the extra `ocr` is not installed")
    torch.manual_seed(0)
    save_file({"weight": torch.randn(1, 16), "bias": torch.zeros(1)}, tmp_path / "head.safetensors")
    tree = {
        "pool": str(make_pool(tmp_path / "pool")),
        "scorers": {"a": {"model": str(clip_folders.ours(tmp_path / "model"))}},
        "heads": {"aesthetic": {"weights": str(tmp_path / "head.safetensors"), "scorer": "a"}},
        "detectors": {"text": "rapidocr"},
        "filters": {
            "all": [{"expression": "text_area < 0.05"}, {"top": {"column": "aesthetic_score", "fraction": 0.5}}]
        },
    }
    artifact = run(tree, tmp_path / "out")
    kept = pl.read_parquet(artifact.path / "kept" / "*.parquet")
    assert kept.height == 10  # of 16 pairs down to the one at place 8, whose picture has two
    assert kept["text_area"].max() < 0.05
    funnel = json.loads((artifact.path / "funnel.json").read_text())
    dropped = {step["name"]: step["sequence"]["dropped"] for step in funnel["filters"]}
    assert dropped["expression"] == 4
