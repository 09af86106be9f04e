"""JSON files that we did not write: what is wrong is one line that names the file."""

from pathlib import Path

import pytest

from mmfoundry.pipeline.errors import DamagedInput, MissingInput
from mmfoundry.pipeline.json_file import read_json


def test_an_object_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"name": "ä", "list": [1]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"name": "ä", "list": [1]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": ', r"a\.json: not JSON"),
        (b"\xff\xfe{}", r"a\.json: not JSON"),
        (b"[" * 200_000, r"a\.json: not JSON"),  # deeper than the parser goes
        (b"[1]", r"a\.json: not a JSON object"),
    ],
    ids=["cut off", "not UTF-8", "nested without end", "a list"],
)
def test_what_is_no_object_is_told(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DamagedInput, match=said):
        read_json(tmp_path / "a.json")


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match=r"a\.json: no such file"):
        read_json(tmp_path / "a.json")
    with pytest.raises(DamagedInput, match="cannot be read"):
        read_json(tmp_path)
