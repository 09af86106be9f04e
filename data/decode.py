"""Image bytes from strangers -> RGB pixels, bounded before anything is decoded.

What each kind of file gives: EXIF orientation is applied; alpha (also a palette's) is laid over white; CMYK and
palette become RGB; 16-bit grey keeps its high byte; of an animation the first frame is taken; a truncated file is
refused, never padded with grey.
"""

import io
import struct
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

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
    """

    max_bytes: int = 64 << 20
    max_pixels: int = 64_000_000


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
        UnreadableImage: `reason` is "empty image", "too many bytes", "too many pixels", "unknown image format" or
            "damaged image".
    """
    if not data:
        raise UnreadableImage("empty image")
    if len(data) > limits.max_bytes:
        raise UnreadableImage("too many bytes", f"{len(data)} > {limits.max_bytes}")
    with _open(data) as image:
        if image.width * image.height > limits.max_pixels:
            raise UnreadableImage("too many pixels", f"{image.width} x {image.height} > {limits.max_pixels}")
        if image.format == "JPEG" and image.mode in ("RGB", "L") and _orientation(image) == 1:
            return _decode_jpeg(data)
        return np.array(_rgb(image))


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


def _decode_jpeg(data: bytes) -> np.ndarray:
    try:
        # strict: libjpeg's warnings ("premature end of data") are errors, or half an image would pass as whole
        return simplejpeg.decode_jpeg(data, "RGB", strict=True)
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
        if image.mode == "RGB":
            return image
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            return Image.alpha_composite(white, image).convert("RGB")
        return image.convert("RGB")
    except _DECODER_ERRORS as error:
        raise UnreadableImage("damaged image", str(error)) from error
