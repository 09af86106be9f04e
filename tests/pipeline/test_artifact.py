"""Artifacts: digests of content, atomic writes on a full disk, manifests that are missing or damaged."""

import os
import time
from pathlib import Path

import pytest

from mmfoundry.pipeline import artifact
from mmfoundry.pipeline.artifact import Artifact, digest_of, fingerprint, local_files, write_atomic
from mmfoundry.pipeline.errors import DamagedInput, MissingInput, NotEnoughSpace


def fill(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.tar").write_text(text)
    return folder


def test_a_digest_depends_on_content_and_names_not_on_place(tmp_path: Path) -> None:
    one = digest_of(fill(tmp_path / "one", a="1", b="2"))
    assert one == digest_of(fill(tmp_path / "deep" / "two", a="1", b="2"))
    assert one != digest_of(fill(tmp_path / "three", a="1", b="3"))
    assert one != digest_of(fill(tmp_path / "four", a="1", c="2"))
    assert one != digest_of(fill(tmp_path / "five", a="1"))


def test_a_digest_leaves_out_indices_and_hidden_files(tmp_path: Path) -> None:
    one = fill(tmp_path / "one", a="1")
    before = digest_of(one)
    (one / "a.tar.mmf.idx").write_text("an index")
    (one / ".a.part").write_text("a cut-off write")
    assert digest_of(one) == before


@pytest.mark.parametrize("pattern", ["*.tar", "{a,b}.tar", "[ab].tar"])
def test_a_pattern_names_the_same_files_as_their_folder(tmp_path: Path, pattern: str) -> None:
    folder = fill(tmp_path / "one", a="1", b="2")
    assert [file.name for file in local_files(folder / pattern)] == ["a.tar", "b.tar"]
    assert digest_of(folder / pattern) == digest_of(folder)


def test_nothing_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="no such file or folder"):
        digest_of(tmp_path / "nothing")
    with pytest.raises(MissingInput, match="no such file or folder"):
        digest_of(tmp_path / "*.tar")
    with pytest.raises(MissingInput, match="the folder is empty"):
        digest_of(tmp_path)


def test_a_large_file_is_sampled_at_both_ends_and_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "FULL_DIGEST_BYTES", 1 << 10)
    monkeypatch.setattr(artifact, "_BLOCK_BYTES", 64)
    monkeypatch.setattr(artifact, "_BLOCKS", 4)
    file = tmp_path / "large"
    file.write_bytes(bytes(4096))
    before = fingerprint(file)
    assert before.startswith("sampled:")
    for place in (0, 4095, (4096 - 64) // 3):
        content = bytearray(4096)
        content[place] = 1
        file.write_bytes(content)
        assert fingerprint(file) != before, place
    file.write_bytes(bytes(4097))
    assert fingerprint(file) != before


def test_a_large_input_that_was_rewritten_counts_as_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "FULL_DIGEST_BYTES", 64)
    monkeypatch.setattr(artifact, "_BLOCK_BYTES", 8)
    file = tmp_path / "large.tar"
    file.write_bytes(bytes(100))
    before = digest_of(file)
    os.utime(file, ns=(time.time_ns(), time.time_ns() + 10**9))
    assert digest_of(file) != before


def test_write_atomic_replaces_whole_files_with_usual_rights(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.txt"
    write_atomic(file, "one")
    write_atomic(file, b"two")
    assert file.read_text() == "two"
    assert os.listdir(file.parent) == ["a.txt"]
    plain = tmp_path / "plain"
    plain.write_text("")
    assert file.stat().st_mode == plain.stat().st_mode


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.txt"
    write_atomic(file, "old")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(NotEnoughSpace, match=r"a\.txt: no space left for 3 bytes"):
        write_atomic(file, "new")
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_an_artifact_needs_a_readable_manifest(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="not a finished artifact"):
        Artifact.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"stage": "filter"')
    with pytest.raises(DamagedInput, match="not JSON"):
        Artifact.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DamagedInput, match=r"not a manifest of this version \(stage\)"):
        Artifact.open(tmp_path)
