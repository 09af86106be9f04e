"""The parts of a pool, as filters look at it: tar shards with their tables, or DataComp's metadata files.

DataComp's metadata (Gadre et al. 2023, arXiv 2304.14108, appendix) is parquet with `uid`, `url`, `text`,
`original_width`, `original_height`, `clip_b32_similarity_score`, `clip_l14_similarity_score`, `face_bboxes` and
`sha256`, and beside each file an npz of the same name with the embeddings `b32_img`, `b32_txt`, `l14_img`, `l14_txt`.
"""

from __future__ import annotations

import glob
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
from braceexpand import braceexpand

from mmfoundry.data.columns import IDENTITY, JSON_PREFIX, UID_NUMBERS, column_named
from mmfoundry.data.table_cache import key_of
from mmfoundry.data.uids import high_low, numbers_of
from mmfoundry.pipeline.errors import DamagedInput, MissingInput, UnknownColumn

MAX_ROWS = 1 << 18  # of a metadata file that are one part, so that no worker holds more; a row group as polars writes
_OF_UID = ("uid", "unreadable", *UID_NUMBERS)
_RENAMED = {"caption": "text", "width": "original_width", "height": "original_height"}
EMBEDDINGS = ("b32_img", "b32_txt", "l14_img", "l14_txt")


class Part(ABC):
    """Some rows of a pool; sent to worker processes."""

    number: int
    name: str  # the file that it is of, for people and outputs
    identity: str  # what its content depends on, as hex digits: equal identities, equal rows

    @abstractmethod
    def read(self, columns: Collection[str]) -> pl.DataFrame:
        """The rows with these columns, none of them derived; `shard` is the part's number, `UID_NUMBERS` the uid's.

        Raises:
            DamagedInput: the file cannot be read; named.
        """


@dataclass(frozen=True)
class TablePart(Part):
    """A tar shard whose table, and the tables of models' columns, were made before.

    Attributes:
        tables: parquet files of the same rows, each with columns of its own.
    """

    number: int
    name: str
    identity: str
    tables: tuple[Path, ...]

    def read(self, columns: Collection[str]) -> pl.DataFrame:
        """As `Part.read`."""
        found: list[pl.Series] = []
        numbers = UID_NUMBERS.keys() & columns
        left = (set(columns) | ({"uid"} if numbers else set())) - {"shard", *numbers}
        for path in self.tables:
            here = [name for name in pl.read_parquet_schema(path) if name in left]
            if here:
                found += pl.read_parquet(path, columns=here).get_columns()
            left -= set(here)
        if left:
            raise UnknownColumn(f"{self.name}: no column {', '.join(sorted(left))}")
        table = pl.DataFrame(found)
        if numbers:
            table = table.with_columns(*high_low())
        return _with_number(table if "uid" in columns else table.drop("uid", strict=False), self.number, columns)


