"""Answers about shards for people: what is in them, whether they are whole, which samples a rank will get."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mmfoundry.data.index import ShardSpec, expand_shards, index_shard, open_index, stored_index
from mmfoundry.data.reader import Pool
from mmfoundry.data.sampler import Order
from mmfoundry.data.tar import Damage
from mmfoundry.pipeline.errors import ConfigError


@dataclass(frozen=True)
class ShardSummary:
    """What one shard holds: samples, bytes, members and their bytes by extension, damage by reason."""

    shard: Path
    samples: int
    bytes: int
    members: Counter[str]
    member_bytes: Counter[str]
    damage: Counter[str]


@dataclass(frozen=True)
class Finding:
    """Something wrong with a shard."""

    shard: Path
    damage: Damage


def iter_keys(
    shards: ShardSpec,
    *,
    seed: int = 0,
    epoch: int = 0,
    world_size: int = 1,
    rank: int = 0,
    start: int = 0,
    count: int,
) -> Iterator[str]:
    """The keys that one rank draws, in order, from one source.

    Over all ranks they are exactly positions `start` to `start + count * world_size - 1` of the epoch's order; past its
    end the next epoch follows. It is the order of a `Loader` with these shards as its only source and this seed.

    Args:
        shards: what `index.expand_shards` takes.
        seed: of the order.
        epoch: counted from 0.
        world_size: number of ranks.
        rank: whose keys.
        start: position in the epoch, counted over all ranks.
        count: keys of this rank.
    Raises:
        ConfigError: a number is out of range.
        MissingInput: no shards, or no readable sample in them.
    """
    if world_size < 1 or not 0 <= rank < world_size or min(epoch, start, count) < 0:
        raise ConfigError(
            f"rank {rank} of world size {world_size}, epoch {epoch}, start {start}, count {count}: "
            "needs 0 <= rank < world size and no negative number"
        )
    pool = Pool(shards)
    order = Order([len(pool)], seed=seed)
    first = epoch * len(pool) + start + rank
    return (pool.key(order.at(first + number * world_size).index) for number in range(count))


def describe(shards: ShardSpec) -> list[ShardSummary]:
    """One row a shard, from its index.

    Raises:
        MissingInput: no shards.
    """
    rows = []
    for shard in expand_shards(shards):
        index = open_index(shard)
        members: Counter[str] = Counter()
        member_bytes: Counter[str] = Counter()
        for number, extension in enumerate(index.extensions):
            chosen = index.arrays["extensions"] == number
            members[extension] = int(chosen.sum())
            member_bytes[extension] = int(index.arrays["sizes"][chosen].sum())
        damage = Counter(found.reason for found in index.damage)
        rows.append(ShardSummary(shard, len(index), index.shard_bytes, members, member_bytes, damage))
    return rows


def verify(shards: ShardSpec) -> list[Finding]:
    """Read every shard whole and compare it with what its index says of it; an index is neither trusted nor written.

    Returns:
        Damage found in the headers now; "content changed" where the SHA-256 taken when the shard was written is
        another one; "gone since indexed" for every key that the index has and the shard has no more.
    Raises:
        MissingInput: no shards.
    """
    findings = []
    for shard in expand_shards(shards):
        before = stored_index(shard)
        now = index_shard(shard, digest=True)
        damage = list(now.damage)
        if before is not None and before.digest and before.digest != now.digest:
            damage.append(Damage(0, "content changed"))
        if before is not None:
            gone = {*before.keys()} - {*now.keys()} - {found.name for found in damage}
            damage += [Damage(now.shard_bytes, "gone since indexed", key) for key in sorted(gone)]
        findings += [Finding(shard, found) for found in damage]
    return findings
