"""decode_image: limits before pixels, and a defined result for every odd kind of file."""

import io
import struct
import time
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from mmfoundry.data.decode import DecodeLimits, UnreadableImage, decode_image, image_size

GREY = Image.linear_gradient("L").resize((24, 16))
COLOUR = Image.merge("RGB", (GREY, GREY.rotate(180), GREY.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))


def _encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _reason(data: bytes, limits: DecodeLimits | None = None) -> str:
    with pytest.raises(UnreadableImage) as caught:
        decode_image(data, limits or DecodeLimits())
    return caught.value.reason


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_kinds_come_back_as_they_were(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    found = decode_image(_encode(COLOUR, kind, **options))
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, np.asarray(COLOUR))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_jpeg_gives_pillows_pixels(mode: str, subsampling: int) -> None:
    data = _encode(COLOUR.resize((333, 217)).convert(mode), "JPEG", quality=85, subsampling=subsampling)
    np.testing.assert_array_equal(decode_image(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_alpha_lies_on_white() -> None:
    image = COLOUR.convert("RGBA")
    image.putalpha(Image.new("L", image.size, 0))
    assert (decode_image(_encode(image)) == 255).all()
    half = Image.merge("LA", (Image.new("L", (4, 4), 0), Image.new("L", (4, 4), 128)))
    assert (abs(decode_image(_encode(half)).astype(int) - 127) <= 1).all()


def test_palettes_become_colours_and_their_transparency_white() -> None:
    palette = COLOUR.quantize(8)
    np.testing.assert_array_equal(decode_image(_encode(palette)), np.asarray(palette.convert("RGB")))
    clear = Image.new("P", (4, 4), 0)
    clear.putpalette([10, 20, 30, 40, 50, 60])
    assert (decode_image(_encode(clear, transparency=0)) == 255).all()


def test_sixteen_bits_keep_their_high_byte() -> None:
    values = (np.arange(16 * 16, dtype=np.uint16) * 256 + 200).reshape(16, 16)
    expected = np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)
    np.testing.assert_array_equal(decode_image(_encode(Image.fromarray(values))), expected)


def test_one_bit_and_cmyk_become_rgb() -> None:
    one = GREY.convert("1")
    np.testing.assert_array_equal(decode_image(_encode(one)), np.asarray(one.convert("RGB")))
    cmyk = _encode(COLOUR.convert("CMYK"), "JPEG", quality=95)
    np.testing.assert_array_equal(decode_image(cmyk), np.asarray(Image.open(io.BytesIO(cmyk)).convert("RGB")))
    assert abs(decode_image(cmyk).astype(int) - np.asarray(COLOUR)).mean() < 6


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [COLOUR.quantize(16), COLOUR.rotate(180).quantize(16)]
    for kind in ("GIF", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = _encode(frames[0].convert("RGB"), kind, save_all=True, append_images=frames[1:], **options)
        first = Image.open(io.BytesIO(data)).convert("RGB")
        np.testing.assert_array_equal(decode_image(data), np.asarray(first))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    corner = Image.new("RGB", (32, 16), "black")
    corner.paste((255, 255, 255), (0, 0, 16, 8))
    found = decode_image(_encode(corner, kind, exif=exif))
    assert found.shape == ((16, 32, 3) if orientation < 5 else (32, 16, 3))
    bottom, right = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    height, width = found.shape[0] // 2, found.shape[1] // 2
    white = found[height * bottom : height * (bottom + 1), width * right : width * (right + 1)]
    assert white.min() > 200
    assert found.astype(int).sum() < white.astype(int).sum() * 1.1


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_file_is_refused(kind: str, share: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = _encode(noise, kind)
    assert _reason(data[: int(len(data) * share)]) in ("damaged image", "unknown image format")


def test_a_broken_checksum_is_refused() -> None:
    data = bytearray(_encode(COLOUR))
    data[data.index(b"IDAT") + 20] ^= 1
    assert _reason(bytes(data)) == "damaged image"


@pytest.mark.parametrize("data", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", bytes(100)])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    assert _reason(data) in ("empty image", "unknown image format", "damaged image")


def test_vector_and_postscript_files_are_no_images() -> None:
    assert _reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") == "unknown image format"
    assert _reason(b"<svg xmlns='http://www.w3.org/2000/svg'/>") == "unknown image format"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_000, 12_000, 60_000])
def test_a_bomb_is_refused_from_its_header(side: int) -> None:
    rows = zlib.compress(bytes(1000), 9)
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")
    begin = time.perf_counter()
    assert _reason(data) == "too many pixels"
    assert time.perf_counter() - begin < 0.5


def test_limits_are_the_callers() -> None:
    data = _encode(COLOUR)
    assert _reason(data, DecodeLimits(max_bytes=len(data) - 1)) == "too many bytes"
    assert _reason(data, DecodeLimits(max_pixels=24 * 16 - 1)) == "too many pixels"
    assert decode_image(data, DecodeLimits(max_bytes=len(data), max_pixels=24 * 16)).shape == (16, 24, 3)
    assert image_size(data) == (16, 24)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow says what it skips in a TIFF
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF"])
def test_random_damage_raises_nothing_else(kind: str) -> None:
    noise = np.random.default_rng(7)
    data = np.frombuffer(_encode(COLOUR, kind), np.uint8)
    for _ in range(60):
        hurt = data.copy()
        hurt[noise.integers(0, len(data), 3)] = noise.integers(0, 256, 3)
        try:
            assert decode_image(hurt.tobytes(), DecodeLimits(max_pixels=1 << 20)).ndim == 3
        except UnreadableImage:
            continue


def test_a_process_that_lets_half_images_pass_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(RuntimeError, match="LOAD_TRUNCATED_IMAGES"):
        decode_image(_encode(COLOUR))


def test_simplejpeg_is_the_turbo_that_pillow_has() -> None:
    """Equal pixels need equal inverse transforms and upsampling; the defaults that decode_image relies on."""
    data = _encode(COLOUR.resize((100, 75)), "JPEG", quality=50)
    assert (simplejpeg.decode_jpeg(data) == np.asarray(Image.open(io.BytesIO(data)))).all()
