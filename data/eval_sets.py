"""What must not be trained on: bytes, looks and embeddings of evaluation sets, from tables, tars or pictures."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import polars as pl

from mmfoundry.data.decode import UnreadableSample, decode_image
from mmfoundry.data.perceptual import perceptual_hash
from mmfoundry.data.reader import Pool
from mmfoundry.data.sample import image_member
from mmfoundry.pipeline.errors import DamagedInput, MissingInput, UnknownColumn

_PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif"})
_COMPUTED = ("sha256", "perceptual_hash")


def eval_files(path: Path) -> tuple[Path, ...]:
    """The files of an evaluation set: itself, or in a folder and below all tables; without one all tars; or pictures.

    Raises:
        MissingInput: there is nothing of these.
    """
    if path.is_file():
        return (path,)
    files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else []
    for kinds in ({".parquet"}, {".tar"}, _PICTURES):
        found = tuple(one for one in files if one.suffix.lower() in kinds)
        if found:
            return found
    raise MissingInput(f"{path}: no table (parquet), tar or picture of an evaluation set there")


def eval_column(path: Path, column: str) -> pl.Series:
    """One column of an evaluation set, without nulls.

    Args:
        path: a table or folder of tables that has the column, such as a filter run's `table/`; or tars or pictures, of
            which "sha256" and "perceptual_hash" are computed here, where pictures that cannot be decoded have no hash.
        column: its name.
    Raises:
        MissingInput: there is nothing.
        UnknownColumn: tables lack the column, or it takes a model and there are no tables.
        DamagedInput: a table cannot be read.
    """
    files = eval_files(path)
    if files[0].suffix.lower() == ".parquet":
        return _of_tables(files, column)
    if column not in _COMPUTED:
        raise UnknownColumn(
            f"{path}: {column} takes a model: give tables that have it, as `mmfoundry filter` writes them"
        )
    values = []
    for data in _pictures(files):
        if column == "sha256":
            values.append(hashlib.sha256(data).digest())
            continue
        try:
            values.append(perceptual_hash(decode_image(data)))
        except UnreadableSample:
            continue
    return pl.Series(column, values, dtype=pl.Binary)


def _of_tables(files: tuple[Path, ...], column: str) -> pl.Series:
    found = []
    for file in files:
        try:
            if column not in pl.read_parquet_schema(file):
                raise UnknownColumn(f"{file} has no column {column}")
            found.append(pl.read_parquet(file, columns=[column])[column].drop_nulls())
        except (pl.exceptions.PolarsError, OSError) as error:
            raise DamagedInput(f"{file}: not a table: {str(error).splitlines()[0][:200]}") from error
    series = pl.concat(found)
    if column == "sha256" and series.dtype == pl.String:  # as in DataComp's metadata
        return series.str.decode("hex", strict=False).drop_nulls()
    return series


def _pictures(files: tuple[Path, ...]) -> Iterator[bytes]:
    if files[0].suffix.lower() != ".tar":
        yield from (file.read_bytes() for file in files)
        return
    pool = Pool([str(file) for file in files], save_index=False)
    for number in range(len(pool)):
        try:
            data = image_member(pool.get(number).members)
        except UnreadableSample:
            continue
        if data is not None:
            yield data
