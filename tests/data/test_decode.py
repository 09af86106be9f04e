"""decode_image: limits before pixels, and a defined result for every odd kind of file."""

import io
import struct
import time
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from mmfoundry.data.decode import DecodeLimits, LazyImage, UnreadableImage, decode_image, image_size

from .photographs import photograph

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


def _with_orientation(jpeg: bytes, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    block = exif.tobytes()
    assert block.startswith(b"Exif\0\0")
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + jpeg[2:]


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("shrink", [2, 4, 8])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_is_decoded_at_a_fraction_of_its_size(orientation: int, shrink: int, progressive: bool) -> None:
    data = _with_orientation(_encode(photograph(203, 301), "JPEG", quality=90, progressive=progressive), orientation)
    image = LazyImage(data)
    assert image.scalable
    assert image.size == ((203, 301) if orientation < 5 else (301, 203))
    found = image.reduced(shrink)
    assert found.shape == (-(-image.size[0] // shrink), -(-image.size[1] // shrink), 3)
    assert found.flags.c_contiguous
    reference = Image.open(io.BytesIO(data))
    reference.draft("RGB", (301 // shrink, 203 // shrink))  # Pillow's own way to libjpeg's scaling
    np.testing.assert_array_equal(found, np.asarray(ImageOps.exif_transpose(reference)))
    np.testing.assert_array_equal(
        image.pixels, np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    )


def test_a_pixel_of_a_fraction_stands_for_its_square() -> None:
    data = _encode(photograph(240, 320), "JPEG", quality=95)
    whole = decode_image(data).astype(float)
    for shrink in (2, 4, 8):
        means = whole.reshape(240 // shrink, shrink, 320 // shrink, shrink, 3).mean((1, 3))
        off = abs(LazyImage(data).reduced(shrink) - means).mean()
        shifted = abs(LazyImage(data).reduced(shrink)[1:] - means[:-1]).mean()
        assert off < 4 < shifted  # the transform keeps a little more of the edges than a mean does


def test_pixels_are_decoded_when_they_are_asked_for() -> None:
    data = _encode(photograph(64, 64), "JPEG")
    image = LazyImage(data[: len(data) // 2])
    assert image.size == (64, 64)
    for ask in (lambda: image.pixels, lambda: image.reduced(2)):
        with pytest.raises(UnreadableImage) as caught:
            ask()
        assert caught.value.reason == "damaged image"
    whole = LazyImage(data)
    assert whole.pixels is whole.pixels
    png = _encode(photograph(64, 64))
    cut = LazyImage(png[: len(png) // 2])
    for _ in range(2):  # damage stays damage, however often it is asked for
        with pytest.raises(UnreadableImage, match="damaged image"):
            _ = cut.pixels


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_size_is_the_one_that_is_shown(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    image = LazyImage(_encode(COLOUR, kind, exif=exif))
    assert image.size == image.pixels.shape[:2] == (24, 16)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_what_is_frozen_neither_changes_nor_grows(kind: str) -> None:
    data = _encode(photograph(40, 60), kind)
    image = LazyImage(data)
    before = image.pixels.copy()
    held = image.freeze()
    assert held == (len(data) if kind == "JPEG" else 40 * 60 * 3)
    np.testing.assert_array_equal(image.pixels, before)
    assert image.freeze() == held
    if kind == "PNG":
        assert not image.pixels.flags.writeable
    else:
        assert image.pixels is not image.pixels


def _png(header: tuple[int, ...], rows: np.ndarray) -> bytes:
    """A PNG of 16-bit channels; `rows` is uint16 (height, width, channels)."""
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    parts = [_chunk(b"IHDR", struct.pack(">IIBBBBB", *header)), _chunk(b"IDAT", zlib.compress(lines))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + _chunk(b"IEND", b"")


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bit_pngs_of_every_kind_keep_their_high_byte(colour: int, channels: int) -> None:
    rows = np.random.default_rng(colour).integers(0, 1 << 16, (5, 7, channels), dtype=np.uint16)
    if channels in (2, 4):
        rows[..., -1] = 0xFFFF  # opaque
    high = (rows >> 8).astype(np.uint8)
    expected = high[..., :3] if channels >= 3 else np.repeat(high[..., :1], 3, axis=2)
    np.testing.assert_array_equal(decode_image(_png((7, 5, 16, colour, 0, 0, 0), rows)), expected)


def test_floats_are_cut_to_bytes() -> None:
    values = np.array([[-5.0, 0.0, 100.0, 255.0, 1e9]], dtype=np.float32)
    found = decode_image(_encode(Image.fromarray(values), "TIFF"))
    assert found[0, :, 0].tolist() == [0, 0, 100, 255, 255]


def test_cmyk_and_transparency_in_other_files() -> None:
    cmyk = COLOUR.convert("CMYK")
    np.testing.assert_array_equal(decode_image(_encode(cmyk, "TIFF")), np.asarray(cmyk.convert("RGB")))
    clear = COLOUR.convert("RGBA")
    clear.putalpha(Image.new("L", clear.size, 0))
    for kind in ("WEBP", "TIFF", "AVIF"):
        assert (decode_image(_encode(clear, kind)) == 255).all()


def test_a_colour_that_stands_for_clear_becomes_white() -> None:
    found = decode_image(_encode(Image.new("RGB", (4, 4), (10, 20, 30)), transparency=(10, 20, 30)))
    assert (found == 255).all()


def _frames(kind: str, count: int) -> bytes:
    frames = [Image.new("RGB", (16, 16), (40 * number, 10, 200)) for number in range(count)]
    if kind == "GIF":
        frames = [frame.quantize(4) for frame in frames]
    return _encode(frames[0], kind, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_frames_are_limited_and_the_first_is_taken(kind: str) -> None:
    data = _frames(kind, 5)
    assert abs(decode_image(data, DecodeLimits(max_frames=5)).astype(int) - (0, 10, 200)).max() < 12
    assert _reason(data, DecodeLimits(max_frames=4)) == "too many frames"
    assert _reason(_frames(kind, 2), DecodeLimits(max_frames=1)) == "too many frames"
    assert decode_image(_frames(kind, 1), DecodeLimits(max_frames=1)).shape == (16, 16, 3)


def test_of_two_pictures_in_one_jpeg_the_first_is_taken() -> None:
    first, second = photograph(64, 64), COLOUR.resize((64, 64))
    data = _encode(first, "MPO", save_all=True, append_images=[second])
    np.testing.assert_array_equal(decode_image(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_a_jpeg_of_very_many_scans_is_refused() -> None:
    """Each scan of a progressive file costs a pass over all its pixels, and takes a few bytes."""
    data = _encode(COLOUR, "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    assert decode_image(data).shape == (16, 24, 3)
    assert _reason(data[:-2] + last * 100 + data[-2:]) == "too many scans"


def test_a_jpegs_size_is_limited_by_its_header() -> None:
    data = bytearray(_encode(COLOUR, "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    assert _reason(bytes(data)) == "too many pixels"


@pytest.mark.parametrize("bits", [12, 16])
def test_a_jpeg_of_more_bits_is_refused(bits: int) -> None:
    data = bytearray(_encode(COLOUR, "JPEG"))
    data[data.index(b"\xff\xc0") + 4] = bits
    assert _reason(bytes(data)) == "unknown image format"


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow says what it skips in EXIF
@pytest.mark.parametrize("progressive", [False, True])
def test_random_damage_to_a_jpeg_raises_nothing_else_at_a_fraction(progressive: bool) -> None:
    noise = np.random.default_rng(8)
    data = np.frombuffer(_with_orientation(_encode(COLOUR, "JPEG", progressive=progressive), 6), np.uint8)
    read = 0
    for _ in range(300):
        hurt = data.copy()
        hurt[noise.integers(0, len(data), 2)] = noise.integers(0, 256, 2)
        try:
            image = LazyImage(hurt.tobytes(), DecodeLimits(max_pixels=1 << 20))
            if image.scalable:
                assert image.reduced(2).shape == (-(-image.size[0] // 2), -(-image.size[1] // 2), 3)
                read += 1
        except UnreadableImage:
            continue
    assert read > 15
