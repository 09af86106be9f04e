"""data keys, inspect and verify: what the command line tells of shards."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mmfoundry.data.index import drop_index, index_path, open_index
from mmfoundry.data.inspect import describe, iter_keys, verify
from mmfoundry.data.loader import Loader, Source
from mmfoundry.pipeline.errors import ConfigError, MissingInput

Make = Callable[..., list[Path]]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize(("epoch", "start", "count"), [(0, 0, 6), (0, 7, 4), (2, 5, 9), (1, 23, 20)])
def test_ranks_together_get_exactly_the_positions_asked_for(
    make_shards: Make, world: int, epoch: int, start: int, count: int
) -> None:
    folder = make_shards(25)[0].parent
    whole = [key for e in range(8) for key in iter_keys(folder, seed=9, epoch=e, count=25)]
    parts = [
        list(iter_keys(folder, seed=9, epoch=epoch, world_size=world, rank=rank, start=start, count=count))
        for rank in range(world)
    ]
    together = [part[place] for place in range(count) for part in parts]
    assert together == whole[epoch * 25 + start : epoch * 25 + start + count * world]
    assert len(set(whole[25:50])) == 25


def test_keys_are_what_the_loader_draws(make_shards: Make) -> None:
    folder = make_shards(25)[0].parent
    loader = Loader(
        [Source(folder)], batch_size=6, encode=lambda sample, _: {"key": sample.key}, seed=9, rank=1, world_size=3
    )
    batches = iter(loader)
    drawn = [key for _ in range(5) for key in next(batches)["key"]]
    batches.close()  # type: ignore[attr-defined]
    assert drawn == list(iter_keys(folder, seed=9, world_size=3, rank=1, count=10))


def test_numbers_out_of_range_are_refused(make_shards: Make) -> None:
    folder = make_shards(5)[0].parent
    for options in ({"rank": 2, "world_size": 2}, {"start": -1}, {"count": -1}, {"epoch": -1}, {"world_size": 0}):
        with pytest.raises(ConfigError, match="rank"):
            iter_keys(folder, **({"count": 1} | options))
    with pytest.raises(MissingInput):
        iter_keys(folder / "none", count=1)


def test_describe_counts_members_and_damage(make_shards: Make) -> None:
    shards = make_shards(15)
    data = bytearray(shards[1].read_bytes())
    data[5] ^= 1
    shards[1].write_bytes(data)
    first, second = describe(shards[0].parent)
    assert (first.samples, first.bytes, dict(first.damage)) == (10, shards[0].stat().st_size, {})
    assert first.members == {"json": 10, "png": 10, "txt": 10}
    assert first.member_bytes["json"] == 10 * len(json.dumps({"uid": "0" * 32}))
    assert second.samples == 4
    assert second.damage["damaged header"] == 1


def test_verify_finds_one_flipped_bit(make_shards: Make) -> None:
    shards = make_shards(15)
    assert _wrong(shards) == []
    data = bytearray(shards[0].read_bytes())
    data[512 + 3] ^= 1  # in a payload, which headers do not cover
    shards[0].write_bytes(data)
    before = index_path(shards[0]).read_bytes()
    assert _wrong(shards) == [(shards[0], "content changed")]
    assert index_path(shards[0]).read_bytes() == before
    describe(shards)  # rebuilds the stale index; what the shard was written with is not forgotten
    assert _wrong(shards) == [(shards[0], "content changed")]


def _wrong(shards: list[Path], index_dir: Path | None = None) -> list[tuple[Path, str]]:
    checked = list(verify(shards, index_dir))
    assert [shard.shard for shard in checked] == shards
    return [(Path(str(shard.shard)), damage.reason) for shard in checked for damage in shard.damage]


def test_a_digest_of_shards_that_others_wrote_is_taken_when_asked_for(make_shards: Make, tmp_path: Path) -> None:
    shards = make_shards(15)
    for shard in shards:
        drop_index(shard)
    assert [open_index(shard).digest for shard in shards] == ["", ""]
    assert [checked.compared for checked in verify(shards)] == [False, False]
    for shard in shards:
        open_index(shard, digest=True)
    assert [checked.compared for checked in verify(shards)] == [True, True]
    data = bytearray(shards[1].read_bytes())
    data[512 + 3] ^= 1
    shards[1].write_bytes(data)
    assert _wrong(shards) == [(shards[1], "content changed")]
    open_index(shards[1], digest=True)  # is not taken anew: the damage would be blessed
    assert _wrong(shards) == [(shards[1], "content changed")]


def test_verify_finds_indexes_in_the_folder_that_is_named(make_shards: Make, tmp_path: Path) -> None:
    shards = make_shards(5)
    drop_index(shards[0])
    open_index(shards[0], index_dir=tmp_path / "indexes", digest=True)
    data = bytearray(shards[0].read_bytes())
    data[512 + 3] ^= 1
    shards[0].write_bytes(data)
    assert _wrong(shards) == []
    assert _wrong(shards, tmp_path / "indexes") == [(shards[0], "content changed")]
