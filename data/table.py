"""From a pool of shards to its metadata table: one parquet file a shard, so that a cut-off run reads no shard twice.

The rows are pairs (see `filters/base.py`); the columns are those of `columns.py` that somebody asked for. What a pool's
JSON says under `truth` goes into files of its own, which reports read and filters never see.
"""

import io
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import polars as pl

from mmfoundry.data.columns import rows_of, schema, unreadable_row
from mmfoundry.data.decode import DecodeLimits, UnreadableSample
from mmfoundry.data.index import ShardIndex, open_index
from mmfoundry.data.reader import Pool
from mmfoundry.data.sample import RawSample
from mmfoundry.data.shard_names import Shard
from mmfoundry.pipeline.artifact import write_atomic
from mmfoundry.pipeline.errors import MmfoundryError

TRUTH_SCHEMA = {"uid": pl.String(), "bad": pl.String(), "of": pl.String()}
_SMALL_POOL = 5000  # samples; below it, starting processes takes longer than the work


@dataclass(frozen=True)
class Request:
    """What is asked of every shard.

    Attributes:
        columns: names of the columns.
        limits: what an image may weigh.
        folder: where the tables go: `table/00000.parquet`, and `truth/00000.parquet` where a shard has truth.
    """

    columns: frozenset[str]
    limits: DecodeLimits
    folder: Path

    def table_path(self, shard: int) -> Path:
        """The table of a shard, by its number in the pool."""
        return self.folder / "table" / f"{shard:05d}.parquet"

    def scores_path(self, shard: int) -> Path:
        """What a model makes of the shard's pairs."""
        return self.folder / "scores" / f"{shard:05d}.parquet"

    def truth_path(self, shard: int) -> Path:
        """What the shard's samples say about themselves under `truth`."""
        return self.folder / "truth" / f"{shard:05d}.parquet"


def describe_shards(
    request: Request,
    shards: Sequence[tuple[int, ShardIndex]],
    num_workers: int | None,
    done: Callable[[int], None],
) -> None:
    """Write the tables of shards; those that are there already are left as they are.

    Args:
        request: columns, limits and place.
        shards: number in the pool, and index.
        num_workers: processes; None takes one a core, or this process alone for a small pool.
        done: called with the number of each shard whose table is there; may raise to stop.
    Raises:
        MmfoundryError: a worker process died.
        NotEnoughSpace: the disk is full; the tables written before are whole.
    """
    waiting = []
    for number, index in shards:
        if request.table_path(number).is_file():
            done(number)
        else:
            waiting.append((number, index))
    if num_workers is None:
        small = sum(len(index) for _, index in waiting) < _SMALL_POOL
        num_workers = 1 if small else os.cpu_count() or 1
    num_workers = min(num_workers, len(waiting))
    if num_workers <= 1:
        for number, index in waiting:
            describe_shard(request, number, index.shard)
            done(number)
        return
    # spawn: polars' threads do not survive a fork
    with ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn")) as workers:
        tasks = {workers.submit(describe_shard, request, n, index.shard): n for n, index in waiting}
        try:
            for task in as_completed(tasks):
                task.result()
                done(tasks[task])
        except BrokenProcessPool as error:
            raise MmfoundryError(
                "a worker process ended abruptly (memory?); finished shards are kept: run again with fewer num_workers"
            ) from error
        finally:
            workers.shutdown(cancel_futures=True)


def describe_shard(request: Request, number: int, shard: Shard) -> None:
    """Write the table of one shard, and its truth if it has any."""
    rows: list[dict[str, Any]] = []
    truth: list[dict[str, Any]] = []
    if len(open_index(shard)):
        pool = Pool(shard)
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
    if truth:
        write_parquet(pl.DataFrame(truth, schema=TRUTH_SCHEMA, orient="row"), request.truth_path(number))
    # last: where it is, the shard is done
    write_parquet(table, request.table_path(number))


def read_table(request: Request, shards: int) -> pl.DataFrame:
    """The table of the whole pool, in the order of its shards, with the scores of models where there are any."""
    return pl.concat([_read_shard(request, number) for number in range(shards)])


def _read_shard(request: Request, number: int) -> pl.DataFrame:
    table = pl.read_parquet(request.table_path(number))
    path = request.scores_path(number)
    if not path.is_file():
        return table
    # nulls are equal here: a sample without captions has no scores and must stay one row
    on = ["shard", "index", "caption_index"]
    return table.join(pl.read_parquet(path), on=on, how="left", nulls_equal=True, maintain_order="left")


def read_truth(request: Request, shards: int) -> pl.DataFrame:
    """uid, `bad` (None for a good pair) and `of` (the uid that a duplicate repeats) of the samples that say so."""
    paths = [path for number in range(shards) if (path := request.truth_path(number)).is_file()]
    return pl.concat([pl.DataFrame(schema=TRUTH_SCHEMA), *(pl.read_parquet(path) for path in paths)])


def first_samples(pool: Pool) -> list[int]:
    """The pool's number of each shard's sample 0."""
    return [0, *accumulate(len(index) for index in pool.indexes)][:-1]


def unreadable_counts(request: Request, shard: int) -> Counter[str]:
    """Samples of a finished shard that cannot be used, by reason."""
    rows = pl.read_parquet(request.table_path(shard), columns=["index", "unreadable"])
    samples = rows.drop_nulls().unique("index")
    return Counter(samples["unreadable"].to_list())


def unreadable_keys(request: Request, shard: int) -> list[str]:
    """Keys of the samples of a finished shard that cannot be used, in its order."""
    rows = pl.read_parquet(request.table_path(shard), columns=["key", "unreadable"])
    return rows.drop_nulls()["key"].unique(maintain_order=True).to_list()


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
    """Write a parquet file whole or not at all, the same bytes for the same table."""
    buffer = io.BytesIO()
    table.write_parquet(buffer)
    write_atomic(path, buffer.getvalue())
