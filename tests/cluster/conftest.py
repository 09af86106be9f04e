"""Two hosts, and what two plain ranks on one machine give; skipped where hosts cannot be made."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.lab import Lab, missing
from tests.cluster.runs import local_run, write_config

NAMES = ("node1", "node2")  # as in launch/cluster/hostfile


@pytest.fixture(scope="session")
def able() -> None:
    """Skip with the reason where a lab cannot be made."""
    if reason := missing({}):
        pytest.skip(reason)


@pytest.fixture(scope="session")
def config(able: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("cluster"))


@pytest.fixture(scope="session")
def expected(config: Path) -> Path:
    """The artifact of two plain local ranks."""
    return local_run(config, config.parent / "expected")


@pytest.fixture
def lab(able: None, tmp_path: Path) -> Iterator[Lab]:
    with Lab(tmp_path / "lab", NAMES) as made:
        yield made
