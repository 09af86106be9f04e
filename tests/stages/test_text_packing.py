"""`text_packing` of the pretrain stage: the losses of captions in one padded batch, whatever else a training does."""

from pathlib import Path
from typing import Any

import pytest

from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.distributed import init_runtime
from mmfoundry.pipeline.errors import ConfigError
from mmfoundry.pipeline.metrics import read_metrics
from mmfoundry.pipeline.stage import run_stage
from mmfoundry.stages.pretrain import STAGE, PretrainConfig
from tests.ranks import run_ranks
from tests.stages.test_pretrain import shards, train_here, tree  # noqa: F401

STEPS = {"max_steps": 4, "save_steps": 0}


def changed(shards: Path, **changes: Any) -> dict[str, Any]:  # noqa: F811
    """A config of four steps; `trainer` adds to its trainer."""
    config = tree(shards)
    trainer = config["trainer"] | STEPS | changes.pop("trainer", {})
    return config | changes | {"trainer": trainer}


@pytest.fixture(scope="module")
def padded(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:  # noqa: F811
    return train_here(None, str(tmp_path_factory.mktemp("padded") / "out"), changed(shards))


COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager", "gradient_checkpointing": True}


@pytest.mark.parametrize(
    "trainer",
    [
        {},
        {"grad_cache_chunk_size": 4, "gradient_checkpointing": True},
        pytest.param(COMPILED, marks=pytest.mark.slow),
    ],
    ids=["plain", "in chunks, computed twice", "compiled"],
)
def test_losses_of_one_process(
    trainer: dict[str, Any],
    shards: Path,  # noqa: F811
    padded: list[float],
    tmp_path: Path,
) -> None:
    found = train_here(None, str(tmp_path / "out"), changed(shards, text_packing=True, trainer=trainer))
    assert found == pytest.approx(padded, rel=1e-5)
    assert found != padded  # summed in another order


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_losses_of_two_ranks_that_have_different_numbers_of_tokens(
    stage: int,
    shards: Path,  # noqa: F811
    padded: list[float],
    tmp_path: Path,
) -> None:
    trainer = {"zero_optimization": {"stage": stage}, "grad_cache_chunk_size": 4, "gradient_checkpointing": stage > 1}
    config = changed(shards, text_packing=True, trainer=trainer)
    for found in run_ranks(train_here, 2, str(tmp_path / "out"), config):
        assert found == pytest.approx(padded, rel=1e-5)


def test_tokens_that_are_counted(shards: Path, tmp_path: Path) -> None:  # noqa: F811
    rates = {}
    for packing in (False, True):
        config = parse(PretrainConfig, changed(shards, text_packing=packing))
        path = run_stage(STAGE, config, tmp_path / str(packing), init_runtime()).path
        *_, last = read_metrics(path / "metrics.jsonl")
        rates[packing] = last["tokens_per_second"] / last["samples_per_second"]
    assert rates[False] == pytest.approx(5 + 7)  # four patches and the class token; "a square that is red"
    assert 5 + 3 < rates[True] < 5 + 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_groups": 2}, "text_packing leaves no padding for text_groups to spare"),
        ({"model": {"open_clip": "ViT-B-32"}}, "text_packing: only our own text towers have it"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str, shards: Path) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match=message):
        parse(PretrainConfig, changed(shards, text_packing=True, **changes))
