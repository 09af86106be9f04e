"""stages/release_push.py: a release's folders on a hub (one on this machine), and what is left when it says no."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml

from mmfoundry.launch.cli import run_command
from mmfoundry.pipeline.artifact import Artifact
from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.distributed import Runtime
from mmfoundry.pipeline.errors import MmfoundryError
from mmfoundry.pipeline.stage import run_stage
from mmfoundry.stages.release import FOLDERS, STAGE, ReleaseConfig
from tests.stages.fake_hub import FakeHub, fake_hub
from tests.stages.released import make_models, release_tree

TOKEN = "hf_made_up"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub(TOKEN) as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def release(models: Path, **changes: Any) -> Artifact:
    config = parse(ReleaseConfig, release_tree(models, **changes))
    return run_stage(STAGE, config, models / "release", Runtime())


def test_folders_become_repositories(models: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    found = release(models, push="acme", private=True)
    assert set(hub.files) == {f"acme/tiny-{folder}" for folder in FOLDERS}
    assert all(hub.private.values())
    changed = {"README.md", "adapter_config.json"}
    for folder in FOLDERS:
        uploaded = hub.files[f"acme/tiny-{folder}"]
        files = {file.name: file.read_bytes() for file in (found.path / folder).iterdir()}
        assert uploaded.keys() == files.keys()
        assert {name for name in files if uploaded[name] != files[name]} <= changed
    said = capsys.readouterr().out.splitlines()
    assert said == [f"release: {folder} is at {hub.address}/acme/tiny-{folder}" for folder in FOLDERS]
    # on the hub, folders know each other by their ids
    record = json.loads(hub.files["acme/tiny-clip-lora"]["adapter_config.json"])
    assert record["base_model_name_or_path"] == "acme/tiny-clip-transformers"
    card = hub.files["acme/tiny-clip-lora"]["README.md"].decode()
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "acme/tiny-clip-transformers"
    assert 'AutoModel.from_pretrained("acme/tiny-clip-transformers")' in card
    assert 'PeftModel.from_pretrained(base, "acme/tiny-clip-lora")' in card
    card = hub.files["acme/tiny-clip-open_clip"]["README.md"].decode()
    assert 'create_model_and_transforms("hf-hub:acme/tiny-clip-open_clip")' in card
    assert "local-dir" not in card
    # and here by their names
    assert "acme" not in (found.path / "clip-lora" / "README.md").read_text()
    # what is done is not done again, but what is asked for is pushed again
    again = release(models, push="acme")
    assert again.manifest == found.manifest
    assert hub.commits == 10
    release(models)
    assert hub.commits == 10


def test_a_push_that_fails_leaves_the_folders(models: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = release(models)
    hub.refuses = "acme/tiny-vlm"
    with pytest.raises(MmfoundryError, match=r"push: acme/tiny-vlm was not uploaded \(.*403.*--push acme") as refused:
        release(models, push="acme")
    assert "\n" not in str(refused.value)
    with pytest.raises(MmfoundryError, match=r"push: no such name/tiny-clip-open_clip was not uploaded"):
        release(models, push="no such name")
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(MmfoundryError, match=r"was not uploaded \(.*401"):
        release(models, push="acme")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(MmfoundryError, match=r"was not uploaded \(.*refused"):
        release(models, push="acme")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MmfoundryError, match=r"was not uploaded \(.*offline mode"):
        release(models, push="acme")
    whole.verify()


def test_the_command_s_option(models: Path, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "release.yaml").write_text(yaml.safe_dump(release_tree(models)))
    words = ["mmfoundry", "release", str(tmp_path / "release.yaml"), f"output={models / 'release'}", "--push", "acme"]
    monkeypatch.setattr(sys, "argv", words)
    run_command()
    assert set(hub.files) == {f"acme/tiny-{folder}" for folder in FOLDERS}