@dataclass(frozen=True)
class MetadataPart(Part):
    """Rows `start` to `start + count` of a metadata file.

    `uid` is put into lower case; a row whose uid is not 32 hex digits is unreadable and gets one of its own. `caption`
    is `text` as it is.
    """

    number: int
    name: str
    identity: str
    path: Path
    start: int
    count: int

    def read(self, columns: Collection[str]) -> pl.DataFrame:
        """As `Part.read`."""
        known = pl.read_parquet_schema(self.path)
        embeddings = [name for name in columns if name in EMBEDDINGS and name not in known]
        of_uid = [name for name in columns if name in _OF_UID]
        others = sorted(set(columns) - {"shard", *embeddings, *of_uid})
        wanted = [self._expression(name, known) for name in others]
        wanted += [pl.col("uid").cast(pl.String)] if of_uid else []
        here = {name for one in wanted for name in one.meta.root_names()} - {"__row"}
        try:
            table = self._rows(sorted(here)).select(*wanted, "__row")
        except (pl.exceptions.PolarsError, OSError) as error:
            raise DamagedInput(f"{self.path}: cannot be read ({_first_line(error)})") from error
        if of_uid:
            table = table.drop("uid").with_columns(self._of_uid(table["uid"], table["__row"], of_uid))
        for name in embeddings:
            rows = npz_rows(self.path.with_suffix(".npz"), name, self.start, self.count)
            table = table.with_columns(pl.Series(name, rows.astype(np.float32, copy=False)).cast(pl.List(pl.Float32)))
        return _with_number(table.drop("__row"), self.number, columns)

    def _rows(self, columns: Sequence[str]) -> pl.DataFrame:
        """Columns of the file, of which nothing is read where there are none, and "__row", the number of each row."""
        rows = pl.int_range(self.start, self.start + self.count, dtype=pl.UInt32, eager=True).alias("__row")
        if not columns:
            return rows.to_frame()
        table = pl.scan_parquet(self.path, glob=False).slice(self.start, self.count).select(columns).collect()
        if table.height != self.count:
            raise DamagedInput(f"{self.path}: has changed since the run began")
        return table.with_columns(rows)

    def _of_uid(self, uids: pl.Series, rows: pl.Series, wanted: Collection[str]) -> list[pl.Series]:
        """What is asked for of uids: themselves, their numbers, or why they are none."""
        numbers = numbers_of(uids)
        if numbers is not None:
            found = numbers.with_columns(unreadable=pl.lit(None, pl.String))
            if "uid" in wanted:
                found = found.with_columns(uids.str.to_lowercase())
            return found.select(wanted).get_columns()
        is_uid = pl.col("uid").str.contains(r"^[0-9a-f]{32}$").fill_null(False)
        made = pl.lit(self.identity[:22]) + rows.cast(pl.String).str.zfill(10)
        reason = pl.when(~is_uid).then(pl.lit("uid is not 32 hex digits"))
        found = (
            uids.str.to_lowercase().to_frame().select(pl.when(is_uid).then("uid").otherwise(made), unreadable=reason)
        )
        return found.with_columns(*high_low()).select(wanted).get_columns()

    def _expression(self, name: str, known: Collection[str]) -> pl.Expr:
        """How a column of ours is had from the file's."""
        row = pl.col("__row").cast(pl.UInt32)
        match name:
            case "index":
                return row.alias(name)
            case "caption_index":
                made = pl.lit(0, pl.UInt32)
                if _lacks_text(self.path, self.path.stat().st_mtime_ns):
                    made = pl.when(pl.col("text").is_not_null()).then(made)
                return made.alias(name)
            case "key":
                return (pl.col("key") if "key" in known else pl.lit(None)).cast(pl.String).alias(name)
            case "width" | "height":
                return pl.col(_RENAMED[name]).cast(pl.UInt32, strict=False).alias(name)
            case "aspect":
                sides = [pl.col(_RENAMED[side]).cast(pl.Float64, strict=False) for side in ("width", "height")]
                known_size = (sides[0] > 0) & (sides[1] > 0)
                return pl.when(known_size).then(pl.max_horizontal(sides) / pl.min_horizontal(sides)).alias(name)
            case "caption":
                return pl.col("text").cast(pl.String).alias(name)
            case "sha256":
                return pl.col("sha256").str.decode("hex", strict=False).alias(name)
        if name.startswith(JSON_PREFIX):
            return pl.col(name.removeprefix(JSON_PREFIX)).cast(pl.String, strict=False).alias(name)
        return pl.col(name)


def metadata_files(pool: Path) -> list[Path]:
    """The metadata files of a pool: a parquet file, a pattern, a folder of them, or one that has it as `metadata`.

    Returns:
        Sorted; empty where the pool is one of tars.
    """
    if pool.is_file():
        return [pool] if pool.suffix == ".parquet" else []
    if not pool.is_dir():
        if pool.suffix != ".parquet":
            return []
        names = {name for pattern in braceexpand(str(pool)) for name in glob.glob(pattern, recursive=True)}
        return [Path(name) for name in sorted(names)]
    folder = pool / "metadata" if (pool / "metadata").is_dir() else pool
    if folder == pool and any(pool.glob("*.tar")):
        return []  # img2dataset lays a parquet file beside each tar; the tar says the same
    return sorted(path for path in folder.glob("*.parquet") if not path.name.startswith("."))


