"""New shards written one by one: which samples go into which follows from their order and size alone."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from mmfoundry.data.blur import blur_image
from mmfoundry.data.decode import UnreadableSample
from mmfoundry.data.reader import Pool
from mmfoundry.data.reshard import encoded, rewritten
from mmfoundry.data.sample import IMAGE_EXTENSIONS, RawSample, image_member
from mmfoundry.data.shard_names import Shard
from mmfoundry.data.shards import BLOCK, write_shard
from mmfoundry.data.table import first_samples

_PATTERN = "shard-{:05d}.tar"


@dataclass(frozen=True)
class ReshardOptions:
    """How samples go into new shards.

    Attributes:
        max_count: samples a new shard, at most.
        max_bytes: bytes a new shard, about: what its samples had in the pool.
        max_unreadable: fraction of the pool's samples; past it nothing is written.
        faces: parquet file or folder with "uid" and "face_bboxes" (DataComp's metadata, or `kept/` of a filter run):
            these places are blurred, and named in the JSON. None: pictures keep their bytes.
        index_dir: folder of the pool's indexes; None: beside each shard.
    """

    max_count: int = 10_000
    max_bytes: int = 1 << 30
    max_unreadable: float = 0.01
    faces: Path | None = None
    index_dir: Path | None = None


@dataclass(frozen=True)
class ShardJob:
    """Write one new shard.

    Attributes:
        path: of the new shard.
        shards: of the pool, those that it is made from.
        rows: its samples in order: "uid", "shard" (place in `shards`), "index", "copy", "captions" (list of the
            numbers of those that stay; null: all).
        options: limits do not matter any more here.
    """

    path: Path
    shards: tuple[Shard, ...]
    rows: pl.DataFrame
    options: ReshardOptions

    @property
    def name(self) -> str:
        """The new shard."""
        return self.path.name


def shard_jobs(pool: Pool, rows: pl.DataFrame, folder: Path, options: ReshardOptions) -> list[ShardJob]:
    """Cut samples into new shards; `write` does each.

    Args:
        pool: where the samples are.
        rows: "uid", "shard", "index" in the order of writing, and, if there are any, "copy" (0 for the first time),
            "captions" (numbers of those that stay; null: all) and "bytes" (in the pool).
        folder: of the new shards.
        options: where to cut.
    """
    defaults = {"copy": pl.lit(0, pl.Int64), "captions": pl.lit(None, pl.List(pl.UInt32))}
    rows = rows.with_columns(value.alias(name) for name, value in defaults.items() if name not in rows.columns)
    sizes = rows["bytes"].to_numpy() if "bytes" in rows.columns else _sizes(pool, rows)
    ends = np.cumsum(sizes, dtype=np.uint64)
    rows = rows.drop("bytes", "copies", strict=False)
    jobs: list[ShardJob] = []
    start = 0
    while start < rows.height:
        before = ends[start - 1] if start else np.uint64(0)
        fit = int(np.searchsorted(ends, before + np.uint64(options.max_bytes), "right"))
        end = min(max(fit, start + 1), start + options.max_count)
        part = rows[start:end]
        numbers = part["shard"].unique().sort()
        local = part["shard"].replace_strict(numbers, range(len(numbers)), return_dtype=pl.UInt32)
        shards = tuple(pool.shards[number] for number in numbers)
        path = folder / _PATTERN.format(len(jobs))
        jobs.append(ShardJob(path, shards, part.with_columns(shard=local), options))
        start = end
    return jobs


def write(job: ShardJob) -> tuple[int, Counter[str]]:
    """Write one new shard; returns how many samples it has, and what could not be read, by reason."""
    unreadable: Counter[str] = Counter()
    count = 0

    def samples() -> Iterator[dict[str, Any]]:
        nonlocal count
        pool = Pool(job.shards, index_dir=job.options.index_dir)
        starts = first_samples(pool)
        for row in job.rows.iter_rows(named=True):
            try:
                sample = _sample(pool.get(starts[row["shard"]] + row["index"]), row)
            except UnreadableSample as error:
                unreadable[error.reason] += 1
                continue
            count += 1
            yield sample

    stream = samples()
    first = next(stream, None)
    if first is None:
        return 0, unreadable
    write_shard(job.path, _chained(first, stream))
    return count, unreadable


def _chained(first: dict[str, Any], rest: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield first
    yield from rest


def _sample(raw: RawSample, row: dict[str, Any]) -> dict[str, Any]:
    """One sample for `write_shard`."""
    uid, copy = row["uid"], row["copy"]
    members = {**raw.members, **rewritten(raw, uid, row["captions"])}
    boxes = row.get("face_bboxes")
    if boxes:
        data = image_member(raw.members)
        if data is None:
            raise UnreadableSample("no image")
        kind, blurred = blur_image(data, boxes)
        members = {name: value for name, value in members.items() if name not in IMAGE_EXTENSIONS}
        meta = json.loads(members.get("json", b"{}")) | {"face_bboxes": boxes}
        members |= {kind: blurred, "json": encoded(meta)}
    return {"__key__": f"{uid}-{copy}" if copy else uid, **members}


def sample_bytes(pool: Pool, number: int) -> int:
    """Bytes that a sample takes in its shard."""
    index, local = pool.locate(number)
    return sum(BLOCK + -(-member.size // BLOCK) * BLOCK for member in index.members(local))


def _sizes(pool: Pool, rows: pl.DataFrame) -> np.ndarray:
    starts = first_samples(pool)
    places = zip(rows["shard"], rows["index"], strict=True)
    return np.array([sample_bytes(pool, starts[shard] + index) for shard, index in places], np.uint64)
