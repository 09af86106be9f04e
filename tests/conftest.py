"""What every test stands on: no network, no user settings, one torch thread, torchvision's operators declared."""

import os
import tempfile
from pathlib import Path

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
