"""New shards from a pool and a subset of its uids, as DataComp's resharder makes them, by many processes.

Three rounds of jobs: each shard of the pool is asked which of its samples are wanted; uids that several samples have
are compared; then each new shard is written by itself. What lies in which new shard follows from pool and subset alone,
not from who does the work: equal inputs give equal bytes.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from mmfoundry.data.columns import uid_of
from mmfoundry.data.decode import UnreadableSample
from mmfoundry.data.executors import Executor
from mmfoundry.data.filters.subset import is_sorted, load_subset, times_in, to_subset, uids_of
from mmfoundry.data.index import drop_index
from mmfoundry.data.new_shards import ReshardOptions, ShardJob, sample_bytes, shard_jobs, write
from mmfoundry.data.reader import Pool
from mmfoundry.data.sample import image_member, read_text
from mmfoundry.data.shard_names import Shard
from mmfoundry.pipeline.artifact import write_atomic
from mmfoundry.pipeline.errors import DamagedInput, MmfoundryError, TooManyUnreadable, UnknownColumn

ACCOUNT = "reshard.json"
_SHOWN = 10  # uids that the account names of each sort
_PLACES = {"uid": pl.String(), "shard": pl.UInt32(), "index": pl.UInt32(), "copies": pl.UInt32(), "bytes": pl.UInt64()}


@dataclass
class Resharded:
    """What became of a subset.

    Attributes:
        asked: entries of the subset; a uid that is there three times counts three times.
        written: samples of the new shards.
        shards: new shards.
        missing: uids of the subset that no readable sample of the pool has.
        repeated: samples left out since an earlier one has their uid.
        conflicting: uids among these whose samples differ in image or captions.
        unreadable: samples by reason.
        examples: a few uids each of "missing" and "conflicting".
    """

    asked: int
    written: int = 0
    shards: int = 0
    missing: int = 0
    repeated: int = 0
    conflicting: int = 0
    unreadable: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class _FindJob:
    """Which samples of one shard are in the subset, or (with `only`) what these samples hold."""

    name: str
    number: int
    shard: Shard
    subset: Path
    options: ReshardOptions
    only: tuple[int, ...] = ()


def reshard(
    pool: Pool,
    subset: Path,
    output: Path,
    executor: Executor,
    options: ReshardOptions | None = None,
    step: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Resharded:
    """Write the samples of a subset into new shards, in the order of the pool.

    A uid that the subset has n times is written n times (upsampling): under the keys `uid`, `uid-1`, `uid-2` ... Where
    several samples of the pool have one uid, the first counts. Beside the shards lies `reshard.json`, the account.

    Args:
        pool: tars; samples whose JSON has no uid get one by `columns.uid_of`.
        subset: file in DataComp's format.
        output: folder; shards of an earlier call are replaced.
        executor: does the work, shard by shard.
        options: limits, and faces.
        step: called with what is done, and how much of how much.
    Raises:
        TooManyUnreadable: past `max_unreadable`.
        MmfoundryError: no uid of the subset is in the pool.
        DamagedInput: not a subset.
        UnknownColumn: `faces` has no such columns.
    """
    options = options or ReshardOptions()
    asked = load_subset(subset)
    if not is_sorted(asked):  # DataComp's resharder would not find what lies out of order
        raise DamagedInput(f"{subset}: its uids are not in order; sort it (numpy.sort) and write it again")
    faces = None if options.faces is None else _scan_faces(options.faces)
    found = Resharded(asked=len(asked))
    found.unreadable.update(damage.reason for _, damage in pool.damage)
    jobs = [_FindJob(s.name, n, s, subset.absolute(), options) for n, s in enumerate(pool.shards)]
    places = [pl.DataFrame(schema=_PLACES)]

    def note(number: int, result: tuple[pl.DataFrame, Counter[str]]) -> None:
        places.append(result[0])
        found.unreadable.update(result[1])
        step("looking for uids", len(places) - 1, len(jobs))

    executor.map(_find, jobs, note)
    total = len(pool) + len(pool.damage)
    if found.unreadable.total() > options.max_unreadable * total:
        said = ", ".join(f"{count} x {reason}" for reason, count in found.unreadable.most_common())
        raise TooManyUnreadable(
            f"{pool.name}: {found.unreadable.total()} of {total} samples cannot be read ({said}); max_unreadable "
            f"allows {options.max_unreadable:.2%}"
        )
    wanted = pl.concat(places).sort("shard", "index")
    wanted = _first_of_each(wanted, jobs, executor, found)
    if not wanted.height:
        raise MmfoundryError(f"{pool.name}: none of the {len(asked)} uids of {subset} is in the pool")
    there = to_subset(wanted["uid"])
    lost = asked[_not_in(asked, there)]
    found.missing = len(np.unique(lost))
    found.examples["missing"] = uids_of(np.unique(lost)[:_SHOWN]).to_list()
    rows = wanted.with_columns(copy=pl.int_ranges(pl.col("copies"))).explode("copy")
    writes = shard_jobs(pool, rows, output, options)
    if faces is not None:
        writes = [_with_faces(job, faces) for job in writes]
    _write_all(writes, output, executor, found, step)
    return found


def _find(job: _FindJob) -> tuple[pl.DataFrame, Counter[str]]:
    """The samples of a shard that the subset has, and what could not be read."""
    pool = Pool(job.shard, index_dir=job.options.index_dir)
    unreadable: Counter[str] = Counter()
    uids: list[str] = []
    numbers: list[int] = []
    for number in range(len(pool)):
        try:
            raw = pool.get(number, ["json"])
            meta = read_text(raw)[2]
            uid = uid_of(raw, meta) if "uid" in meta else ""
            if uid != str(meta.get("uid")).lower():  # made from the whole sample
                uid = uid_of(pool.get(number), meta)
        except UnreadableSample as error:
            unreadable[error.reason] += 1
            continue
        uids.append(uid)
        numbers.append(number)
    times = times_in(load_subset(job.subset), uids)
    chosen = np.flatnonzero(times)
    places = {
        "uid": [uids[place] for place in chosen],
        "shard": [job.number] * len(chosen),
        "index": [numbers[place] for place in chosen],
        "copies": times[chosen],
        "bytes": [sample_bytes(pool, numbers[place]) for place in chosen],
    }
    return pl.DataFrame(places, schema=_PLACES), unreadable


def _first_of_each(
    wanted: pl.DataFrame, jobs: Sequence[_FindJob], executor: Executor, found: Resharded
) -> pl.DataFrame:
    """The first sample of each uid; the others are compared with it and counted."""
    several = wanted.filter(pl.col("uid").is_duplicated())
    if not several.height:
        return wanted
    checks = [
        _FindJob(
            jobs[shard].name, shard, jobs[shard].shard, jobs[shard].subset, jobs[shard].options, tuple(rows["index"])
        )
        for (shard,), rows in several.group_by("shard", maintain_order=True)
    ]
    contents: dict[tuple[int, int], str] = {}
    executor.map(_contents, checks, lambda number, made: contents.update(made))
    several = several.with_columns(
        content=pl.Series([contents[place] for place in several.select("shard", "index").iter_rows()], dtype=pl.String)
    )
    kinds = several.group_by("uid", maintain_order=True).agg(pl.col("content").n_unique())
    conflicting = kinds.filter(pl.col("content") > 1)["uid"]
    found.repeated = several.height - kinds.height
    found.conflicting = len(conflicting)
    found.examples["conflicting"] = conflicting[:_SHOWN].to_list()
    return wanted.unique("uid", keep="first", maintain_order=True)


def _contents(job: _FindJob) -> dict[tuple[int, int], str]:
    """A digest of image and captions of some samples, by shard and index."""
    pool = Pool(job.shard, index_dir=job.options.index_dir)
    made = {}
    for number in job.only:
        try:
            raw = pool.get(number)
            parts = [image_member(raw.members) or b"", *(text.encode("utf-8", "replace") for text in read_text(raw)[0])]
        except UnreadableSample as error:
            parts = [error.reason.encode()]
        digest = hashlib.blake2b(digest_size=16)
        for part in parts:
            digest.update(len(part).to_bytes(8, "little") + part)
        made[job.number, number] = digest.hexdigest()
    return made


def _not_in(asked: np.ndarray, there: np.ndarray) -> np.ndarray:
    return np.searchsorted(there, asked, "right") == np.searchsorted(there, asked, "left")


def _scan_faces(path: Path) -> pl.LazyFrame:
    scan = pl.scan_parquet(path / "*.parquet" if path.is_dir() else path)
    missing = {"uid", "face_bboxes"} - set(scan.collect_schema().names())
    if missing:
        raise UnknownColumn(f"{path}: no column {', '.join(sorted(missing))}; faces are in uid and face_bboxes")
    # a column without any face has the type of nulls
    return scan.select("uid", pl.col("face_bboxes").cast(pl.List(pl.List(pl.Float64)))).unique("uid", keep="any")


def _with_faces(job: ShardJob, faces: pl.LazyFrame) -> ShardJob:
    boxes = faces.join(job.rows.lazy().select("uid").unique(), on="uid", how="semi").collect(engine="streaming")
    rows = job.rows.join(boxes, on="uid", how="left", maintain_order="left")
    return ShardJob(job.path, job.shards, rows, job.options)


def _write_all(
    jobs: Sequence[ShardJob],
    output: Path,
    executor: Executor,
    found: Resharded,
    step: Callable[[str, int, int], None],
) -> None:
    """Write the new shards and the account, and remove what an earlier call left."""
    output.mkdir(parents=True, exist_ok=True)
    (output / ACCOUNT).unlink(missing_ok=True)  # it says that the shards beside it are whole
    kept: set[Path] = set()

    def note(number: int, result: tuple[int, Counter[str]]) -> None:
        found.written += result[0]
        found.shards += bool(result[0])
        found.unreadable.update(result[1])
        if result[0]:
            kept.add(jobs[number].path)
        step("writing shards", number + 1, len(jobs))

    executor.map(write, jobs, note)
    for stale in set(output.glob("shard-*.tar")) - kept:
        drop_index(stale)
        stale.unlink()
    account = asdict(found) | {"unreadable": dict(sorted(found.unreadable.items()))}
    write_atomic(output / ACCOUNT, json.dumps(account, indent=1) + "\n")
