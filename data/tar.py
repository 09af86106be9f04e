"""Walk the members of a tar, past damage.

A plain tar reader stops, often silently, at the first header that it cannot parse. This one reports the place and goes
on at the next 512-byte block whose checksum is right. It reads headers only and never writes or follows anything.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

Read = Callable[[int, int], bytes]  # (offset, count) -> the bytes there, fewer only at the end of the file

BLOCK = 512  # bytes; headers and payloads start on multiples of it
_SCAN_BYTES = 1 << 20
_MAX_NAME_BYTES = 1 << 16  # of a PAX or GNU header that carries a long name
_ZEROS = bytes(BLOCK)
_REGULAR = b"0\x007"  # 7: a file that some system kept in one piece
_RECORD = 20 * BLOCK  # tar writers fill up their last record with zeros
_MAX_SPARSE_BLOCKS = 1 << 16
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # how gzip, bzip2, xz and zstd begin
_DIRECTORY = b"5"
_PAX, _PAX_GLOBAL, _GNU_NAME, _GNU_LINK, _GNU_SPARSE = b"x", b"g", b"L", b"K", b"S"
_REFUSED = {
    b"1": "link",
    b"2": "link",
    b"3": "device",
    b"4": "device",
    b"6": "device",
    b"S": "sparse member",
}


@dataclass(frozen=True, slots=True)
class TarMember:
    """A regular file in a tar: its path, and where its `size` bytes of payload start."""

    path: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Damage:
    """Something in a shard that cannot be used.

    Attributes:
        offset: byte of the shard at which it was found.
        reason: one of a small set of phrases, by which damage is counted.
        name: the member or key that it cost, as far as it is known.
    """

    offset: int
    reason: str
    name: str = ""


@dataclass(slots=True)
class _Header:
    kind: bytes
    path: str
    size: int


def walk_tar(read: Read, size: int) -> Iterator[TarMember | Damage]:
    """Members and damage in order of their place.

    Args:
        read: gives `count` bytes from byte `offset` of the tar on, as `storage.ShardFile.read` does.
        size: bytes of the file.
    Yields:
        A `TarMember` for every regular file whose payload lies whole inside the file; a `Damage` with reason
        "damaged header", "compressed" (no tar, but one inside), "cut off" (a payload that ends behind the file's end,
        or no end marker), "link", "device", "sparse member", "unknown member type", "damaged long name", "end marker
        inside" (zeros where a header should be, and more members after them) or "junk after the end".
    """
    offset = 0
    extension = _Extension()
    while offset + BLOCK <= size:
        block = read(offset, BLOCK)
        header = parse_header(block)
        if header is None:
            damage, after = _recover(read, offset, size, block)
            if damage is not None:
                yield damage
            elif after is not None and after % _RECORD:  # no joint of two whole tars
                yield Damage(offset, "end marker inside")
            if after is None:
                if damage is not None and damage.reason == "damaged header" and not _ends_in_zeros(read, size):
                    yield Damage(size, "cut off")
                return
            offset, extension = after, _Extension()
            continue
        start = offset + BLOCK
        if header.kind == _GNU_SPARSE:
            start = _after_sparse_map(read, block, start)
        if extension.size is not None and header.kind in _REGULAR:
            header.size = extension.size
        if start + header.size > size:
            yield Damage(offset, "cut off", extension.path or header.path)
            after = _next_header(read, start, size)
            if after is None:
                return
            offset, extension = after, _Extension()
            continue
        if header.kind in (_PAX, _GNU_NAME):
            extension = _read_extension(read, header, start, extension)
        elif header.kind not in (_PAX_GLOBAL, _GNU_LINK):
            found = _meet(header, offset, extension)  # of a regular file: its payload follows its header
            if found is not None:
                yield found
            extension = _Extension()
        offset = start + -(-header.size // BLOCK) * BLOCK
    yield Damage(size, "cut off")


def _recover(read: Read, offset: int, size: int, block: bytes) -> tuple[Damage | None, int | None]:
    """What a block that is no header means, and where the next header is (None: the shard ends here)."""
    if block != _ZEROS:
        reason = "compressed" if offset == 0 and block.startswith(_COMPRESSED) else "damaged header"
        return Damage(offset, reason, _legible_path(block)), _next_header(read, offset + BLOCK, size)
    after = _next_block(read, offset, size)
    if after is None:  # the end marker
        return None, None
    marker = after - offset >= 2 * BLOCK
    if marker and parse_header(read(after, BLOCK)) is not None:
        return None, after  # tars put end to end
    header = _next_header(read, after, size)
    if marker and header is None:
        return Damage(after, "junk after the end"), None
    return Damage(offset, "damaged header"), header


def parse_header(block: bytes) -> _Header | None:
    """Read a 512-byte header; None if it is not one: wrong checksum, a size that is no number, no path."""
    if len(block) != BLOCK:
        return None
    stated = _number(block[148:156])
    if stated is None:
        return None
    rest = block[:148] + b" " * 8 + block[156:]
    # some old tars summed signed bytes
    if stated != sum(rest) and stated != sum(byte - 256 if byte > 127 else byte for byte in rest):
        return None
    length, path = _number(block[124:136]), _path(block)
    if length is None or length < 0 or not path:
        return None
    kind = block[156:157]
    has_payload = kind not in b"123456"
    return _Header(kind, path, length if has_payload else 0)


def _path(block: bytes) -> str:
    path = block[:100].split(b"\0", 1)[0]
    if path and block[257:263] == b"ustar\0" and (prefix := block[345:500].split(b"\0", 1)[0]):
        path = prefix + b"/" + path
    return _text(path)


def _legible_path(block: bytes) -> str:
    """The path in a header whose checksum is wrong; empty where the block does not look like a header at all."""
    return _path(block) if block[257:262] == b"ustar" else ""


@dataclass(frozen=True, slots=True)
class _Extension:
    """What the PAX and GNU headers before a member say of it."""

    path: str | None = None
    size: int | None = None
    refused: str | None = None  # reason


def _meet(header: _Header, offset: int, extension: _Extension) -> TarMember | Damage | None:
    """What a good header stands for; None for a folder."""
    path = extension.path or header.path
    if extension.refused is not None:
        return Damage(offset, extension.refused, path)
    if header.kind in _REGULAR and not path.endswith("/"):
        return TarMember(path, offset + BLOCK, header.size)
    if header.kind == _DIRECTORY or header.kind in _REGULAR:  # very old tars mark a folder by a slash at its end
        return None
    return Damage(offset, _REFUSED.get(header.kind, "unknown member type"), path)


def _read_extension(read: Read, header: _Header, start: int, extension: _Extension) -> _Extension:
    if header.size > _MAX_NAME_BYTES:
        return _Extension(refused="damaged long name")
    payload = read(start, header.size)
    if header.kind == _GNU_NAME:
        return replace(extension, path=_text(payload.split(b"\0", 1)[0]))
    return _read_pax(payload, extension)


def _read_pax(payload: bytes, extension: _Extension) -> _Extension:
    """Read a PAX header's `length key=value` records; what changes the meaning of the payload is refused."""
    position = 0
    while position < len(payload):
        head, space, _ = payload[position : position + 20].partition(b" ")
        if not space or not head.isdigit() or int(head) > len(payload) - position:
            return _Extension(refused="damaged long name")
        record = payload[position : position + int(head)]
        key, equals, value = record[len(head) + 1 : -1].partition(b"=")
        if not equals or record[-1:] != b"\n":
            return _Extension(refused="damaged long name")
        if key == b"path":
            extension = replace(extension, path=_text(value))
        elif key == b"size":  # of a member too large for the header's own field, but some writers always give it
            if not value.isdigit() or len(value) > 20:
                return _Extension(refused="damaged long name")
            extension = replace(extension, size=int(value))
        elif key.startswith(b"GNU.sparse"):
            extension = replace(extension, refused="sparse member")
        position += len(record)
    return extension


