"""`decontaminate`: what is in an evaluation set is found by bytes, looks and embeddings, in every form of set."""

import hashlib
import io
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from mmfoundry.data.eval_sets import eval_column, eval_files
from mmfoundry.data.filters.decontaminate import Decontaminate
from mmfoundry.data.filters.tree import parse_filter
from mmfoundry.data.perceptual import perceptual_hash
from mmfoundry.pipeline.errors import ConfigError, DamagedInput, MissingInput, UnknownColumn
from tests.data.filters.rows import table


def picture(seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((96, 96), Image.Resampling.BICUBIC))


def encoded(pixels: np.ndarray, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def row(data: bytes, embedding: list[float] | None = None) -> dict[str, object]:
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    return {"sha256": hashlib.sha256(data).digest(), "perceptual_hash": perceptual_hash(pixels), "b32_img": embedding}


def rows(*given: dict[str, object]) -> pl.DataFrame:
    found = table(*({name: value for name, value in one.items() if name != "b32_img"} for one in given))
    return found.with_columns(pl.Series("b32_img", [one.get("b32_img") for one in given], dtype=pl.List(pl.Float32)))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures" / "below"
    folder.mkdir(parents=True)
    for seed in range(3):
        (folder / f"{seed}.png").write_bytes(encoded(picture(seed), "PNG"))
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("not looked at")
    return tmp_path / "pictures"


def test_bytes_and_looks_are_found(pictures: Path) -> None:
    same = encoded(picture(1), "PNG")
    copy = encoded(picture(1), "JPEG", quality=80)
    other = encoded(picture(9), "PNG")
    pool = rows(row(same), row(copy), row(other), {})
    assert Decontaminate(evals=[pictures], radius=None).keep(pool).to_list() == [False, True, True, None]
    assert Decontaminate(evals=[pictures], exact=False).keep(pool).to_list() == [False, False, True, None]
    assert Decontaminate(evals=[pictures]).keep(pool).to_list() == [False, False, True, None]


def test_the_radius_is_inclusive(tmp_path: Path) -> None:
    bits = [np.packbits([1] * count + [0] * (512 - count)).tobytes() for count in (5, 6)]
    pl.DataFrame({"perceptual_hash": [bytes(64)]}).write_parquet(tmp_path / "set.parquet")
    pool = rows(*({"perceptual_hash": one} for one in bits))
    assert Decontaminate(evals=[tmp_path / "set.parquet"], exact=False, radius=5).keep(pool).to_list() == [False, True]


def test_a_broken_file_of_the_set_is_known_by_its_bytes(pictures: Path) -> None:
    broken = {"sha256": hashlib.sha256(b"no picture").digest()}
    # its looks are not known, but its bytes are enough
    assert Decontaminate(evals=[pictures]).keep(rows(broken, {"sha256": b"x" * 32})).to_list() == [False, None]


def test_embeddings_are_compared_by_cosine(tmp_path: Path) -> None:
    known = rows({"b32_img": [3.0, 0.0]}, {"b32_img": None}, {"b32_img": [0.0, 0.0]})
    known.select("b32_img").write_parquet(tmp_path / "set.parquet")
    pool = rows({"b32_img": [1.0, 0.1]}, {"b32_img": [1.0, 1.0]}, {"b32_img": [-5.0, 0.0]}, {"b32_img": [0.0, 0.0]}, {})
    one = Decontaminate(evals=[tmp_path / "set.parquet"], exact=False, radius=None, min_similarity=0.9)
    assert one.columns() == {"b32_img"}
    assert one.keep(pool).to_list() == [False, True, True, None, None]
    wide = pl.DataFrame({"b32_img": pl.Series([[1.0, 0.0, 0.0]], dtype=pl.List(pl.Float32))})
    wide.write_parquet(tmp_path / "wide.parquet")
    with pytest.raises(DamagedInput, match="another model"):
        Decontaminate(evals=[tmp_path / "wide.parquet"], exact=False, radius=None, min_similarity=0.9).keep(pool)


def test_tables_tars_and_pictures_say_the_same(pictures: Path, tmp_path: Path) -> None:
    for column in ("sha256", "perceptual_hash"):
        values = eval_column(pictures, column)
        (tmp_path / "tables").mkdir(exist_ok=True)
        values.to_frame().write_parquet(tmp_path / "tables" / "part.parquet")
        assert eval_column(tmp_path / "tables", column).equals(values)
    assert len(eval_column(pictures, "sha256")) == 4
    assert len(eval_column(pictures, "perceptual_hash")) == 3
    hexed = pl.DataFrame({"sha256": [b"s" * 32]}).select(pl.col("sha256").bin.encode("hex"))
    hexed.write_parquet(tmp_path / "datacomp.parquet")
    assert eval_column(tmp_path / "datacomp.parquet", "sha256").to_list() == [b"s" * 32]


def test_tars_are_sets() -> None:
    shard = next(Path("data/samples").glob("pool-*.tar"))
    assert eval_files(shard) == (shard,)
    hashes = eval_column(shard, "sha256")
    pool = rows({"sha256": hashes[0], "perceptual_hash": bytes(64)})
    assert Decontaminate(evals=[shard], radius=None).keep(pool).to_list() == [False]


def test_a_changed_set_is_read_again(pictures: Path) -> None:
    one, pool = Decontaminate(evals=[pictures]), rows(row(encoded(picture(5), "PNG")))
    assert one.keep(pool).to_list() == [True]
    (pictures / "5.png").write_bytes(encoded(picture(5), "PNG"))
    assert one.keep(pool).to_list() == [False]
    assert pictures / "5.png" in one.files()


def test_what_is_missing_is_named(tmp_path: Path, pictures: Path) -> None:
    with pytest.raises(MissingInput, match="empty"):
        Decontaminate(evals=[tmp_path / "empty"]).keep(rows({}))
    with pytest.raises(UnknownColumn, match="takes a model"):
        eval_column(pictures, "b32_img")
    pl.DataFrame({"width": [1]}).write_parquet(tmp_path / "no.parquet")
    with pytest.raises(UnknownColumn, match="no column sha256"):
        eval_column(tmp_path / "no.parquet", "sha256")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(DamagedInput, match=r"bad\.parquet"):
        eval_column(tmp_path / "bad.parquet", "sha256")
    with pytest.raises(ConfigError, match="every test is off"):
        parse_filter({"decontaminate": {"evals": ["x"], "exact": False, "radius": None}})
