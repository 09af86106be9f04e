"""`mmfoundry index` and `mmfoundry data ...`: look into shards without unpacking them, and make them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmfoundry.launch.data_keys import IndexDir, ShardNames, keys

if TYPE_CHECKING:
    from mmfoundry.data.tar import Damage

data_app = typer.Typer(no_args_is_help=True, help="Look into shards: their keys, one sample, what is damaged.")
data_app.command()(keys)

DAMAGED = 3  # exit code of `index --strict`
_SHOWN_DAMAGE = 20


def index_shards(
    shards: ShardNames,
    index_dir: IndexDir = None,
    digest: Annotated[
        bool, typer.Option("--digest", help="Also read the content, for a digest that `data verify` compares with.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit code 3 if anything could not be read.")] = False,
    num_workers: Annotated[int, typer.Option("--num-workers", min=1, help="Processes that share the shards.")] = 1,
) -> None:
    """Write the index beside each shard, so that samples can be read in any order; say what is damaged.

    Stages do this by themselves; doing it ahead, on the machine that holds the shards, saves them the wait.

    Example: `mmfoundry index data/samples`
    """
    from mmfoundry.data.inspect import make_indexes
    from mmfoundry.data.shard_names import expand_shards, shown
    from mmfoundry.pipeline.progress import progress_bar

    samples = damaged = 0
    found = expand_shards(shards)
    with progress_bar(len(found), "index", "shards") as progress:
        for shard in make_indexes(found, index_dir, digest=digest, num_workers=num_workers):
            samples += shard.samples
            damaged += len(shard.damage)
            note = "" if shard.kept else " (the index could not be written)"
            print(f"{shown(shard.shard)}: {shard.samples} samples{note}")
            for damage in shard.damage[:_SHOWN_DAMAGE]:
                print(f"  {_told(damage)}")
            if len(shard.damage) > _SHOWN_DAMAGE:
                print(f"  and {len(shard.damage) - _SHOWN_DAMAGE} more")
            progress.advance()
    print(f"{samples} samples, {damaged} damaged places")
    if strict and damaged:
        raise typer.Exit(DAMAGED)


def _told(damage: Damage) -> str:
    from mmfoundry.data.grouping import printable

    return f"byte {damage.offset}: {damage.reason} {printable(damage.name)}".rstrip()


@data_app.command()
def inspect(
    shards: ShardNames,
    number: Annotated[int, typer.Option("--number", min=0, help="Which sample, counted from 0 over all shards.")] = 0,
    key: Annotated[str | None, typer.Option("--key", help="The sample of this key instead.")] = None,
    index_dir: IndexDir = None,
) -> None:
    """Show one sample: its members, its image's size, its captions, messages and metadata.

    Example: `mmfoundry data inspect data/samples --number 3`
    """
    from mmfoundry.data.grouping import printable
    from mmfoundry.data.reader import Pool
    from mmfoundry.data.sample import to_sample
    from mmfoundry.data.shard_names import shown
    from mmfoundry.pipeline.errors import MissingInput

    pool = Pool(list(shards), save_index=False, index_dir=index_dir)
    if key is not None:
        number = next((i for i in range(len(pool)) if pool.key(i) == key), -1)
        if number < 0:
            raise MissingInput(f"{pool.name}: no sample with key {key!r}; `mmfoundry data keys` lists them")
    if number >= len(pool):
        raise MissingInput(f"{pool.name}: no sample {number}; there are {len(pool)}, counted from 0")
    raw = pool.get(number)
    print(f"{shown(raw.shard)}: {raw.key}")
    for extension, payload in raw.members.items():
        print(f"  {extension}: {len(payload)} bytes")
    sample = to_sample(raw)
    print(f"  image: {sample.image.shape[1]} x {sample.image.shape[0]} pixels")
    for text in sample.text:
        print(f"  caption: {printable(text)}")
    for message in sample.messages or []:
        print(f"  {printable(str(message.get('role')))}: {printable(str(message.get('content')))}")
    if sample.meta:
        print(f"  meta: {json.dumps(sample.meta, ensure_ascii=False)}")


@data_app.command()
def verify(
    shards: ShardNames,
    index_dir: IndexDir = None,
    decode: Annotated[
        bool, typer.Option("--decode/--no-decode", help="Decode every sample, not only compare digests and headers.")
    ] = True,
) -> None:
    """Compare every shard with the digest in its index, and decode every sample. Exit code 1 if anything is wrong.

    What cannot be used is counted by reason. Shards that we wrote have a digest; `mmfoundry index --digest` takes one
    of others.

    Example: `mmfoundry data verify 'data/samples/pictures-*.tar'`
    """
    from mmfoundry.data.decode import UnreadableSample
    from mmfoundry.data.inspect import verify as verify_shards
    from mmfoundry.data.reader import Pool
    from mmfoundry.data.sample import to_sample
    from mmfoundry.data.shard_names import shown

    reasons: Counter[str] = Counter()
    problems: list[str] = []  # those that are shown
    samples = compared = 0
    checked = list(verify_shards(list(shards), index_dir))
    for shard in checked:
        samples += shard.samples
        compared += shard.compared
        for damage in shard.damage:
            reasons[damage.reason] += 1
            if len(problems) < _SHOWN_DAMAGE:
                problems.append(f"{shown(shard.shard)}, {_told(damage)}")
    if decode and samples:
        pool = Pool(list(shards), save_index=False, index_dir=index_dir)
        for number in range(len(pool)):
            try:
                to_sample(pool.get(number)).image  # noqa: B018 - decoded when asked for
            except UnreadableSample as error:
                reasons[error.reason] += 1
                if len(problems) < _SHOWN_DAMAGE:
                    problems.append(f"{shown(pool.locate(number)[0].shard)}, {pool.key(number)}: {error}")
    for problem in problems:
        print(problem)
    print(f"{samples} samples; {compared} of {len(checked)} shards have a digest; {sum(reasons.values())} problems")
    for reason, count in reasons.most_common():
        print(f"  {count} x {reason}")
    if reasons:
        raise typer.Exit(1)


@data_app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A folder of pictures, a table (csv, tsv, parquet, jsonl) of their paths, or tars."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", help="Folder for the shards.")],
    image_column: Annotated[str, typer.Option(help="Of a table: paths of the pictures.")] = "image",
    caption_column: Annotated[str, typer.Option(help="Of a table: captions; other columns become metadata.")] = (
        "caption"
    ),
    images: Annotated[
        Path | None, typer.Option(help="Folder that a table's paths start from; the table's own when left out.")
    ] = None,
    max_count: Annotated[int, typer.Option(min=1, help="Samples per shard, at most.")] = 10_000,
    max_bytes: Annotated[int, typer.Option(min=1, help="Bytes per shard, at most.")] = 1 << 30,
    max_unreadable: Annotated[
        float, typer.Option(min=0, max=1, help="Fraction of the samples that may be left out.")
    ] = 0.01,
) -> None:
    """Write shards from what there is: the same bytes for the same source, with an index beside each.

    Pictures keep their bytes. In a folder, `.txt` and `.json` files of a picture's name go with it. What cannot be
    taken is counted and listed in `left_out.jsonl`.

    Example: `mmfoundry data convert photos --output shards`
    """
    from mmfoundry.data.convert import ConvertOptions
    from mmfoundry.data.convert import convert as write

    options = ConvertOptions(
        image_column=image_column,
        caption_column=caption_column,
        images=images,
        max_count=max_count,
        max_bytes=max_bytes,
        max_unreadable=max_unreadable,
    )
    shards, tally = write(source, output, options)
    print(f"{tally.drawn - tally.skipped} samples in {len(shards)} shards; {tally.skipped} left out")
    reasons: Counter[str] = Counter()
    for (_, reason), count in tally.counts.items():
        reasons[reason] += count
    for reason, count in reasons.most_common():
        print(f"  {count} x {reason}")


@data_app.command()
def reshard(
    pool: ShardNames,
    subset: Annotated[Path, typer.Option("--subset", help="uids to take: a `subset.npy`, as DataComp publishes them.")],
    output: Annotated[Path, typer.Option("--output", help="Folder for the new shards.")],
    faces: Annotated[
        Path | None, typer.Option(help="Parquet with uid and face_bboxes: these places are blurred.")
    ] = None,
    max_count: Annotated[int, typer.Option(min=1, help="Samples per shard, at most.")] = 10_000,
    max_bytes: Annotated[int, typer.Option(min=1, help="Bytes per shard, about.")] = 1 << 30,
    max_unreadable: Annotated[
        float, typer.Option(min=0, max=1, help="Fraction of the pool's samples that may be unreadable.")
    ] = 0.01,
    executor: Annotated[str, typer.Option(help="Who does it: local, or ray.")] = "local",
    ray_address: Annotated[str | None, typer.Option(help="Of the cluster; of this machine when left out.")] = None,
    num_workers: Annotated[int | None, typer.Option(min=1, help="Shards at a time; one a core when left out.")] = None,
    index_dir: IndexDir = None,
) -> None:
    """Write the samples of a subset into new shards; a uid that it has several times is written as often.

    What the pool lacks, has twice or cannot give is counted, and told in `reshard.json`.

    Example: `mmfoundry data reshard data/samples/pool-*.tar --subset runs/try/filter/subset.npy --output curated`
    """
    from mmfoundry.data.executors import make_executor
    from mmfoundry.data.new_shards import ReshardOptions
    from mmfoundry.data.reader import Pool
    from mmfoundry.data.resharding import reshard as write
    from mmfoundry.pipeline.errors import ConfigError

    if executor not in ("local", "ray"):
        raise ConfigError(f"--executor {executor}: local or ray")
    options = ReshardOptions(
        max_count=max_count, max_bytes=max_bytes, max_unreadable=max_unreadable, faces=faces, index_dir=index_dir
    )
    source = Pool(list(pool), index_dir=index_dir)
    with make_executor(executor, num_workers, ray_address) as workers:  # type: ignore[arg-type]
        found = write(source, subset, output, workers, options)
    print(f"{found.written} samples in {found.shards} shards, of {found.asked} that the subset asks for")
    told = {
        "uids are not in the pool": found.missing,
        "samples left out since an earlier one has their uid": found.repeated,
        "of these uids stand for different samples": found.conflicting,
        **{f"unreadable: {reason}": count for reason, count in found.unreadable.most_common()},
    }
    for what, count in told.items():
        if count:
            print(f"  {count} x {what}")


@data_app.command()
def entries(
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The list: JSON, as MetaCLIP's metadata.json.")],
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            help="A text file of entries, one a line; FILE:100 takes those with a score, after a tab, from 100.",
        ),
    ] = None,
    wordnet: Annotated[bool, typer.Option(help="Take the names of WordNet's synsets.")] = True,
    wordnet_dir: Annotated[
        Path | None, typer.Option(help="Where WordNet lies; the usual places when left out.")
    ] = None,
    max_entries: Annotated[int, typer.Option(min=1, help="Entries, at most.")] = 500_000,
) -> None:
    """Write the list of entries that the filter `metaclip` balances by: numbers to 99, WordNet, text files.

    Example: `mmfoundry data entries entries.json --text words.txt:100 --text titles.txt`
    """
    from mmfoundry.data.metadata_list import TextSource, build_entries
    from mmfoundry.pipeline.artifact import write_atomic

    sources = []
    for one in text or []:
        path, colon, score = one.rpartition(":")
        scored = bool(colon) and score.replace(".", "", 1).isdecimal()
        sources.append(TextSource(path=Path(path if scored else one), min_score=float(score) if scored else None))
    found = build_entries(sources, wordnet_dir if wordnet else False, max_entries)
    write_atomic(output, json.dumps(found, ensure_ascii=False) + "\n")
    print(f"{len(found)} entries in {output}")
