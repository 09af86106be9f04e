"""Stages read their shards from a bucket as they do from a disk."""

from pathlib import Path
from typing import Any

import pytest

from mmfoundry.data.shards import write_shards
from mmfoundry.pipeline.artifact import Artifact
from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.distributed import init_runtime
from mmfoundry.pipeline.errors import MissingInput
from mmfoundry.pipeline.metrics import read_metrics
from mmfoundry.pipeline.stage import Stage, run_stage
from mmfoundry.stages.filter import STAGE as FILTER
from mmfoundry.stages.pretrain import STAGE as PRETRAIN
from tests.data.conftest import samples


@pytest.fixture
def pool(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pool on the disk, and the same in the bucket `s3://shards/pool`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    local = tmp_path / "pool"
    write_shards(samples(24), local, max_count=10)
    for shard in local.glob("*.tar"):
        bucket.put_file(str(shard), f"shards/pool/{shard.name}")
    return local


def run(stage: Stage, tree: dict[str, Any], output: Path) -> Artifact:
    return run_stage(stage, parse(stage.config_type, tree), output, init_runtime())


def test_a_pool_in_a_bucket_is_filtered_as_on_the_disk(pool: Path, tmp_path: Path) -> None:
    filters = {"all": ["readable", {"basic": {"min_side": 4}}]}
    here = run(FILTER, {"pool": str(pool), "filters": filters}, tmp_path / "here")
    there = run(FILTER, {"pool": "s3://shards/pool", "filters": filters}, tmp_path / "there")
    assert here.manifest.metrics["kept"] > 0
    shard = "shards/shard-00000.tar"
    assert there.manifest.files[shard] == here.manifest.files[shard]
    assert there.manifest.inputs["pool"].digest == "url:s3://shards/pool"


def test_pretraining_draws_from_a_bucket_what_it_draws_from_the_disk(pool: Path, tmp_path: Path) -> None:
    def losses(path: str, output: Path) -> list[float]:
        made = run(PRETRAIN, tiny_pretrain(path), output)
        return [row["loss"] for row in read_metrics(made.path / "metrics.jsonl")]

    here = losses(str(pool), tmp_path / "here")
    assert len(here) == 3
    assert losses("s3://shards/pool/*.tar", tmp_path / "there") == here


def test_only_shards_may_lie_behind_a_url(pool: Path, tmp_path: Path) -> None:
    tree = tiny_pretrain(str(pool)) | {"model": None, "initial": "s3://shards/clip"}
    with pytest.raises(MissingInput, match=r"pretrain\.initial: s3://shards/clip: only shards are read from a URL"):
        run(PRETRAIN, tree, tmp_path / "out")


def tiny_pretrain(path: str) -> dict[str, Any]:
    return {
        "data": [{"path": path}],
        "model": {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
            "text_cfg": {"context_length": 16, "width": 16, "heads": 2, "layers": 1},
        },
        "trainer": {"train_batch_size": 8, "max_steps": 3, "optimizer": {"lr": 1e-3}, "logging_steps": 1},
    }
