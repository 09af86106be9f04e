"""What people have -> our shards: a folder of pictures, a table of paths, or tars written by something else.

Bytes are kept as they are. What cannot be taken is named and counted (`tally.py`), and past a limit the work stops.
"""

import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmfoundry.data.decode import UnreadableSample, image_size
from mmfoundry.data.reader import MAX_MEMBER_BYTES, Pool
from mmfoundry.data.sample import IMAGE_EXTENSIONS
from mmfoundry.data.shard_names import COMPRESSED, shown
from mmfoundry.data.shards import write_shards
from mmfoundry.data.tally import Skip, Tally
from mmfoundry.pipeline.errors import DamagedInput, MissingInput, UnknownColumn
from mmfoundry.pipeline.urls import is_url

TABLES = (".csv", ".tsv", ".parquet", ".jsonl")
_TEXTS = ("txt", "json")
_ROWS = 1000  # of a table, read at a time


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """How a source becomes shards.

    Attributes:
        image_column: of a table: paths of the pictures.
        caption_column: of a table: captions, a string or a list of them; a table may have none.
        images: folder that a table's paths start from and stay inside; by default the table's own.
        max_count: samples per shard, at most.
        max_bytes: bytes per shard, at most.
        max_unreadable: fraction of the samples that may be left out; see `tally.Tally` for the rule.
    """

    image_column: str = "image"
    caption_column: str = "caption"
    images: Path | None = None
    max_count: int = 10_000
    max_bytes: int = 1 << 30
    max_unreadable: float = 0.01


def convert(source: str, output: Path, options: ConvertOptions | None = None) -> tuple[list[Path], Tally]:
    """Write `source` as shards, the same bytes for the same source.

    Args:
        source: a folder of pictures with `.txt` and `.json` files of the same name; a table (`.csv`, `.tsv`,
            `.parquet`, `.jsonl`) with a column of paths, whose other columns become metadata; or tars, as
            `shard_names.expand_shards` takes them, or compressed ones.
        output: folder for the shards; what is left out is listed in its `left_out.jsonl`.
        options: the defaults if None.
    Returns:
        The shards, and the count of what was read and left out.
    Raises:
        MissingInput: nothing there, or nothing that could be taken.
        UnknownColumn: the table lacks the column of paths.
        DamagedInput: the table cannot be read.
        TooManyUnreadable: past `max_unreadable`.
    """
    options = options or ConvertOptions()
    output.mkdir(parents=True, exist_ok=True)
    log = output / "left_out.jsonl"
    log.unlink(missing_ok=True)
    tally = Tally(options.max_unreadable, log)
    place = Path(source)
    if not is_url(source) and place.suffix.lower() in TABLES:
        samples = table_samples(place, tally, options)
    elif place.is_dir() and next(place.rglob("*.tar*"), None) is None:
        samples = folder_samples(place, tally)
    elif source.endswith(COMPRESSED) or (place.is_dir() and next(place.rglob("*.tar"), None) is None):
        samples = stream_samples(source, tally)
    else:
        samples = shard_samples(source, tally)
    unique = _without_repeats(samples, tally, shown(source), options.max_count)
    shards = write_shards(unique, output, max_count=options.max_count, max_bytes=options.max_bytes)
    if not shards:
        raise MissingInput(f"{shown(source)}: nothing in it that could become a sample; see {log}")
    return shards, tally


def folder_samples(folder: Path, tally: Tally) -> Iterator[dict[str, Any]]:
    """The pictures of a folder and those below it, in order of their paths, each with its `.txt` and `.json`.

    The key is the path without extension, with `_` for dots in its last part.
    """
    for current, folders, names in os.walk(folder):
        folders.sort()
        found: dict[str, dict[str, str]] = {}
        for name in sorted(names):
            stem, _, extension = name.rpartition(".")
            if stem and extension.lower() in (*IMAGE_EXTENSIONS, *_TEXTS):
                found.setdefault(stem, {})[extension.lower()] = name
        for stem, members in found.items():
            if not {*members} & {*IMAGE_EXTENSIONS}:
                continue
            key = (Path(current).relative_to(folder) / stem.replace(".", "_")).as_posix()
            try:
                payloads = {kind: _read_inside(Path(current) / name, folder) for kind, name in members.items()}
                for kind in {*payloads} & {*IMAGE_EXTENSIONS}:
                    image_size(payloads[kind])
            except UnreadableSample as error:
                tally.add(1, [Skip(str(folder), current, key, error.reason, error.detail)])
                continue
            tally.add(1)
            yield {"__key__": key, **payloads}


