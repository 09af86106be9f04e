"""Image bytes from strangers -> RGB pixels, bounded before anything is decoded.

What each kind of file gives: EXIF orientation is applied; alpha (also a palette's) is laid over white; CMYK and
palette become RGB; 16-bit channels keep their high byte; floats are cut to 0..255; of an animation or a TIFF of several
pages the first is taken; a truncated file is refused, never padded with grey. Colour profiles are not applied, as in
open_clip.

JPEGs go to libjpeg-turbo, which can decode them at half, a quarter or an eighth of their size for less than the whole;
everything else goes to Pillow.
"""

import io
import struct
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from mmfoundry.data.image_header import gif_frames, read_jpeg_markers, tiff_pages
from mmfoundry.pipeline.errors import DamagedInput

_EXIF_ORIENTATION = 0x0112
# What Pillow's decoders raise on bytes that they do not like; anything else is a bug and is let through.
_DECODER_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,  # its PNG reader's word for a broken chunk
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    ZeroDivisionError,
    RuntimeError,  # its AVIF reader's
    MemoryError,
    struct.error,
    Image.DecompressionBombError,
)
_MAX_JPEG_SCANS = 100  # encoders write about ten; each costs a pass over the whole picture
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap height and width
SHRINKS = (8, 4, 2)  # libjpeg-turbo also has odd eighths, whose slower transforms cost more than the next larger here
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")


