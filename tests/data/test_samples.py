"""The shipped sample data keep what their README promises."""

import hashlib
import io
import json
from collections import Counter, defaultdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmfoundry.data.concepts import STYLES, read_concepts
from mmfoundry.data.decode import UnreadableSample, decode_image
from mmfoundry.data.reader import Pool
from mmfoundry.data.sample import RawSample, image_member
from mmfoundry.data.sample_pairs import BAD
from mmfoundry.data.sample_pool import main

SAMPLES = Path(__file__).parents[2] / "data" / "samples"


@cache
def samples(pattern: str) -> list[tuple[RawSample, dict[str, Any]]]:
    pool = Pool(str(SAMPLES / pattern), save_index=False)
    raw = [pool.get(number) for number in range(len(pool))]
    return [(sample, json.loads(sample.members["json"])) for sample in raw]


def test_digests_are_those_of_sha256sums() -> None:
    lines = (SAMPLES / "SHA256SUMS").read_text().splitlines()
    listed = dict(reversed(line.split("  ")) for line in lines)
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in SAMPLES.glob("*.tar")}
    assert found == listed


def test_the_folder_is_small_and_has_its_licences() -> None:
    shipped = [path for path in SAMPLES.iterdir() if path.suffix != ".idx"]
    assert sum(path.stat().st_size for path in shipped) <= 12 * 1000 * 1000
    for name in ("LICENSE-noto-emoji.txt", "LICENSE-twemoji.txt", "LICENSE-emoji-datasource.txt"):
        assert name in (SAMPLES / "ATTRIBUTION.md").read_text()
        assert (SAMPLES / name).stat().st_size > 500
    assert "Attribution 4.0 International" in (SAMPLES / "LICENSE-twemoji.txt").read_text()


def test_the_table_has_the_promised_groups() -> None:
    concepts = read_concepts(SAMPLES / "concepts.csv")
    assert Counter(concept.split for concept in concepts) == {"train": 306, "heldout": 54}
    assert all(concept.split == "train" for concept in concepts if concept.question)
    assert all(concept.split == "heldout" for concept in concepts if concept.adapt)
    assert sum(concept.question for concept in concepts) == 40
    assert sum(concept.adapt for concept in concepts) == 12
    assert all(" " not in concept.name for concept in concepts if concept.question or concept.adapt)
    kinds = defaultdict(set)
    for concept in concepts:
        kinds[concept.split].add(concept.kind)
    assert kinds["heldout"] == kinds["train"]  # a category that was never trained cannot be told


@pytest.mark.parametrize("style", STYLES)
def test_each_concept_has_one_picture_a_style(style: str) -> None:
    concepts = {concept.name: concept for concept in read_concepts(SAMPLES / "concepts.csv")}
    found = samples(f"pictures-{style}-*.tar")
    assert [meta["concept"] for _, meta in found] == list(concepts)
    for raw, meta in found:
        assert meta == concepts[meta["concept"]].as_json() | {"style": style}
        assert raw.members["txt"].decode() == concepts[meta["concept"]].phrase
        image = Image.open(io.BytesIO(raw.members["png"]))
        assert image.size == (64, 64)
        assert image.convert("RGBA").getchannel("A").getextrema()[1] == 255


def test_the_pool_shows_training_concepts_only_and_is_bad_as_promised() -> None:
    found = samples("pool-*.tar")
    train = {concept.name for concept in read_concepts(SAMPLES / "concepts.csv") if concept.split == "train"}
    assert {meta["truth"]["concept"] for _, meta in found} == train
    counts = Counter(meta["truth"]["bad"] for _, meta in found)
    assert counts.pop(None) == 2 * len(train)
    assert counts == BAD
    assert 0.25 <= sum(BAD.values()) / len(found) <= 0.3
    assert len({meta["uid"] for _, meta in found}) == len(found)
    assert all(len(meta["uid"]) == 32 and int(meta["uid"], 16) >= 0 for _, meta in found)
    formats = Counter(name for raw, _ in found for name in raw.members if name not in ("txt", "json"))
    assert set(formats) == {"png", "jpg", "webp"}


def test_bad_pairs_are_bad_in_the_way_they_say() -> None:
    found = samples("pool-*.tar")
    number = {meta["uid"]: i for i, (_, meta) in enumerate(found)}
    for i, (raw, meta) in enumerate(found):
        bad, data = meta["truth"]["bad"], image_member(raw.members)
        assert data is not None
        if bad == "truncated":
            with pytest.raises(UnreadableSample):
                decode_image(data)
            continue
        height, width, _ = decode_image(data).shape
        ratio = max(height, width) / min(height, width)
        assert (min(height, width) < 24) == (bad == "too_small")
        assert (ratio > 3) == (bad == "extreme_aspect")
        assert (all(len(text.split()) < 3 for text in meta["captions"])) == (bad == "short_caption" or _japanese(meta))
        if bad in ("exact_duplicate", "near_duplicate"):
            original = number[meta["truth"]["of"]]
            assert original < i
            assert found[original][1]["truth"]["bad"] is None
            same = image_member(found[original][0].members) == data
            assert same == (bad == "exact_duplicate")


def _japanese(meta: dict[str, Any]) -> bool:
    """Without spaces, so every sentence counts as one word."""
    return meta["truth"]["bad"] == "language" and all(" " not in text for text in meta["captions"])


def test_good_captions_name_their_concept() -> None:
    names = {concept.name: concept.names for concept in read_concepts(SAMPLES / "concepts.csv")}
    for _, meta in samples("pool-*.tar"):
        named = all(any(name in text for name in names[meta["truth"]["concept"]]) for text in meta["captions"])
        if meta["truth"]["bad"] is None:
            assert named
            assert 3 <= len(meta["captions"]) <= 4
        if meta["truth"]["bad"] == "shuffled_caption":
            assert not named


@pytest.mark.slow
def test_building_again_gives_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pinned = dict(line.split("==") for line in _constraints() if "==" in line)
    other = [name for name in ("pillow", "numpy", "webdataset") if version(name) != pinned[name]]
    if other:
        pytest.skip(f"bytes are promised for the pinned versions only; another version of {', '.join(other)}")
    (tmp_path / "concepts.csv").write_bytes((SAMPLES / "concepts.csv").read_bytes())
    if main(["build", "--output", str(tmp_path)]):
        said = capsys.readouterr().err
        assert "npm" in said, said
        pytest.skip(f"the packages cannot be fetched here: {said.strip()}")
    assert (tmp_path / "SHA256SUMS").read_text() == (SAMPLES / "SHA256SUMS").read_text()


def _constraints() -> list[str]:
    return (SAMPLES.parents[1] / "constraints.txt").read_text().splitlines()


def test_a_missing_package_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "concepts.csv").write_bytes((SAMPLES / "concepts.csv").read_bytes())
    folders = ["--google", str(tmp_path / "a"), "--twitter", str(tmp_path / "b")]
    assert main(["build", *folders, "--output", str(tmp_path)]) == 2
    assert "no such picture" in capsys.readouterr().err