def metadata_parts(files: Sequence[Path], columns: Collection[str]) -> tuple[list[MetadataPart], dict[Path, str]]:
    """Cut metadata files into parts.

    Args:
        files: from `metadata_files`.
        columns: those that will be read, none of them derived.
    Returns:
        The parts, and why files were left out that cannot be read at all.
    Raises:
        UnknownColumn: a file lacks a column; named, before anything is read.
        MissingInput: no file can be read, or none has a row.
    """
    parts: list[MetadataPart] = []
    damaged: dict[Path, str] = {}
    for path in files:
        try:
            known = pl.read_parquet_schema(path)
            rows = int(pl.scan_parquet(path, glob=False).select(pl.len()).collect().item())
        except (pl.exceptions.PolarsError, OSError) as error:
            damaged[path] = _first_line(error)
            continue
        _require(path, known, columns)
        state = path.stat()
        pieces = -(-rows // MAX_ROWS)  # 0 of a file without rows
        # of one size, so that no worker is done early
        cuts = [rows * piece // pieces for piece in range(pieces + 1)] if pieces else []
        for start, end in pairwise(cuts):
            identity = key_of(path.name, state.st_size, state.st_mtime_ns, start)
            parts.append(MetadataPart(len(parts), path.name, identity, path, start, end - start))
    if not parts:
        why = f" ({next(iter(damaged.values()))})" if damaged else ""
        raise MissingInput(f"{files[0].parent}: no row in its {len(files)} parquet files{why}")
    return parts, damaged


def _require(path: Path, known: Collection[str], columns: Collection[str]) -> None:
    for name in sorted({"uid", "text", *columns} - {"caption", *UID_NUMBERS, *set(IDENTITY) - {"uid"}}):
        source = name.removeprefix(JSON_PREFIX)
        needed = {"aspect": ["original_width", "original_height"]}.get(name, [_RENAMED.get(name, source)])
        missing = [each for each in needed if each not in known]
        if not missing:
            continue
        if name in EMBEDDINGS:
            npz = path.with_suffix(".npz")
            if not npz.is_file():
                raise UnknownColumn(f"{path}: a filter reads {name}, and there is no {npz.name} beside it")
            continue
        column = column_named(name)
        where = (
            "has to be computed from images, which a pool of metadata has none of"
            if (column is not None and column.needs in ("bytes", "pixels", "model", "header"))
            else "is not there"
        )
        raise UnknownColumn(f"{path}: a filter reads {', '.join(missing)}, which {where}")


@lru_cache(maxsize=64)
def _lacks_text(path: Path, modified: int) -> bool:
    """Whether a row of a file has no text: where the file's statistics tell, its texts are not read for that."""
    without = pl.scan_parquet(path, glob=False).filter(pl.col("text").is_null()).select("text")
    return bool(without.head(1).collect().height)


def npz_rows(path: Path, name: str, start: int, count: int) -> np.ndarray:
    """Some rows of an array in an npz file, without reading the others into memory.

    Raises:
        DamagedInput: no such array, or not such a file; arrays of objects are refused.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            version = np.lib.format.read_magic(file)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, fortran, dtype = read_header(file)
            if dtype.hasobject or fortran or len(shape) != 2 or start + count > shape[0]:
                raise DamagedInput(
                    f"{path}: {name} is {dtype} {shape}; one row of numbers is needed for each of the file's"
                )
            row_bytes = dtype.itemsize * shape[1]
            file.seek(start * row_bytes, 1)
            data = file.read(count * row_bytes)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DamagedInput(f"{path}: {name} cannot be read ({_first_line(error)})") from error
    if len(data) != count * row_bytes:
        raise DamagedInput(f"{path}: {name} is cut off")
    return np.frombuffer(data, dtype).reshape(count, shape[1])


def _with_number(table: pl.DataFrame, number: int, columns: Collection[str]) -> pl.DataFrame:
    return table.with_columns(shard=pl.lit(number, pl.UInt32)) if "shard" in columns else table


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
