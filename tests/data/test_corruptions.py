"""Two hundred seeded corruptions of a shard, read through the index, the pool and the loader.

Whatever happens to a shard: every sample that it did not touch is drawn with its own content, each one that it cost is
named, memory stays under a bound, and nothing is raised but the error of the cap.
"""

import io
import random
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from mmfoundry.data import Loader, Pool, Sample, Source, UnreadableSample
from mmfoundry.data.index import drop_index, index_path, open_index
from mmfoundry.data.shards import write_shards
from mmfoundry.data.tar import BLOCK
from mmfoundry.pipeline.errors import TooManyUnreadable
from tests.data.conftest import encode, smooth

COUNT = 12  # samples in the shard that is hurt; a second one is left alone, so that a pool always has some
SEEDS = range(10)  # of each kind
MEMORY = 160 << 20  # bytes above what the process had


@dataclass
class Hurt:
    """A shard's new content, and what was done to it.

    Attributes:
        data: the bytes.
        touched: ranges of the old bytes that are not what they were.
        refused: paths of members that were put in and must be named.
        tail: bytes behind `data` that are a hole in the file.
    """

    data: bytes
    touched: list[tuple[int, int]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    tail: int = 0


Hurting = Callable[[bytes, list[int], random.Random], Hurt]


def _block(info: tarfile.TarInfo, data: bytes = b"", kind: int = tarfile.GNU_FORMAT) -> bytes:
    """A member as it stands in a tar."""
    info.size = info.size or len(data)
    return info.tobuf(kind) + data + bytes(-len(data) % BLOCK)


def _info(name: str, kind: bytes = tarfile.REGTYPE, **values: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for field_name, value in values.items():
        setattr(info, field_name, value)
    return info


def _put_in(data: bytes, starts: list[int], noise: random.Random, extra: bytes, *refused: str) -> Hurt:
    """New members between two samples."""
    at = noise.choice(starts)
    return Hurt(data[:at] + extra + data[at:], [], list(refused))


def _headers(data: bytes) -> list[int]:
    return [at for at in range(0, len(data), BLOCK) if data[at + 257 : at + 262] == b"ustar"]


def flip_in_a_header(data: bytes, starts: list[int], noise: random.Random) -> Hurt:
    at = noise.choice(_headers(data)) + noise.randrange(345)
    return _changed(data, [(at, bytes([data[at] ^ 1 << noise.randrange(8)]))])


def flips_anywhere(data: bytes, starts: list[int], noise: random.Random) -> Hurt:
    places = [noise.randrange(len(data)) for _ in range(noise.randint(1, 6))]
    return _changed(data, [(at, bytes([data[at] ^ 1 << noise.randrange(8)])) for at in places])


def cut_anywhere(data: bytes, starts: list[int], noise: random.Random) -> Hurt:
    at = noise.randrange(1, len(data))
    return Hurt(data[:at], [(at, len(data))])


def cut_at_a_block(data: bytes, starts: list[int], noise: random.Random) -> Hurt:
    at = noise.randrange(1, len(data) // BLOCK) * BLOCK
    return Hurt(data[:at], [(at, len(data))])


def zeroed_blocks(data: bytes, starts: list[int], noise: random.Random) -> Hurt:
    at = noise.randrange(len(data) // BLOCK) * BLOCK
    return _changed(data, [(at, bytes(min(noise.randint(1, 12) * BLOCK, len(data) - at)))])


def zeroed_samples(data: bytes, starts: list[int], noise: random.Random) -> Hurt:
    """Whole samples: what is left looks like a tar that had none there."""
    first = noise.randrange(len(starts) - 2)
    at, end = starts[first], starts[first + noise.randint(1, 2)]
    return _changed(data, [(at, bytes(end - at))])


def zeroed_bytes(data: bytes, starts: list[int], noise: random.Random) -> Hurt:
    at = noise.randrange(len(data))
    return _changed(data, [(at, bytes(min(noise.randint(1, 3000), len(data) - at)))])


def overwritten(data: bytes, starts: list[int], noise: random.Random) -> Hurt:
    at = noise.randrange(len(data))
    return _changed(data, [(at, noise.randbytes(min(noise.randint(1, 3000), len(data) - at)))])


def junk_behind(data: bytes, starts: list[int], noise: random.Random) -> Hurt:
    return Hurt(data + noise.randbytes(noise.randint(1, 5000)))


def cut_and_junk(data: bytes, starts: list[int], noise: random.Random) -> Hurt:
    at = noise.randrange(1, len(data))
    return Hurt(data[:at] + noise.randbytes(noise.randint(1, 5000)), [(at, len(data))])


def lying_size(data: bytes, starts: list[int], noise: random.Random) -> Hurt:
    """A header whose checksum is right and whose payload would reach far behind the file's end."""
    at = noise.choice(_headers(data))
    info = tarfile.TarInfo.frombuf(data[at : at + BLOCK], "utf-8", "surrogateescape")
    info.size = noise.choice([len(data), 1 << 33, 1 << 60])
    return _changed(data, [(at, info.tobuf(tarfile.GNU_FORMAT))])


def duplicate_key(data: bytes, starts: list[int], noise: random.Random) -> Hurt:
    """A whole sample again, far enough from the first to be none of its members."""
    first = noise.randrange(len(starts) // 2)
    again = data[starts[first] : starts[first + 1]]
    at = noise.choice(starts[first + 2 :])
    return Hurt(data[:at] + again + data[at:], [], [f"{first:06d}.{kind}" for kind in ("json", "png", "txt")])


def path_that_climbs(data: bytes, starts: list[int], noise: random.Random) -> Hurt:
    path = noise.choice(["../../etc/cron.d/x.txt", "a/../../b.png", "/etc/passwd.txt"])
    return _put_in(data, starts, noise, _block(_info(path), b"x"), path)


def link_or_device(data: bytes, starts: list[int], noise: random.Random) -> Hurt:
    kind = noise.choice([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
    return _put_in(data, starts, noise, _block(_info("x.png", kind, linkname="/etc/passwd")), "x.png")


def sparse_member(data: bytes, starts: list[int], noise: random.Random) -> Hurt:
    """Sparse in GNU's old way, with a map that goes on in blocks of its own, or in PAX's."""
    payload = noise.randbytes(700)
    if noise.random() < 0.5:
        header = bytearray(_info("sparse.txt", tarfile.GNUTYPE_SPARSE, size=len(payload)).tobuf(tarfile.GNU_FORMAT))
        header[482] = 1
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        more = [bytes(504) + b"\1" + bytes(7), bytes(BLOCK)]
        extra = bytes(header) + b"".join(more) + payload + bytes(-len(payload) % BLOCK)
    else:
        info = _info("sparse.txt", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.realsize": "99999999"})
        extra = _block(info, payload, tarfile.PAX_FORMAT)
    return _put_in(data, starts, noise, extra, "sparse.txt")


def pax_headers(data: bytes, starts: list[int], noise: random.Random) -> Hurt:
    """Extended headers that are broken, endless, of no use, or name a size that is not there."""
    broken = [
        b"99999999 path=x\n",
        b"x" * 40,
        b"12 path=\n",
        b"9 size=x\n",
        b"30 size=99999999999999999999\n",
        b"0 =\n",
    ]
    records = noise.choice([*broken, b"", b"19 path=long/nnnnn\n"])
    size = noise.choice([len(records), len(records), 1 << 40])
    header = _block(_info("pax", tarfile.XHDTYPE, size=size), records)
    return _put_in(data, starts, noise, header + _block(_info("extra.bin"), b"x"))


def huge_picture(data: bytes, starts: list[int], noise: random.Random) -> Hurt:
    """60,000 x 60,000 pixels in a few hundred bytes: 10 GB if anybody believed it."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return _put_in(data, starts, noise, _block(_info("huge.png"), png) + _block(_info("huge.txt"), b"x"), "huge")


def huge_text(data: bytes, starts: list[int], noise: random.Random) -> Hurt:
    """A text member of 1 GB, a hole in the file, as the last of the tar."""
    end = max(at for at in starts)  # of the last sample
    members = _block(_info("vast.png"), encode(smooth(1))) + _info("vast.txt", size=1 << 30).tobuf(tarfile.GNU_FORMAT)
    return Hurt(data[:end] + members, [], ["vast"], tail=(1 << 30) + 2 * BLOCK)


def flood_of_lines(data: bytes, starts: list[int], noise: random.Random) -> Hurt:
    """Ten million captions, or as many brackets: small in the shard, vast once they are objects."""
    kind, text = noise.choice([("txt", b"a\n"), ("json", b"[],"), ("json", b"[[")])
    members = _block(_info("flood.png"), encode(smooth(1))) + _block(_info(f"flood.{kind}"), text * (10_000_000 // 2))
    return _put_in(data, starts, noise, members, "flood")


def _changed(data: bytes, changes: list[tuple[int, bytes]]) -> Hurt:
    out = bytearray(data)
    for at, new in changes:
        out[at : at + len(new)] = new
    # zeros over zeros hurt nobody
    return Hurt(bytes(out), [(at, at + len(new)) for at, new in changes if data[at : at + len(new)] != new])


KINDS: list[Hurting] = [
    *(flip_in_a_header, flips_anywhere, cut_anywhere, cut_at_a_block, zeroed_blocks, zeroed_samples, zeroed_bytes),
    *(overwritten, junk_behind, cut_and_junk, lying_size, duplicate_key, path_that_climbs, link_or_device),
    *(sparse_member, pax_headers, huge_picture, huge_text, flood_of_lines),
]
CASES = [(kind, seed) for kind in KINDS for seed in SEEDS] + [(flips_anywhere, seed) for seed in range(10, 20)]
assert len(CASES) == 200


@dataclass(frozen=True)
class Whole:
    """The shard before it is hurt: its bytes, each sample's range of them, and the content that must be drawn."""

    data: bytes
    spans: dict[str, tuple[int, int]]
    content: dict[str, tuple[bytes, tuple[str, ...]]]
    index: bytes
    other: Path


def _rows(first: int, count: int) -> list[dict]:
    """Samples of unequal size, some of them without one of the members that the others have."""
    rows = []
    for number in range(first, first + count):
        side = 8 + number % 5 * 3
        row = {
            "__key__": f"{number:06d}",
            "png": encode(smooth(number, side, side)),
            "txt": f"picture {number}\n" + "more of it " * (number % 7 * 20),
            "json": {"uid": f"{number:032x}"},
        }
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    (shard,) = write_shards(_rows(0, COUNT), folder / "hurt")
    (other,) = write_shards(_rows(100, 4), folder / "other")
    index = open_index(shard)
    spans = {}
    for number in range(len(index)):
        members = index.members(number)
        spans[index.key(number)] = (members[0].offset - BLOCK, members[-1].offset + members[-1].size)
    content = {key: found for key, found, _ in _drawn(Pool([shard, other]), None)}
    assert len(content) == COUNT + 4
    return Whole(shard.read_bytes(), spans, content, index_path(shard).read_bytes(), other)


def _content(sample: Sample, _: np.random.Generator) -> dict:
    return {"key": sample.key, "content": (sample.image.tobytes(), tuple(line.strip() for line in sample.text))}


def _drawn(pool: Pool, log: Path | None, limit: float = 1.0) -> Iterator[tuple[str, tuple, Loader]]:
    """Everything that one epoch of the loader draws."""
    loader = Loader(
        [Source(pool)], batch_size=1, encode=_content, num_workers=0, max_unreadable=limit, skip_log=log, seed=len(pool)
    )
    for _, batch in zip(range(len(pool)), loader, strict=False):
        yield batch["key"][0], batch["content"][0], loader


class _Peak:
    """The most resident memory since it was made, above what there was then."""

    def __init__(self) -> None:
        self._before = self._read("VmRSS")
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the kernel starts the high-water mark anew
        except OSError as error:
            pytest.skip(f"this system does not tell the peak of resident memory: {error}")

    @staticmethod
    def _read(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

    def bytes(self) -> int:
        return self._read("VmHWM") - self._before


@pytest.mark.parametrize(("hurting", "seed"), CASES, ids=[f"{kind.__name__}-{seed}" for kind, seed in CASES])
def test_a_corruption_costs_what_it_hit_and_nothing_else(
    whole: Whole, hurting: Hurting, seed: int, tmp_path: Path
) -> None:
    noise = random.Random(f"{hurting.__name__} {seed}")
    starts = [start for start, _ in whole.spans.values()]
    starts.append(-(-max(end for _, end in whole.spans.values()) // BLOCK) * BLOCK)
    hurt = hurting(whole.data, starts, noise)
    shard, log = tmp_path / "hurt.tar", tmp_path / "skips.jsonl"
    with open(shard, "wb") as file:
        file.write(hurt.data)
        file.truncate(len(hurt.data) + hurt.tail)
    # Indexed while it was whole? Zeros over the last samples are the end of the tar to whoever knows no better.
    indexed = noise.random() < 0.5 or hurting in (zeroed_blocks, zeroed_samples)
    if indexed:
        index_path(shard).write_bytes(whole.index)
    size = len(hurt.data)
    del hurt.data
    peak = _Peak()
    pool = Pool([shard, whole.other])
    drawn = {key: content for key, content, _ in _drawn(pool, log)}
    used = peak.bytes()

    def hit(key: str) -> bool:
        start, end = whole.spans.get(key, (0, 0))
        return any(start < stop and at < end for at, stop in hurt.touched)

    unhurt = {key for key in whole.content if not hit(key)}
    assert {key: drawn.get(key) for key in unhurt} == {key: whole.content[key] for key in unhurt}
    assert used < MEMORY + 2 * size
    skipped = log.read_text(encoding="utf-8") if log.exists() else ""
    damage = [found for _, found in pool.damage]
    named = skipped + "".join(f"\n{found.name}" for found in damage)
    if indexed or len({*whole.spans} & {*drawn}) > 1:  # of one sample alone nobody can say what it lacks
        assert all(text for _, text in drawn.values()), "a sample without its caption is no whole one"
    lost = {*whole.content} - {*drawn}
    left = [start for key, (start, _) in whole.spans.items() if key in drawn]
    for key in lost:
        start, end = whole.spans[key]
        # without an index from before, all that can be known of a sample wholly gone is where the hole begins
        holes = [d for d in damage if d.offset <= end and not any(d.offset < other < start for other in left)]
        assert key in named or (not indexed and holes), (key, damage)
    assert all(path in named for path in hurt.refused), named
    _within_the_cap(pool)


def _within_the_cap(pool: Pool) -> None:
    """With the usual cap the loader either goes on or says that there is too much."""
    with suppress(TooManyUnreadable):
        for _ in _drawn(pool, None, limit=0.001):
            pass


def test_an_index_from_better_days_tells_which_samples_lack_a_member(tmp_path: Path) -> None:
    rows = [{"__key__": f"{n}", "txt": f"text {n}"} | ({"json": {"n": n}} if n % 2 else {}) for n in range(8)]
    (shard,) = write_shards(rows, tmp_path)
    place = open_index(shard).members(3)[0]  # its json; without it the sample looks like its neighbours
    data = bytearray(shard.read_bytes())
    data[place.offset - BLOCK + 140] ^= 1
    shard.write_bytes(data)
    assert [*open_index(shard).keys()] == ["0", "1", "2", "4", "5", "6", "7"]
    drop_index(shard)
    # now by the name that can still be read in the damaged header
    assert [*open_index(shard).keys()] == ["0", "1", "2", "4", "5", "6", "7"]


def test_memory_is_bounded_for_a_member_with_many_parts(tmp_path: Path) -> None:
    """Each part is small enough to be read; together they would be gigabytes."""
    shard = tmp_path / "many.tar"
    with open(shard, "wb") as file:
        file.write(_block(_info("a.png"), encode(smooth(1))))
        for number in range(40):
            file.write(_info(f"a.part{number}", size=60 << 20).tobuf(tarfile.GNU_FORMAT))
            file.seek(60 << 20, io.SEEK_CUR)
        file.truncate(file.tell() + 2 * BLOCK)
    peak = _Peak()
    with pytest.raises(UnreadableSample, match="too many bytes"):
        Pool(shard).get(0)
    assert peak.bytes() < MEMORY