def table_samples(table: Path, tally: Tally, options: ConvertOptions) -> Iterator[dict[str, Any]]:
    """One sample a row of a table, keyed by the row's number; columns other than picture and caption go to its JSON."""
    folder = options.images or table.parent
    for number, row in enumerate(_rows(table, options)):
        key = f"{number:09d}"
        path = row.pop(options.image_column, None)
        captions = row.pop(options.caption_column, None)
        try:
            if not isinstance(path, str) or not path:
                raise UnreadableSample("no image", f"{options.image_column} is empty")
            kind = Path(path).suffix.lower().removeprefix(".")
            if kind not in IMAGE_EXTENSIONS:
                raise UnreadableSample("unknown image format", path)
            data = _read_inside(folder / path, folder)
            image_size(data)
        except UnreadableSample as error:
            tally.add(1, [Skip(str(table), str(table), key, error.reason, error.detail)])
            continue
        tally.add(1)
        sample: dict[str, Any] = {"__key__": key, kind: data}
        said = captions if isinstance(captions, list) else [captions]
        lines = [" ".join(str(line).split()) for line in said if line is not None]
        if text := "\n".join(line for line in lines if line):
            sample["txt"] = text
        if row:
            sample["json"] = row
        yield sample


def shard_samples(source: str, tally: Tally) -> Iterator[dict[str, Any]]:
    """The samples of tars, in their order, with their own keys; damage in the tars is counted, too."""
    pool = Pool(source, save_index=False)
    for skip in pool.damage_skips():
        tally.add(1, [skip])
    for number in range(len(pool)):
        try:
            raw = pool.get(number)
        except UnreadableSample as error:
            tally.add(1, [pool.skip(number, error)])
            continue
        tally.add(1)
        yield {"__key__": raw.key, **raw.members}


def stream_samples(source: str, tally: Tally) -> Iterator[dict[str, Any]]:
    """The samples of compressed tars, each of which is unpacked to a temporary file."""
    from mmfoundry.data.stream import Stream

    stream = Stream(source, max_unreadable=tally.limit)
    stream.tally = tally
    for raw in stream:
        yield {"__key__": raw.key, **raw.members}


def _rows(table: Path, options: ConvertOptions) -> Iterator[dict[str, Any]]:
    import polars as pl

    if not table.is_file():
        raise MissingInput(f"{table}: no such table")
    try:
        if table.suffix.lower() == ".parquet":
            frame = pl.scan_parquet(table, glob=False)
        elif table.suffix.lower() == ".jsonl":
            frame = pl.scan_ndjson(table)
        else:  # everything as text: a column of numbers would lose its leading zeros
            separator = "\t" if table.suffix.lower() == ".tsv" else ","
            frame = pl.scan_csv(table, glob=False, separator=separator, infer_schema=False)
        columns = frame.collect_schema().names()
        if options.image_column not in columns:
            raise UnknownColumn(
                f"{table}: no column {options.image_column!r} for the pictures' paths; it has {', '.join(columns)}"
            )
        for batch in frame.collect_batches(chunk_size=_ROWS, maintain_order=True):
            for row in batch.iter_rows(named=True):
                yield {name: _plain(value) for name, value in row.items() if value is not None}
    except pl.exceptions.PolarsError as error:
        raise DamagedInput(f"{table}: cannot be read as {table.suffix[1:]}: {error}") from error


def _plain(value: Any) -> Any:
    """A value as JSON has it; what JSON lacks becomes text."""
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return str(value)


def _read_inside(path: Path, folder: Path) -> bytes:
    """A file's bytes; refused where it lies outside `folder`, also by a link, or is too large for a sample."""
    try:
        place = Path(os.path.realpath(path, strict=True))
        if not place.is_relative_to(folder.resolve()):
            raise UnreadableSample("outside the folder", str(path))
        if not place.is_file():
            raise UnreadableSample("no file", str(path))
        if place.stat().st_size > MAX_MEMBER_BYTES:
            raise UnreadableSample("too many bytes", f"{path}: {place.stat().st_size} > {MAX_MEMBER_BYTES}")
        return place.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UnreadableSample("no file", str(path)) from error
    except (OSError, ValueError) as error:  # no permission, a loop of links, a name that no file can have
        raise UnreadableSample("cannot be read", f"{path}: {error}") from error


def _without_repeats(
    samples: Iterable[dict[str, Any]], tally: Tally, source: str, max_count: int
) -> Iterator[dict[str, Any]]:
    """Leave out a key that came among the last `max_count`: it could not be told apart in its shard."""
    last: deque[str] = deque()
    seen: set[str] = set()
    for sample in samples:
        key = sample["__key__"]
        reason = "duplicate key" if key in seen else "unsafe path" if "" in key.split("/") else None
        if reason is not None:
            tally.add(0, [Skip(source, source, key, reason)])
            continue
        if len(last) == max_count:
            seen.discard(last.popleft())
        last.append(key)
        seen.add(key)
        yield sample
