"""`mmfoundry index` and `mmfoundry data ...`: look into shards without unpacking them."""

from __future__ import annotations

import json
from collections import Counter
from typing import Annotated

import typer

data_app = typer.Typer(no_args_is_help=True, help="Look into shards: their keys, one sample, what is damaged.")

ShardNames = Annotated[
    list[str],
    typer.Argument(metavar="SHARDS...", help="Tars, folders of them, or quoted patterns such as 'pool/*.tar'."),
]
_SHOWN_DAMAGE = 20


def index_shards(shards: ShardNames) -> None:
    """Write the index beside each shard, so that samples can be read in any order; say what is damaged.

    Stages do this by themselves; doing it ahead, on the machine that holds the shards, saves them the wait.

    Example: `mmfoundry index data/samples`
    """
    from mmfoundry.data.index import expand_shards, index_path, open_index

    samples = damaged = 0
    for shard in expand_shards(shards):
        index = open_index(shard)
        samples += len(index)
        damaged += len(index.damage)
        note = "" if index_path(shard).is_file() else " (the index could not be kept beside it)"
        print(f"{shard}: {len(index)} samples{note}")
        for damage in index.damage[:_SHOWN_DAMAGE]:
            print(f"  byte {damage.offset}: {damage.reason} {damage.name}".rstrip())
    print(f"{samples} samples, {damaged} damaged places")


@data_app.command()
def keys(shards: ShardNames) -> None:
    """Print the key of every sample, one a line, in order.

    Example: `mmfoundry data keys 'data/samples/pool-*.tar' | wc -l`
    """
    from mmfoundry.data.index import expand_shards, open_index

    for shard in expand_shards(shards):
        for key in open_index(shard, save=False).keys():  # noqa: SIM118 - not a dict
            print(key)


@data_app.command()
def inspect(
    shards: ShardNames,
    number: Annotated[int, typer.Option("--number", min=0, help="Which sample, counted from 0 over all shards.")] = 0,
    key: Annotated[str | None, typer.Option("--key", help="The sample of this key instead.")] = None,
) -> None:
    """Show one sample: its members, its image's size, its captions, messages and metadata.

    Example: `mmfoundry data inspect data/samples --number 3`
    """
    from mmfoundry.data.reader import Pool
    from mmfoundry.data.sample import to_sample
    from mmfoundry.pipeline.errors import MissingInput

    pool = Pool(list(shards), save_index=False)
    if key is not None:
        number = next((i for i in range(len(pool)) if pool.key(i) == key), -1)
        if number < 0:
            raise MissingInput(f"{pool.name}: no sample with key {key!r}; `mmfoundry data keys` lists them")
    if number >= len(pool):
        raise MissingInput(f"{pool.name}: no sample {number}; there are {len(pool)}, counted from 0")
    raw = pool.get(number)
    print(f"{raw.shard}: {raw.key}")
    for extension, payload in raw.members.items():
        print(f"  {extension}: {len(payload)} bytes")
    sample = to_sample(raw)
    print(f"  image: {sample.image.shape[1]} x {sample.image.shape[0]} pixels")
    for text in sample.text:
        print(f"  caption: {text}")
    for message in sample.messages or []:
        print(f"  {message['role']}: {message['content']}")
    if sample.meta:
        print(f"  meta: {json.dumps(sample.meta, ensure_ascii=False)}")


@data_app.command()
def verify(shards: ShardNames) -> None:
    """Read and decode every sample; count what cannot be used by reason. Exit code 1 if there is any.

    Example: `mmfoundry data verify 'data/samples/pictures-*.tar'`
    """
    from mmfoundry.data.decode import UnreadableSample
    from mmfoundry.data.reader import Pool
    from mmfoundry.data.sample import to_sample

    pool = Pool(list(shards), save_index=False)
    reasons: Counter[str] = Counter()
    shown = 0
    for shard, damage in pool.damage:
        reasons[damage.reason] += 1
        if shown < _SHOWN_DAMAGE:
            shown += 1
            print(f"{shard}, byte {damage.offset}: {damage.reason} {damage.name}".rstrip())
    for number in range(len(pool)):
        try:
            to_sample(pool.get(number))
        except UnreadableSample as error:
            reasons[error.reason] += 1
            if shown < _SHOWN_DAMAGE:
                shown += 1
                print(f"{pool.locate(number)[0].shard}, {pool.key(number)}: {error}")
    print(f"{len(pool)} samples; {sum(reasons.values())} problems")
    for reason, count in reasons.most_common():
        print(f"  {count} x {reason}")
    if reasons:
        raise typer.Exit(1)
