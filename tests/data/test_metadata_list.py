"""data/metadata_list.py: entries from WordNet's files and from text files."""

import json
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmfoundry.data.metadata_list import TextSource, build_entries, read_entries, synset_names
from mmfoundry.launch.cli import app
from mmfoundry.pipeline.errors import DamagedInput, MissingInput

NOUNS = """  1 This software and database is being provided to you, the LICENSEE, by
00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 ~ 00002137 n 0000 ~ 04424418 n 0000 | that which is perceived
00001930 03 n 02 Physical_entity 0 thing 1 000 | an entity that has physical existence
00002000 03 n 01 St._Patrick 0 000 | a saint
"""
ADJECTIVES = "00003131 00 a 01 galore(ip) 0 000 | in great numbers\n00003200 00 s 01 % 0 000 | a mark\n"


@pytest.fixture
def wordnet(tmp_path: Path) -> Path:
    folder = tmp_path / "wordnet"
    folder.mkdir()
    for part, text in (("noun", NOUNS), ("verb", ""), ("adj", ADJECTIVES), ("adv", "")):
        (folder / f"data.{part}").write_text(text)
    (folder / "index.noun").write_text("")
    return folder


def test_names_are_those_that_metaclip_cuts_out_of_synsets(wordnet: Path) -> None:
    assert list(synset_names(wordnet)) == ["entity", "physical entity", "st", "galore", "%"]


def test_nltks_zip_file_is_read_as_well(wordnet: Path, tmp_path: Path) -> None:
    path = tmp_path / "wordnet.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in wordnet.iterdir():
            archive.write(file, f"wordnet/{file.name}")
    assert list(synset_names(path)) == list(synset_names(wordnet))


def test_numbers_come_first_then_wordnet_then_files(wordnet: Path, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("the\t900\nentity\t500\nseldom\t99\n--\t1000\n \t5000\nred fox\t100\n", "utf-8")
    source = TextSource(path=words, min_score=100)
    entries = build_entries([source], wordnet)
    assert entries[:2] == ["0", "1"]
    assert entries[99:] == ["99", "entity", "physical entity", "st", "galore", "the", "red fox"]
    assert build_entries([source], wordnet, max_entries=103) == entries[:103]
    assert build_entries([TextSource(path=words, top=3)], wordnet=False)[100:] == ["the"]
    assert build_entries([], wordnet=False) == [str(number) for number in range(100)]


def test_lists_are_read_in_metaclips_format_and_as_lines(tmp_path: Path) -> None:
    for name, text in (
        ("list.json", json.dumps(["Zürich", "red fox", "Zürich", ""])),
        ("object.json", json.dumps({"Zürich": "w", "red fox": "u"})),
        ("lines.txt", "Zürich\nred fox\t12\n\nZürich\n"),
    ):
        (tmp_path / name).write_text(text, "utf-8")
        assert read_entries(tmp_path / name) == ["Zürich", "red fox"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b"[1]"),
        ("b.json", b'"dog"'),
        ("c.json", b"{"),
        ("d.txt", b"\xff\xfe"),
        ("e.txt", b"\n\n"),
        ("f.json", b"[" * 9999),
    ],
)
def test_what_is_no_list_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DamagedInput, match=name):
        read_entries(tmp_path / name)


def test_a_missing_list_and_a_bad_score_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="none"):
        read_entries(tmp_path / "none.json")
    (tmp_path / "words.txt").write_text("dog\tmany\n")
    with pytest.raises(DamagedInput, match="line 1"):
        build_entries([TextSource(path=tmp_path / "words.txt")], wordnet=False)


def test_the_command_writes_what_the_filter_reads(wordnet: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("zebra\t100\nyak\t99\n")
    (tmp_path / "titles.txt").write_text("Mont Blanc\n")
    texts = ["--text", f"{tmp_path / 'words.txt'}:100", "--text", str(tmp_path / "titles.txt")]
    arguments = ["data", "entries", str(tmp_path / "out.json"), "--wordnet-dir", str(wordnet), *texts]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.output.split()[0]) == (0, "106"), result.output
    assert read_entries(tmp_path / "out.json")[-3:] == ["galore", "zebra", "Mont Blanc"]
