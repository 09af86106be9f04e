"""From a shard to its metadata table.

The rows are pairs (see `filters/base.py`); the columns are those of `columns.py` that somebody asked for. What a pool's
JSON says under `truth` goes into a table of its own, which reports read and filters never see.
"""

import io
import json
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import polars as pl

from mmfoundry.data.columns import rows_of, schema, unreadable_row
from mmfoundry.data.decode import DecodeLimits, UnreadableSample
from mmfoundry.data.index import open_index
from mmfoundry.data.reader import Pool
from mmfoundry.data.sample import RawSample
from mmfoundry.data.shard_names import Shard
from mmfoundry.pipeline.artifact import write_atomic

TRUTH_SCHEMA = {"uid": pl.String(), "bad": pl.String(), "of": pl.String()}


@dataclass(frozen=True)
class Request:
    """What is asked of every shard.

    Attributes:
        columns: names of the columns.
        limits: what an image may weigh.
        index_dir: folder of the shards' indexes; None: beside each.
    """

    columns: frozenset[str]
    limits: DecodeLimits
    index_dir: Path | None = None


def describe_shard(request: Request, number: int, shard: Shard) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The table of one shard, and what its samples say about themselves under `truth`.

    Args:
        request: columns and limits.
        number: of the shard in the pool.
        shard: the tar.
    Returns:
        The table, and "uid", `bad` (None for a good pair) and `of` (the uid that a duplicate repeats), often empty.
    """
    rows: list[dict[str, Any]] = []
    truth: list[dict[str, Any]] = []
    if len(open_index(shard, index_dir=request.index_dir)):
        pool = Pool(shard, index_dir=request.index_dir)
        for place in range(len(pool)):
            try:
                raw = pool.get(place)
            except UnreadableSample as error:
                rows.append(unreadable_row(RawSample(pool.key(place), {}, shard), number, place, error.reason))
                continue
            of_sample = rows_of(raw, number, place, request.columns, request.limits)
            rows += of_sample
            truth += [{"uid": of_sample[0]["uid"]} | said for said in truth_of(raw)]
    table = pl.DataFrame(rows, schema=schema(request.columns), orient="row")
    return table, pl.DataFrame(truth, schema=TRUTH_SCHEMA, orient="row")


def first_samples(pool: Pool) -> list[int]:
    """The pool's number of each shard's sample 0."""
    return [0, *accumulate(len(index) for index in pool.indexes)][:-1]


def truth_of(raw: RawSample) -> list[dict[str, str | None]]:
    """What a sample's JSON says under `truth`, at most one row; a sample that says nothing has none."""
    data = raw.members.get("json", b"")
    if b'"truth"' not in data:  # almost all pools; saves a second parse of every JSON
        return []
    try:
        meta = json.loads(data)
    except (ValueError, RecursionError):  # counted as unreadable where the captions are read
        return []
    said = meta.get("truth") if isinstance(meta, dict) else None
    if not isinstance(said, dict):
        return []
    return [{name: said[name] if isinstance(said.get(name), str) else None for name in ("bad", "of")}]


def write_parquet(table: pl.DataFrame, path: Path) -> None:
    """Write a parquet file of a stage's output whole or not at all, the same bytes for the same table."""
    buffer = io.BytesIO()
    table.write_parquet(buffer)
    write_atomic(path, buffer.getvalue(), sync=False)
