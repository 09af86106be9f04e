"""Faces made unrecognisable, as DataComp's downloader does it before a picture is written into a shard."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFilter

from mmfoundry.data.decode import DecodeLimits, decode_image

_MARGIN = 0.1  # of a box's longer side, on each of its sides
_SIGMA = 0.1  # of the longest side of all boxes
_FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}
_QUALITY = 95
_MAX_WEBP_SIDE, _MAX_JPEG_SIDE = 16_383, 65_500


def blur_boxes(pixels: np.ndarray, boxes: Sequence[Sequence[float]]) -> np.ndarray:
    """Blur what lies in boxes, the edge of each fading into the picture.

    The rule is that of Yang et al. 2022 (arXiv 2103.06191), which DataComp follows: boxes grow by a tenth of their
    longer side all around; picture and mask are blurred by a Gaussian whose sigma is a tenth of the longest side of
    all boxes; the blurred picture shows as far as the blurred mask lets it.

    Args:
        pixels: uint8 (height, width, 3); not changed.
        boxes: x0, y0, x1, y1, as fractions of width and height, as in `face_bboxes`.
    Returns:
        uint8 (height, width, 3); the picture itself where there are no boxes.
    """
    if not len(boxes):
        return pixels
    height, width = pixels.shape[:2]
    mask = np.zeros((height, width), np.uint8)
    longest = 0
    for box in boxes:
        x0, y0, x1, y1 = (int(part * side) for part, side in zip(box, (width, height) * 2, strict=True))
        side = max(x1 - x0, y1 - y0)
        longest, margin = max(longest, side), _MARGIN * side
        left, top = max(0, int(x0 - margin)), max(0, int(y0 - margin))
        mask[top : int(y1 + margin), left : int(x1 + margin)] = 255
    smooth = ImageFilter.GaussianBlur(max(1.0, _SIGMA * longest))
    picture = Image.fromarray(pixels)
    blurred = Image.composite(picture.filter(smooth), picture, Image.fromarray(mask).filter(smooth))
    return np.asarray(blurred)


def blur_image(data: bytes, boxes: Sequence[Sequence[float]], limits: DecodeLimits | None = None) -> tuple[str, bytes]:
    """An encoded image with its boxes blurred.

    Args:
        data: an encoded image.
        boxes: as for `blur_boxes`; without any, `data` itself comes back.
        limits: what the image may weigh; the defaults of `DecodeLimits` if None.
    Returns:
        The extension of its format now, and its bytes. JPEG and WebP keep their format (at quality 95), everything
        else becomes PNG. Metadata goes: a thumbnail in it would show the face. EXIF's orientation is applied.
    Raises:
        UnreadableImage: it cannot be decoded.
    """
    kind = _kind_of(data)
    if not len(boxes):
        return kind, data
    picture = Image.fromarray(blur_boxes(decode_image(data, limits or DecodeLimits()), boxes))
    if (kind == "webp" and max(picture.size) > _MAX_WEBP_SIDE) or (
        kind == "jpg" and max(picture.size) > _MAX_JPEG_SIDE
    ):
        kind = "png"
    out = io.BytesIO()
    options = {} if kind == "png" else {"quality": _QUALITY}
    picture.save(out, _FORMATS[kind], **options)
    return kind, out.getvalue()


def _kind_of(data: bytes) -> str:
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else "png"
