"""What other tools left beside a shard, used where it says enough.

DALI's `wds2idx` writes `shard.idx`: from version 1.2 on it names every member and its place, which spares reading the
shard's headers. img2dataset writes `00000.parquet` and `00000_stats.json` beside `00000.tar`: they say nothing of
places, but which keys must be in the tar, so that a damaged one can be told from a smaller one.
"""

import json
from pathlib import Path

from mmfoundry.data.grouping import Grouped, group
from mmfoundry.data.tar import BLOCK, Read, TarMember, parse_header

_DALI_VERSION = "v1.2"
_DALI_FIELDS = 4  # of each member: extension, offset, size, name
_PROBES = 16  # headers that must agree with DALI's index
_SHORT = 99  # longer paths are cut in the header, and whole in one before it
_MAX_STATS_BYTES = 1 << 20


def dali_samples(shard: Path, read: Read, size: int) -> Grouped | None:
    """The samples of `shard` by DALI's index beside it; None where there is none, or it does not fit the shard.

    It fits if it is not older than the shard, names members (version 1.2), puts them in order inside the file, ends
    where the shard's end marker starts, and agrees with the headers of members spread over the shard.

    Args:
        shard: a tar; the index has its name up to the last dot, and `.idx`.
        read: gives `count` bytes of the shard from byte `offset` on.
        size: bytes of the shard.
    """
    path = shard.with_suffix(".idx")
    try:
        # as large as the shard: not what wds2idx writes, and no reason to fill the memory
        if path.stat().st_size > size or path.stat().st_mtime_ns < shard.stat().st_mtime_ns:
            return None
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    members = _dali_members(text)
    if not members or not _in_order(members, read, size):
        return None
    if not agrees([*members[:: max(1, len(members) // _PROBES)], members[-1]], read):
        return None
    grouped = group(members)
    return None if grouped.damage else grouped  # a walk over the headers tells more of what is wrong


def _dali_members(text: str) -> list[TarMember]:
    """The members that an index names, in order; empty where it is of another version or not whole."""
    head, _, rest = text.partition("\n")
    version, _, count = head.partition(" ")
    lines = rest.splitlines()
    if version != _DALI_VERSION or count.strip() != str(len(lines)):
        return []
    members: list[TarMember] = []
    for line in lines:
        words = line.split(" ")  # a name with a space makes one word too many: not enough said
        if len(words) % _DALI_FIELDS:
            return []
        for start in range(0, len(words), _DALI_FIELDS):
            extension, offset, size, name = words[start : start + _DALI_FIELDS]
            if not (_is_number(offset) and _is_number(size) and name.endswith("." + extension)):
                return []
            members.append(TarMember(name, int(offset), int(size)))
    return members


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 19


def _in_order(members: list[TarMember], read: Read, size: int) -> bool:
    """Whether members come one after the other, and the shard's end marker after them."""
    end = 0
    for member in members:
        if member.offset % BLOCK or member.offset < end + BLOCK:
            return False
        end = member.offset + -(-member.size // BLOCK) * BLOCK
    return end + 2 * BLOCK <= size and not any(read(end, 2 * BLOCK))


def agrees(members: list[TarMember], read: Read) -> bool:
    """Whether these members' own headers say the same of them; extensions may differ in case."""
    for member in members:
        header = parse_header(read(member.offset - BLOCK, BLOCK)) if member.offset >= BLOCK else None
        if header is None or header.size != member.size:
            return False
        path = header.path.removeprefix("./")
        if len(path) < _SHORT and path.lower() != member.path.removeprefix("./").lower():
            return False
    return True


def img2dataset_keys(shard: Path, found: int) -> list[str]:
    """The keys that img2dataset put into `shard`; empty where it left no table, or the shard has as many samples.

    Args:
        shard: the tar, beside which `<name>.parquet` and `<name>_stats.json` may lie.
        found: samples that were found in it.
    """
    table = shard.with_suffix(".parquet")
    if not table.is_file() or _successes(shard.with_name(f"{shard.stem}_stats.json")) == found:
        return []
    import polars as pl  # slow to import, and most shards have no table

    try:
        rows = pl.scan_parquet(table, glob=False).select(pl.col("key").cast(pl.String), "status")
        return rows.filter(pl.col("status") == "success").collect()["key"].drop_nulls().to_list()
    except (pl.exceptions.PolarsError, OSError):  # a table of something else
        return []


def _successes(stats: Path) -> int | None:
    """How many samples img2dataset counted, if its count is there."""
    try:
        if stats.stat().st_size > _MAX_STATS_BYTES:
            return None
        said = json.loads(stats.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return said.get("successes") if isinstance(said, dict) else None