def _after_sparse_map(read: Read, block: bytes, start: int) -> int:
    """Where the payload of an old GNU sparse member starts: behind the blocks that go on with its map."""
    more = block[482]
    for _ in range(_MAX_SPARSE_BLOCKS):
        if not more:
            break
        block = read(start, BLOCK)
        if len(block) < BLOCK:
            break
        start, more = start + BLOCK, block[504]
    return start


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _number(field: bytes) -> int | None:
    """A tar number: octal digits, or base 256 where the first bit is set."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big")
        return value - (1 << 8 * len(field)) if field[0] & 0x40 else value & ~(1 << 8 * len(field) - 1)
    digits = field.split(b"\0", 1)[0].strip()
    if not digits or not digits.isdigit() or b"8" in digits or b"9" in digits:
        return None
    return int(digits, 8)


def _next_header(read: Read, offset: int, size: int) -> int | None:
    """Offset of the first good header at or after `offset`, or None."""
    for place, block in _blocks(read, offset, size):
        if block[257:262] == b"ustar" and parse_header(block) is not None:
            return place
    return None


def _next_block(read: Read, offset: int, size: int) -> int | None:
    """Offset of the first block at or after `offset` that is not zero, or None."""
    for place, block in _blocks(read, offset, size):
        if block != _ZEROS:
            return place
    return None


def _blocks(read: Read, offset: int, size: int) -> Iterator[tuple[int, bytes]]:
    while offset + BLOCK <= size:
        chunk = read(offset, _SCAN_BYTES)
        whole = len(chunk) // BLOCK * BLOCK
        if not whole:
            return
        for start in range(0, whole, BLOCK):
            yield offset + start, chunk[start : start + BLOCK]
        offset += whole


def _ends_in_zeros(read: Read, size: int) -> bool:
    return size >= 2 * BLOCK and read(size // BLOCK * BLOCK - 2 * BLOCK, 2 * BLOCK) == 2 * _ZEROS
