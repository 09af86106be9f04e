"""What is read from headers by hand agrees with Pillow, and ends on whatever it is given."""

import io
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmfoundry.data.image_header import JpegMarkers, exif_orientation, gif_frames, read_jpeg_markers, tiff_pages

from .conftest import encode, smooth


@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize("orientation", [None, 0, 1, 3, 8, 9])
def test_orientation_is_pillows(orientation: int | None, endian: str) -> None:
    exif = Image.Exif()
    exif.endian = endian
    exif[0x010F], exif[0x0132] = "a maker of cameras", "2020:01:01 00:00:00"
    if orientation is not None:
        exif[0x0112] = orientation
    block = exif.tobytes()
    block = block.removeprefix(b"Exif\0\0")
    assert block[:2] == (b"II" if endian == "<" else b"MM")
    assert exif_orientation(block) == (orientation if orientation in range(1, 9) else 1)


def test_orientation_may_be_a_long() -> None:
    assert exif_orientation(b"II*\0" + struct.pack("<IHHHII", 8, 1, 0x0112, 4, 1, 6)) == 6
    assert exif_orientation(b"MM\0*" + struct.pack(">IHHHIHH", 8, 1, 0x0112, 3, 1, 6, 0)) == 6


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=80), start=st.sampled_from([b"", b"II*\0", b"MM\0*", b"II+\0", b"\xff\xd8", b"GIF89a"]))
def test_junk_ends(data: bytes, start: bytes) -> None:
    junk = start + data
    assert 1 <= exif_orientation(junk) <= 8
    read_jpeg_markers(junk)
    assert 0 <= gif_frames(junk, 5) <= 6
    assert 0 <= tiff_pages(junk, 5) <= 6


@pytest.mark.parametrize("count", [1, 2, 7])
def test_frames_and_pages_are_pillows(count: int) -> None:
    pictures = [Image.fromarray(smooth(number)) for number in range(count)]
    for kind, counted in (("GIF", gif_frames), ("TIFF", tiff_pages)):
        data = encode(pictures[0], kind, save_all=True, append_images=pictures[1:])
        assert counted(data, 100) == Image.open(io.BytesIO(data)).n_frames == count
    big = encode(pictures[0], "TIFF", save_all=True, append_images=pictures[1:], big_tiff=True)
    assert tiff_pages(big, 100) == count


def test_a_ring_of_pages_ends() -> None:
    ring = b"II*\0" + struct.pack("<IHI", 8, 0, 8)
    assert tiff_pages(ring, 50) == 51


def test_markers_say_how_many_passes_a_jpeg_takes() -> None:
    plain = encode(smooth(0), "JPEG")
    assert read_jpeg_markers(plain) == JpegMarkers(orientation=1, scans=1)
    assert read_jpeg_markers(encode(smooth(0), "JPEG", progressive=True)) == JpegMarkers(orientation=1, scans=10)
    assert read_jpeg_markers(encode(Image.fromarray(smooth(0)).convert("L"), "JPEG")).scans == 1
    padded = plain[:2] + b"\xff\xff\xff" + plain[2:]
    assert read_jpeg_markers(padded) == JpegMarkers(orientation=1, scans=1)


def test_a_jpeg_that_is_not_plain_is_left_to_others() -> None:
    plain = encode(smooth(0), "JPEG")
    frame = plain.index(b"\xff\xc0")
    for process in (0xC3, 0xC9):  # lossless, arithmetic
        assert read_jpeg_markers(plain[: frame + 1] + bytes([process]) + plain[frame + 2 :]) is None
    assert read_jpeg_markers(plain[:frame]) is None
    assert read_jpeg_markers(plain[:2] + b"junk" + plain[2:]) is None
    exif = b"\xff\xe1" + struct.pack(">H", 8) + b"Exif\0\0"
    assert read_jpeg_markers(plain[:2] + exif + plain[2:]).orientation == 1
