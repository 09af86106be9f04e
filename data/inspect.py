"""Answers about shards for people: what is in them, whether they are whole, which samples a rank will get."""

import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mmfoundry.data.index import index_shard, open_index, open_indexes, stored_index
from mmfoundry.data.permutation import WINDOW
from mmfoundry.data.reader import Pool
from mmfoundry.data.sampler import Order
from mmfoundry.data.shard_names import Shard, ShardSpec, expand_shards
from mmfoundry.data.storage import Storage
from mmfoundry.data.tar import Damage
from mmfoundry.pipeline.errors import ConfigError, MmfoundryError


@dataclass(frozen=True)
class ShardSummary:
    """What one shard holds: samples, bytes, members and their bytes by extension, damage by reason."""

    shard: Shard
    samples: int
    bytes: int
    members: Counter[str]
    member_bytes: Counter[str]
    damage: Counter[str]


@dataclass(frozen=True)
class Indexed:
    """A shard whose index was made or found.

    Attributes:
        shard: the tar.
        samples: that it has.
        damage: what could not be read.
        kept: whether the index lies in its place; where nothing can be written it does not.
    """

    shard: Shard
    samples: int
    damage: tuple[Damage, ...]
    kept: bool


@dataclass(frozen=True)
class Checked:
    """A shard that was read whole.

    Attributes:
        shard: the tar.
        samples: that it has now.
        compared: whether there was a digest to compare its content with.
        damage: what is wrong with it; empty if nothing is.
    """

    shard: Shard
    samples: int
    compared: bool
    damage: tuple[Damage, ...]


def make_indexes(
    shards: Sequence[Shard],
    index_dir: str | os.PathLike[str] | None = None,
    *,
    digest: bool = False,
    num_workers: int = 1,
) -> Iterator[Indexed]:
    """See that every shard has its index, as `index.open_index` does for one; what was made stays when it is cut off.

    Args:
        shards: from `expand_shards`.
        index_dir: folder for indexes.
        digest: also take the digests that are missing, which reads the shards whole.
        num_workers: processes that share the shards; 1: this one alone.
    Yields:
        What each shard has, in their order.
    Raises:
        MissingInput: a shard is not there.
        StorageError: the server of a remote shard does not give it.
        MmfoundryError: a process was ended from outside.
    """
    make = partial(_make_index, index_dir=index_dir, digest=digest)
    num_workers = min(num_workers, len(shards))
    if num_workers <= 1:
        yield from map(make, shards)
        return
    # spawn: a fork of a process with threads, as those that read from servers, may hang
    with ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn")) as workers:
        try:
            yield from workers.map(make, shards)
        except BrokenProcessPool as error:
            raise MmfoundryError(
                "a process that made indexes ended abruptly (memory?); those that are done are kept: run again with "
                "fewer of them"
            ) from error
        finally:
            workers.shutdown(cancel_futures=True)


def _make_index(shard: Shard, index_dir: str | os.PathLike[str] | None, digest: bool) -> Indexed:
    index = open_index(shard, index_dir=index_dir, digest=digest)
    kept = stored_index(shard, None if index_dir is None else Path(index_dir))
    return Indexed(shard, len(index), index.damage, kept is not None and kept.identity == index.identity)


def iter_keys(
    shards: ShardSpec | Pool,
    *,
    seed: int = 0,
    epoch: int = 0,
    world_size: int = 1,
    rank: int = 0,
    start: int = 0,
    count: int | None = None,
    window: int = WINDOW,
) -> Iterator[str]:
    """The keys that one rank draws, in order, from one source.

    Over all ranks they are exactly positions `start` to `start + count * world_size - 1` of the epoch's order; past its
    end the next epoch follows. It is the order of a `Loader` with these shards as its only source and this seed.

    Args:
        shards: what `shard_names.expand_shards` takes, or a pool.
        seed: of the order.
        epoch: counted from 0.
        world_size: number of ranks.
        rank: whose keys.
        start: position in the epoch, counted over all ranks.
        count: keys of this rank; None: as many as there are from `start` to the end of the epoch.
        window: samples that are shuffled together, as for `Loader`.
    Raises:
        ConfigError: a number is out of range.
        MissingInput: no shards, or no readable sample in them.
    """
    if world_size < 1 or not 0 <= rank < world_size or min(epoch, start, count or 0) < 0:
        raise ConfigError(
            f"rank {rank} of world size {world_size}, epoch {epoch}, start {start}, count {count}: "
            "needs 0 <= rank < world size and no negative number"
        )
    pool = shards if isinstance(shards, Pool) else Pool(shards)
    order = Order([len(pool)], seed=seed, window=window)
    if count is None:
        count = len(range(start + rank, len(pool), world_size))
    first = epoch * len(pool) + start + rank
    return (pool.key(order.at(first + number * world_size).index) for number in range(count))


def describe(shards: ShardSpec, index_dir: str | os.PathLike[str] | None = None) -> list[ShardSummary]:
    """One row a shard, from its index.

    Args:
        shards: what `shard_names.expand_shards` takes.
        index_dir: folder of indexes, as for `index.open_index`.
    Raises:
        MissingInput: no shards.
    """
    rows = []
    for index in open_indexes(expand_shards(shards), index_dir=index_dir):
        members: Counter[str] = Counter()
        member_bytes: Counter[str] = Counter()
        for number, extension in enumerate(index.extensions):
            chosen = index.arrays["extensions"] == number
            members[extension] = int(chosen.sum())
            member_bytes[extension] = int(index.arrays["sizes"][chosen].sum())
        damage = Counter(found.reason for found in index.damage)
        rows.append(ShardSummary(index.shard, len(index), index.shard_bytes, members, member_bytes, damage))
    return rows


def verify(
    shards: ShardSpec, index_dir: str | os.PathLike[str] | None = None, storage: Storage | None = None
) -> Iterator[Checked]:
    """Read every shard whole and compare it with what its index says of it; an index is neither trusted nor written.

    Args:
        shards: what `shard_names.expand_shards` takes.
        index_dir: folder of indexes, as for `index.open_index`.
        storage: how remote shards are read; by default with the default options.
    Yields:
        For each shard what is wrong with it: damage found in the headers now; "content changed" where the SHA-256
        taken when the shard was written or indexed is another one; "gone since indexed" for every key that the index
        has and the shard has no more.
    Raises:
        MissingInput: no shards.
        StorageError: a server does not give its shard.
    """
    folder = Path(index_dir) if index_dir is not None else None
    for shard in expand_shards(shards):
        before = stored_index(shard, folder)
        now = index_shard(shard, digest=True, before=before, storage=storage)
        damage = list(now.damage)
        if before is not None and before.digest and before.digest != now.digest:
            damage.append(Damage(0, "content changed"))
        if before is not None:
            gone = {*before.keys()} - {*now.keys()} - {found.name for found in damage}
            damage += [Damage(now.shard_bytes, "gone since indexed", key) for key in sorted(gone)]
        yield Checked(shard, len(now), before is not None and bool(before.digest), tuple(damage))
