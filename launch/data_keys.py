"""`mmfoundry data keys`: which samples shards hold, and which of them a rank gets from any position on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ShardNames = Annotated[
    list[str],
    typer.Argument(metavar="SHARDS...", help="Tars, folders of them, quoted patterns such as 'pool/*.tar', or URLs."),
]
IndexDir = Annotated[
    Path | None,
    typer.Option("--index-dir", help="Folder of the indexes, for shards whose own folder is read-only or remote."),
]


def keys(
    shards: ShardNames,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the order; 0 if another option asks for it.")] = None,
    epoch: Annotated[int | None, typer.Option("--epoch", min=0, help="Which epoch's order, counted from 0.")] = None,
    world_size: Annotated[int | None, typer.Option("--world-size", min=1, help="Number of ranks.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", min=0, help="Whose keys.")] = None,
    start: Annotated[
        int | None, typer.Option("--start", min=0, help="Position in the epoch, counted over all ranks.")
    ] = None,
    count: Annotated[
        int | None, typer.Option("--count", min=0, help="Keys of this rank; by default to the end of the epoch.")
    ] = None,
    window: Annotated[
        int | None, typer.Option("--window", help="Samples that are shuffled together, where the loader was given it.")
    ] = None,
    index_dir: IndexDir = None,
) -> None:
    """Print keys, one a line: all in the order of the shards or, with any of the options, those that a rank draws.

    The keys of all ranks together are exactly the positions from --start on, in the order of a loader that has these
    shards as its only source. Past the end of the epoch the next one follows.

    Example: `mmfoundry data keys data/samples --seed 1 --epoch 2 --world-size 8 --rank 3 --start 640 --count 5`
    """
    from mmfoundry.data.inspect import iter_keys
    from mmfoundry.data.permutation import WINDOW
    from mmfoundry.data.reader import Pool

    pool = Pool(list(shards), save_index=False, index_dir=index_dir)
    if all(option is None for option in (seed, epoch, world_size, rank, start, count, window)):
        for index in pool.indexes:
            for key in index.keys():  # noqa: SIM118 - not a dict
                print(key)
        return
    found = iter_keys(
        pool,
        seed=seed or 0,
        epoch=epoch or 0,
        world_size=1 if world_size is None else world_size,
        rank=rank or 0,
        start=start or 0,
        count=count,
        window=WINDOW if window is None else window,
    )
    for key in found:
        print(key)
