"""What every test stands on: no network, no user settings, one torch thread, torchvision's operators declared."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before anything imports transformers, huggingface_hub or torch, which read these once.
_HOME = Path(tempfile.mkdtemp(prefix="mmfoundry-tests-"))
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": str(_HOME / "huggingface"),
    "XDG_CACHE_HOME": str(_HOME / "cache"),
    "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu"),
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "120",
}

import pytest  # noqa: E402
import torch  # noqa: E402

from mmfoundry.pipeline.torchvision_ops import declare_missing_ops  # noqa: E402

declare_missing_ops()
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_seed() -> None:
    """A test must not depend on what ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """A moto server for the tests of one module."""
    pytest.importorskip("s3fs", reason="s3fs is not installed (pip install 'mmfoundry[s3]')")
    pytest.importorskip("moto.server", reason="moto's server is not installed (pip install 'moto[server]')")
    from tests.data.servers import s3_server

    with s3_server() as url:
        yield url


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An s3fs file system on an empty bucket `shards`; reading finds the server through fsspec's own settings."""
    import fsspec

    monkeypatch.setitem(fsspec.config.conf, "s3", {"key": "any", "secret": "any", "endpoint_url": endpoint})
    system = fsspec.filesystem("s3", use_listings_cache=False)
    if system.exists("shards"):
        system.rm("shards", recursive=True)
    system.mkdir("shards")
    return system