class UnreadableSample(DamagedInput):
    """A sample that cannot be used: the loader counts it, logs its key and draws another.

    Attributes:
        reason: one of a small set of phrases, by which samples are counted.
        detail: what was found in this sample; may be empty.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class UnreadableImage(UnreadableSample):
    """An image that is over a limit, damaged, or in no known format."""


@dataclass(frozen=True, kw_only=True)
class DecodeLimits:
    """What an image may weigh; looked at in its header, before its pixels are decoded.

    Attributes:
        max_bytes: encoded size.
        max_pixels: width times height, of one frame.
        max_frames: of an animation, or pages of a TIFF; only the first is decoded.
    """

    max_bytes: int = 64 << 20
    max_pixels: int = 64_000_000
    max_frames: int = 1000


class LazyImage:
    """An encoded image: its header is known to be within the limits, its pixels are decoded when asked for.

    Attributes:
        scalable: the size as shown is known from the header, and `reduced` decodes less than the whole; true of JPEGs.
    """

    __slots__ = ("_data", "_frozen", "_opened", "_orientation", "_pixels", "_stored", "scalable")

    def __init__(self, data: bytes, limits: DecodeLimits = DecodeLimits()):
        """Read the header.

        Args:
            data: an encoded image: PNG, JPEG, WebP, GIF, BMP, TIFF, PPM or AVIF.
            limits: what it may weigh.
        Raises:
            UnreadableImage: `reason` is "empty image", "too many bytes", "too many pixels", "too many frames", "too
                many scans", "unknown image format" or "damaged image".
        """
        if not data:
            raise UnreadableImage("empty image")
        if len(data) > limits.max_bytes:
            raise UnreadableImage("too many bytes", f"{len(data)} > {limits.max_bytes}")
        self._data, self._frozen = data, False
        self._pixels: np.ndarray | None = None
        self._opened: Image.Image | None = None
        plain = _plain_jpeg(data)
        self.scalable = plain is not None
        if plain is None:
            self._opened = _open(data)
            self._stored, self._orientation = (self._opened.height, self._opened.width), 1  # or what decoding finds
        else:
            self._stored, self._orientation = plain
        height, width = self._stored
        if width * height > limits.max_pixels:
            raise UnreadableImage("too many pixels", f"{width} x {height} > {limits.max_pixels}")
        if self._opened is not None and _frames(data, self._opened, limits.max_frames) > limits.max_frames:
            raise UnreadableImage("too many frames", f"more than {limits.max_frames}")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width as shown, after EXIF orientation; decodes what is not `scalable`, as a PNG may end with it.

        Raises:
            UnreadableImage: "damaged image".
        """
        if not self.scalable:
            return self.pixels.shape[0], self.pixels.shape[1]
        height, width = self._stored
        return (width, height) if self._orientation in _TURNED else (height, width)

    @property
    def pixels(self) -> np.ndarray:
        """The whole image, decoded once and kept: uint8 (height, width, 3), RGB, C-contiguous.

        Raises:
            UnreadableImage: "damaged image".
        """
        if self._pixels is not None:
            return self._pixels
        pixels = self.reduced(1) if self.scalable else self._decode()
        if not (self._frozen and self.scalable):
            self._pixels = pixels
        return pixels

    def reduced(self, shrink: int, buffer: np.ndarray | None = None) -> np.ndarray:
        """Decode at a fraction of the size, by libjpeg-turbo's smaller inverse transforms; not kept.

        Args:
            shrink: 1, 2, 4 or 8; only for what is `scalable`.
            buffer: uint8 (at least as many bytes as the result has,) to decode into; the result may lie in it.
        Returns:
            uint8 (ceil(height / shrink), ceil(width / shrink), 3), RGB, C-contiguous; the pixel at (y, x) stands for
            the square of `shrink` pixels that starts at (y * shrink, x * shrink); where EXIF mirrors a side that is no
            multiple of `shrink`, for one that starts up to `shrink` - 1 before.
        Raises:
            UnreadableImage: "damaged image".
        """
        assert self.scalable
        height, width = self._stored
        least = (-(-height // shrink), -(-width // shrink)) if shrink > 1 else (0, 0)
        pixels = _decode_jpeg(self._data, least, buffer)
        if self._orientation == 1:
            return pixels
        return np.ascontiguousarray(_turn(pixels, self._orientation))

    def freeze(self) -> int:
        """Make it safe to share: pixels that are kept become read-only, and it does not grow any more.

        What can only be decoded whole is decoded now; a JPEG stays as it is, and is decoded each time it is asked for.

        Returns:
            The bytes that it holds.
        Raises:
            UnreadableImage: "damaged image".
        """
        self._frozen = True
        if self.scalable:
            self._pixels = None
            return len(self._data)
        self.pixels.flags.writeable = False
        self._data = b""  # the pixels are kept
        return self.pixels.nbytes

    def _decode(self) -> np.ndarray:
        opened, self._opened = self._opened or _open(self._data), None
        with opened as image:
            if image.format == "JPEG" and image.mode in ("RGB", "L") and _orientation(image) == 1:
                return _decode_jpeg(self._data)  # strict, which Pillow is not
            return np.array(_rgb(image))


def image_size(data: bytes) -> tuple[int, int]:
    """Height and width from the header, before EXIF orientation.

    Raises:
        UnreadableImage: the format is not known or the header is broken.
    """
    with _open(data) as image:
        return image.height, image.width


def decode_image(data: bytes, limits: DecodeLimits = DecodeLimits()) -> np.ndarray:
    """Decode one image.

    Args:
        data: an encoded image: PNG, JPEG, WebP, GIF, BMP, TIFF, PPM or AVIF.
        limits: checked in the header, before decoding.
    Returns:
        uint8 (height, width, 3), RGB, C-contiguous.
    Raises:
        UnreadableImage: see `LazyImage` for the reasons.
    """
    return LazyImage(data, limits).pixels


def _plain_jpeg(data: bytes) -> tuple[tuple[int, int], int] | None:
    """Size as stored and orientation of an 8-bit grey or colour JPEG; None for whatever Pillow must judge.

    An order of magnitude quicker than Pillow's way to the same, which counts beside small pictures.
    """
    if data[:3] != b"\xff\xd8\xff":
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except (ValueError, KeyError):  # KeyError: a subsampling that simplejpeg has no name for
        return None
    markers = read_jpeg_markers(data)
    if markers is None or colours not in ("YCbCr", "RGB", "Gray"):
        return None
    if markers.scans > _MAX_JPEG_SCANS:
        raise UnreadableImage("too many scans", f"{markers.scans} > {_MAX_JPEG_SCANS}")
    return (height, width), markers.orientation


def _frames(data: bytes, image: Image.Image, at_most: int) -> int:
    """Frames or pages; GIF's and TIFF's are counted here, as Pillow walks all of them however many there are."""
    if image.format == "GIF":
        return gif_frames(data, at_most)
    if image.format == "TIFF":
        return tiff_pages(data, at_most)
    return int(getattr(image, "n_frames", 1))


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation: (height, width, 3) as stored -> as shown; a view."""
    if orientation in _TURNED:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels


def _open(data: bytes) -> Image.Image:
    """Read the header only; Pillow's own pixel limit, when it strikes first, counts as ours."""
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise RuntimeError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set: half an image would pass as a whole one")
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage("too many pixels", str(error)) from error
    except UnidentifiedImageError as error:
        raise UnreadableImage("unknown image format", f"starts with {data[:8]!r}") from error
    except _DECODER_ERRORS as error:
        raise UnreadableImage("damaged image", str(error)) from error


def _orientation(image: Image.Image) -> int:
    if image.format == "JPEG" and "exif" not in image.info:
        return 1
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except _DECODER_ERRORS:  # a broken EXIF block says nothing about the pixels
        return 1


def _decode_jpeg(data: bytes, least: tuple[int, int] = (0, 0), buffer: np.ndarray | None = None) -> np.ndarray:
    """Decode at the smallest scale that gives at least this height and width; (0, 0) is the whole size."""
    try:
        # strict: libjpeg's warnings ("premature end of data") are errors, or half an image would pass as whole
        return simplejpeg.decode_jpeg(data, "RGB", min_height=least[0], min_width=least[1], buffer=buffer, strict=True)
    except ValueError as error:
        raise UnreadableImage("damaged image", str(error)) from error


def _rgb(image: Image.Image) -> Image.Image:
    try:
        image.load()
        if _orientation(image) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode in ("I;16", "I;16B", "I;16L", "I"):
            # Pillow's own conversion clips at 255 and gives a white picture
            values = np.asarray(image).astype(np.int64)
            image = Image.fromarray((values.clip(0, 65535) >> 8).astype(np.uint8))
        if image.mode == "RGB" and "transparency" not in image.info:
            return image
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            return Image.alpha_composite(white, image).convert("RGB")
        return image.convert("RGB")
    except _DECODER_ERRORS as error:
        raise UnreadableImage("damaged image", str(error)) from error
