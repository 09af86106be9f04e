import json
from pathlib import Path
from typing import Any

import pytest

from mmfoundry.data.reader import Pool
from mmfoundry.data.sample import to_sample
from mmfoundry.pipeline.artifact import Artifact
from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.distributed import Runtime
from mmfoundry.pipeline.errors import ConfigError
from mmfoundry.pipeline.stage import run_stage, work_folder
from mmfoundry.stages import scenes
from mmfoundry.stages.scenes import STAGE, ScenesConfig
from tests.data.drawn import write_pictures
from tests.ranks import run_ranks

SETS = {
    "train": {"count": 25, "layout": {"canvas_size": 32}, "questions": {"what": 1, "presence": 2}},
    "few": {"count": 8, "concepts": "heldout", "layout": {"canvas_size": 32, "arrangement": "single"}},
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def config(pictures: Path, **changes: Any) -> ScenesConfig:
    return parse(ScenesConfig, {"pictures": str(pictures), "sets": SETS, "scenes_per_shard": 10} | changes)


def shards(artifact: Artifact) -> dict[str, bytes]:
    return {str(p.relative_to(artifact.path)): p.read_bytes() for p in sorted(artifact.path.rglob("*.tar"))}


def test_sets_become_folders_of_readable_shards(pictures: Path, tmp_path: Path) -> None:
    artifact = run_stage(STAGE, config(pictures), tmp_path / "scenes", Runtime())
    assert list(shards(artifact)) == ["few/shard-00000.tar", *(f"train/shard-0000{i}.tar" for i in range(3))]
    pool = Pool(artifact.path / "train")
    assert len(pool) == 25
    sample = to_sample(pool.get(24))
    assert sample.key == "train-000024"
    assert sample.image.shape == (32, 32, 3)
    assert sample.text
    assert sample.messages
    assert {question["type"] for question in sample.meta["questions"]} == {"what", "presence"}
    metrics = artifact.manifest.metrics
    assert (metrics["scenes"], metrics["train_scenes"], metrics["few_scenes"]) == (33, 25, 8)
    assert metrics["rendered"] == 33
    assert metrics["scenes_per_second"] > 0
    summary = json.loads((artifact.path / "sets.json").read_text())
    assert summary["train"]["answers"]["presence"] == ["yes", "no"]
    assert summary["few"]["concepts"] == ["thing4", "thing9", "thing14", "thing19"]


def test_a_cut_off_run_keeps_its_shards(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_stage(STAGE, config(pictures), tmp_path / "whole", Runtime())
    write, calls = scenes.write_shard, []

    def dies_at_the_third(path: Path, samples: Any) -> Path:
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(path, samples)

    monkeypatch.setattr(scenes, "write_shard", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run_stage(STAGE, config(pictures), tmp_path / "cut", Runtime())
    assert len(list(work_folder(tmp_path / "cut").rglob("*.tar"))) == 2
    monkeypatch.setattr(scenes, "write_shard", write)
    resumed = run_stage(STAGE, config(pictures), tmp_path / "cut", Runtime())
    assert resumed.manifest.metrics["rendered"] == 13
    assert shards(resumed) == shards(whole)
    assert resumed.manifest.digest == whole.manifest.digest


def _render(group: Any, pictures: Path, output: Path, world: int) -> None:
    import torch.distributed as dist

    run_stage(STAGE, config(pictures), output, Runtime(rank=dist.get_rank(group), world_size=world, group=group))


def test_ranks_share_the_shards_and_write_the_same_bytes(pictures: Path, tmp_path: Path) -> None:
    alone = run_stage(STAGE, config(pictures), tmp_path / "one", Runtime())
    run_ranks(_render, 2, pictures, tmp_path / "two", 2)
    assert shards(Artifact.open(tmp_path / "two")) == shards(alone)
    assert Artifact.open(tmp_path / "two").manifest.metrics["rendered"] == 33


@pytest.mark.parametrize("name", ["../away", "Train", "a b", ""])
def test_a_set_is_named_like_a_folder(pictures: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a set"):
        config(pictures, sets={name: {"count": 1}})


def test_an_unknown_concept_stops_before_anything_is_rendered(pictures: Path, tmp_path: Path) -> None:
    sets = SETS | {"odd": {"count": 1, "concepts": ["dragon"]}}
    with pytest.raises(ConfigError, match="odd: concepts: no picture shows 'dragon'"):
        run_stage(STAGE, config(pictures, sets=sets), tmp_path / "scenes", Runtime())
    assert not list(tmp_path.rglob("*.tar"))
