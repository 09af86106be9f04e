"""benchmarks/pretrain.py: what goes into the table; its rows are made by running it, in seconds, on any machine."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mmfoundry.models.interop.any_clip import config_of_name
from mmfoundry.models.interop.open_clip import named_config
from tests.scripts import BENCHMARKS, load_script

APART = ["end to end", "memory"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("pretrain")


def test_captions_have_the_lengths_of_web_captions(script: ModuleType) -> None:
    batch = script.web_batch(named_config("ViT-B-32"), 512, seed=0)
    lengths = batch["text"].argmax(1) + 1
    assert (batch["text"].amax(1) == 49407).all()
    assert 12 <= float(lengths.median()) <= 16  # e^2.5 words, a start and an end
    assert 40 < int(lengths.max()) <= 77


def test_the_peers_operations_are_those_that_it_is_known_to_make(script: ModuleType) -> None:
    peer = object.__new__(script.OpenClip)
    peer._config = named_config("ViT-B-32")
    flops = peer.flops(script.web_batch(peer._config, 1, seed=0))
    assert flops / 1e9 == pytest.approx(3 * 14.78, rel=0.01)  # open_clip's docs/model_profile.csv


def test_a_siglip_and_a_resnet_get_batches_of_their_own_kind(script: ModuleType) -> None:
    siglip, resnet = config_of_name("ViT-B-16-SigLIP"), config_of_name("RN50")
    assert [script.is_plain(each) for each in (siglip, resnet, config_of_name("ViT-B-32"))] == [False, False, True]
    batch = script.web_batch(siglip, 4, seed=0)
    assert batch["text"].shape == (4, 64)
    assert int(batch["text"].max()) == 31_999
    assert script.web_batch(resnet, 4, seed=0)["image"].shape == (4, 3, 224, 224)


@pytest.mark.slow
@pytest.mark.parametrize(("option", "kinds"), [([], ["step", *APART]), (["--apart"], APART)])
def test_it_runs(option: list[str], kinds: list[str], tmp_path: Path) -> None:
    script = [sys.executable, str(BENCHMARKS / "pretrain.py"), "--models", "ViT-S-32-alt", *option]
    command = [*script, "--quick", "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["work"] for row in rows] == [f"{kind} ViT-S-32-alt" for kind in kinds]
    assert all(set(row) == {"work", "ours", "peer", "unit", "ratio"} and row["ours"] > 0 for row in rows)
