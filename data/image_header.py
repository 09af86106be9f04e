"""What an encoded image says about itself, read by us where a decoder's own way to it is slow or has no bound."""

import struct
from dataclasses import dataclass

_EXIF_ORIENTATION = 0x0112
_SEQUENTIAL, _EXTENDED, _PROGRESSIVE = 0xC0, 0xC1, 0xC2  # the JPEG processes that are Huffman-coded with 8 bits
_OTHER_PROCESSES = frozenset((0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF))
_START_OF_SCAN, _APP1 = 0xDA, 0xE1


@dataclass(frozen=True, slots=True)
class JpegMarkers:
    """What stands before a JPEG's first scan.

    Attributes:
        orientation: of EXIF, 1 to 8; 1 where there is none.
        scans: passes over the picture that decoding takes; 1 for all but progressive and non-interleaved files.
    """

    orientation: int
    scans: int


def read_jpeg_markers(data: bytes) -> JpegMarkers | None:
    """Walk the markers before the first scan (ITU T.81, annex B); a few microseconds.

    Args:
        data: a JPEG file.
    Returns:
        None where it is not plain: another process than 8-bit Huffman-coded, several EXIF blocks, bytes between
        markers, or no scan at all.
    """
    position, process, components, exif = 2, 0, 0, b""
    while position + 10 <= len(data):
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker == 0xFF:  # padding
            position += 1
            continue
        if marker == _START_OF_SCAN:
            one_pass = process != _PROGRESSIVE and data[position + 4] >= components
            # inside a scan 0xFF is always escaped, so what is counted are markers
            scans = 1 if one_pass else data.count(b"\xff\xda", position)
            return JpegMarkers(exif_orientation(exif), scans) if process else None
        if marker in (_SEQUENTIAL, _EXTENDED, _PROGRESSIVE):
            process, components = marker, data[position + 9]
            if data[position + 4] != 8:  # bits
                return None
        elif marker in _OTHER_PROCESSES:
            return None
        length = data[position + 2] << 8 | data[position + 3]
        if marker == _APP1 and data[position + 4 : position + 10] == b"Exif\0\0":
            if exif:
                return None
            exif = data[position + 10 : position + 2 + length]
        position += 2 + length
    return None


def exif_orientation(exif: bytes) -> int:
    """The orientation in an EXIF block, 1 to 8; 1 where it says none or is broken, which says nothing of the pixels.

    Args:
        exif: a TIFF header and its directories, without the leading `Exif\\0\\0`.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", exif, entry)
            if tag == _EXIF_ORIENTATION:
                (value,) = struct.unpack_from(order + ("I" if kind == 4 else "H"), exif, entry + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def gif_frames(data: bytes, at_most: int) -> int:
    """Count a GIF's frames without decoding any; stops past `at_most`, or where the file ends early.

    Args:
        data: a GIF file.
        at_most: what there is to know is whether there are more.
    """
    frames = 0
    try:
        position = 13 + _colour_table(data[10])
        while frames <= at_most:
            block = data[position]
            if block == 0x2C:
                frames += 1
                position += 10 + _colour_table(data[position + 9]) + 1
            elif block == 0x21:
                position += 2
            else:
                return frames  # the trailer, or damage that decoding will meet
            while data[position]:
                position += 1 + data[position]
            position += 1
    except IndexError:
        pass
    return frames


def tiff_pages(data: bytes, at_most: int) -> int:
    """Count a TIFF's pages by the chain of its directories; stops past `at_most`, so a chain that is a ring ends.

    Args:
        data: a TIFF or BigTIFF file.
        at_most: what there is to know is whether there are more.
    """
    order = "<" if data[:2] == b"II" else ">"
    pages = 0
    try:
        big = struct.unpack_from(order + "H", data, 2)[0] == 43
        offset_type, count_type, entry, link = ("Q", "Q", 20, 8) if big else ("I", "H", 12, 4)
        while pages <= at_most:
            (place,) = struct.unpack_from(order + offset_type, data, link)
            if place == 0:
                break
            (count,) = struct.unpack_from(order + count_type, data, place)
            pages += 1
            link = place + struct.calcsize(order + count_type) + entry * count
    except (struct.error, OverflowError):  # OverflowError: a place past what a file can have
        pass
    return pages


def _colour_table(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0
