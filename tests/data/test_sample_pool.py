import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmfoundry.data import sample_pool
from mmfoundry.data.sample_pool import SOURCES, build, smallest_png
from mmfoundry.pipeline.errors import DamagedInput, MissingInput
from tests.data.drawn import concept, drawn

NUM_CONCEPTS = 12


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    found = {}
    for style, (_, pictures, _) in SOURCES.items():
        found[style] = tmp_path / style
        (found[style] / pictures).mkdir(parents=True)
        for number in range(NUM_CONCEPTS):
            drawn(number, style).image.resize((64, 64)).save(found[style] / pictures / f"{number}.png")
    return found


def output(folder: Path) -> Path:
    folder.mkdir()
    header = "file,name,noun,synonyms,kind,category,subcategory,split,question,adapt"
    rows = [concept(number) for number in range(NUM_CONCEPTS)]
    lines = [f"{c.file},{c.name},{c.noun},,{c.kind},{c.category},{c.subcategory},{c.split},," for c in rows]
    (folder / "concepts.csv").write_text("\n".join([header, *lines]) + "\n")
    return folder


def test_the_same_input_gives_the_same_bytes_and_another_seed_others(tmp_path: Path, folders: dict[str, Path]) -> None:
    def sums(name: str, seed: int) -> str:
        build(folders, output(tmp_path / name), seed)
        return (tmp_path / name / "SHA256SUMS").read_text()

    assert sums("one", 0) == sums("two", 0)
    assert sums("three", 1).splitlines()[-1] != sums("four", 0).splitlines()[-1]


def test_recompressing_keeps_every_pixel_and_never_grows() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=0)
    again = smallest_png(buffer.getvalue())
    assert len(again) <= len(buffer.getvalue())
    assert np.array_equal(np.array(Image.open(io.BytesIO(again))), np.array(image))
    assert smallest_png(again) == again


def test_a_fetched_package_must_have_the_published_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for npm that packs other bytes than those published."""
    npm = tmp_path / "npm"
    npm.write_text(
        '#!/bin/sh\nwhile [ "$1" != --pack-destination ]; do shift; done\necho no > "$2"/"${3%@*}-16.0.0.tgz"\n'
    )
    npm.chmod(0o755)
    monkeypatch.setattr(sample_pool.shutil, "which", lambda name: str(npm))
    with pytest.raises(DamagedInput, match="is not the published"):
        sample_pool.fetch("noto", tmp_path)


def test_without_npm_the_way_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_pool.shutil, "which", lambda name: None)
    with pytest.raises(MissingInput, match="emoji-datasource-google@16"):
        sample_pool.fetch("noto", tmp_path)
