"""The columns of a pool's metadata table: what each holds, and how it is computed from one sample or its captions.

Only what a filter asks for is computed, in one pass over a sample's bytes with at most one decode. The columns of
`IDENTITY` are always there; `json.NAME` takes a plain value (number, string, true, false) out of the sample's own JSON,
as text. Scores of a model (`clip_score`) are added by the stage, from a callable.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
from PIL import Image

from mmfoundry.data.column import Column
from mmfoundry.data.decode import DecodeLimits, UnreadableSample, decode_image, image_size
from mmfoundry.data.derived.base import derived_columns
from mmfoundry.data.perceptual import perceptual_hash
from mmfoundry.data.pixel_statistics import pixel_entropy
from mmfoundry.data.sample import RawSample, image_member, read_text

JSON_PREFIX = "json."
_HEX = frozenset("0123456789abcdef")


IDENTITY: dict[str, Column] = {
    "uid": Column(pl.String(), "text", "128 bits as 32 hex digits: the JSON's `uid`, otherwise see `uid_of`"),
    "key": Column(pl.String(), "text", "the sample's name in its shard"),
    "shard": Column(pl.UInt32(), "text", "number of the shard in the pool, from 0"),
    "index": Column(pl.UInt32(), "text", "number of the sample in its shard, from 0"),
    "caption_index": Column(pl.UInt32(), "text", "number of the caption in its sample, from 0; null without captions"),
    "caption": Column(pl.String(), "text", "the caption, white space at both ends cut; null without captions"),
    "unreadable": Column(pl.String(), "pixels", "why the sample cannot be used; null if nothing was found"),
}
UID_NUMBERS: dict[str, Column] = {  # of every part of a pool, but in no table
    "high": Column(pl.UInt64(), "text", "first half of the uid, as a number"),
    "low": Column(pl.UInt64(), "text", "second half of the uid, as a number"),
}
COMPUTED: dict[str, Column] = {
    "width": Column(pl.UInt32(), "header", "pixels, before EXIF orientation"),
    "height": Column(pl.UInt32(), "header", "pixels, before EXIF orientation"),
    "aspect": Column(pl.Float64(), "header", "longer side / shorter side, at least 1"),
    "image_bytes": Column(pl.UInt64(), "bytes", "size of the encoded image"),
    "sha256": Column(pl.Binary(), "bytes", "SHA-256 of the image's bytes"),
    "perceptual_hash": Column(pl.Binary(), "pixels", "512 bits; few differ between pictures that look the same"),
    "pixel_entropy": Column(pl.Float32(), "pixels", "Shannon entropy of the grey levels, bits a pixel, 0 to 8"),
    "pixel_deviation": Column(pl.Float32(), "pixels", "standard deviation of the pixels, largest over R, G, B; of 255"),
}
METADATA: dict[str, Column] = {
    "url": Column(pl.String(), "metadata", "where the image came from"),
    "face_bboxes": Column(
        pl.List(pl.List(pl.Float64())), "metadata", "faces, each x0, y0, x1, y1 as fractions of the sides"
    ),
}
COLUMNS: dict[str, Column] = {**IDENTITY, **UID_NUMBERS, **METADATA, **COMPUTED, **derived_columns()}
_SIMILARITY = re.compile(r"clip_(\w+)_similarity_score")
_SCORED = (  # what a scorer called NAME makes; DataComp's metadata has them for b32 and l14
    (_SIMILARITY, Column(pl.Float32(), "model", "cosine of image and caption under a CLIP")),
    (
        re.compile(r"(\w+)_(?:img|txt)"),
        Column(pl.List(pl.Float32()), "model", "a CLIP's embedding of image or caption"),
    ),
)
_FOUND = (  # what heads and detectors make
    (re.compile(r"text_area"), Column(pl.Float32(), "model", "share of the image that detected text covers")),
    (re.compile(r"\w+_score"), Column(pl.Float32(), "model", "what a head of this name gives")),
)


def column_named(name: str) -> Column | None:
    """The column of this name, also one of a scorer, head or detector, or `json.NAME`; None if there can be none."""
    if name.startswith(JSON_PREFIX):
        return Column(pl.String(), "text", "a plain value of the sample's JSON, as text")
    if name in COLUMNS:
        return COLUMNS[name]
    return next((column for pattern, column in (*_SCORED, *_FOUND) if pattern.fullmatch(name)), None)


def scorer_of(column: str) -> str | None:
    """The name of the scorer whose column this is; None for all other columns."""
    if column in COLUMNS:
        return None
    return next((found[1] for pattern, _ in _SCORED if (found := pattern.fullmatch(column))), None)


def is_similarity(column: str) -> bool:
    """Whether a column is a CLIP's score of pairs, which a sample's own JSON may have as well."""
    return column not in COLUMNS and _SIMILARITY.fullmatch(column) is not None


def schema(columns: frozenset[str]) -> dict[str, pl.DataType]:
    """Names and types of the table that has these columns: identity first, then the asked ones in a fixed order."""
    asked = {name: column.dtype for name, column in COMPUTED.items() if name in columns}
    given = {name: dtype for name in sorted(columns) if (dtype := _given(name)) is not None}
    return {**{name: column.dtype for name, column in IDENTITY.items()}, **asked, **given}


def _given(column: str) -> pl.DataType | None:
    """The type of a column that a sample's own JSON may have; None for all others."""
    if column in METADATA:
        return METADATA[column].dtype
    if column.startswith(JSON_PREFIX):
        return pl.String()
    return pl.Float64() if is_similarity(column) else None


def rows_of(
    raw: RawSample, shard: int, index: int, columns: frozenset[str], limits: DecodeLimits
) -> list[dict[str, Any]]:
    """The rows of one sample: one a caption, without the columns of language and model.

    Args:
        raw: the sample's bytes.
        shard: number of the shard in the pool.
        index: number of the sample in the shard.
        columns: those asked for; others are left out.
        limits: what an image may weigh.
    Returns:
        At least one row; with a reason in `unreadable` and nulls in what could not be computed where the sample cannot
        be read.
    """
    sample: dict[str, Any] = {"key": raw.key, "shard": shard, "index": index}
    captions: list[str] = []
    meta: dict[str, Any] = {}
    reason = None
    try:
        captions, _, meta = read_text(raw)
    except UnreadableSample as error:
        reason = error.reason
    data = image_member(raw.members)
    sample |= {"uid": uid_of(raw, meta), "unreadable": "no image"}
    sample |= {name: _json_value(meta, name) for name in columns if _given(name) is not None}
    if data is not None:
        sample |= _image_columns(data, columns, limits)
    if reason is not None:
        sample["unreadable"] = reason
    rows = [sample | {"caption_index": i, "caption": as_utf8(caption)} for i, caption in enumerate(captions)]
    return rows or [sample]


def unreadable_row(raw: RawSample, shard: int, index: int, reason: str) -> dict[str, Any]:
    """The row of a sample of which only the key is known."""
    return {"uid": uid_of(raw, {}), "key": raw.key, "shard": shard, "index": index, "unreadable": reason}


def uid_of(raw: RawSample, meta: Mapping[str, Any]) -> str:
    """The sample's uid: `uid` of its JSON where that is 32 hex digits, otherwise made from the sample.

    Made ones are BLAKE2b-128 over the shard's file name, the key and the image's bytes, each after its length: the same
    wherever the folder lies, and different for shards of one name and different content.
    """
    given = meta.get("uid")
    if isinstance(given, str) and len(given) == 32 and _HEX.issuperset(given.lower()):
        return given.lower()
    digest = hashlib.blake2b(digest_size=16)
    for part in (raw.shard.name.encode(), raw.key.encode(), image_member(raw.members) or b""):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def needs(columns: frozenset[str], kind: str) -> bool:
    """Whether one of the columns needs a certain kind of look at the sample."""
    return any(COLUMNS[name].needs == kind for name in columns if name in COLUMNS)


def _image_columns(data: bytes, columns: frozenset[str], limits: DecodeLimits) -> dict[str, Any]:
    """What can be computed; a reason in `unreadable` where the rest cannot."""
    found: dict[str, Any] = {"image_bytes": len(data)}
    if "sha256" in columns:
        found["sha256"] = hashlib.sha256(data).digest()
    reason = None
    try:
        if not data:
            raise UnreadableSample("empty image")
        if needs(columns, "header"):
            height, width = image_size(data)
            found |= {"width": width, "height": height}
            found["aspect"] = max(width, height) / min(width, height) if width and height else None
        if needs(columns, "pixels"):
            pixels = decode_image(data, limits)
            if "pixel_entropy" in columns:
                found["pixel_entropy"] = pixel_entropy(pixels)
            if "pixel_deviation" in columns:
                found["pixel_deviation"] = pixel_deviation(pixels)
            if "perceptual_hash" in columns:
                found["perceptual_hash"] = perceptual_hash(pixels)
    except UnreadableSample as error:
        reason = error.reason
    return {name: value for name, value in found.items() if name in columns} | {"unreadable": reason}


def pixel_deviation(pixels: np.ndarray) -> float:
    """Standard deviation of uint8 (height, width, 3) pixels, the largest over the channels."""
    # from the counts of the 256 values: exact, and many times faster than over the pixels as floats
    counts = np.array(Image.fromarray(pixels).histogram(), np.float64).reshape(3, 256)
    values, total = np.arange(256), pixels.shape[0] * pixels.shape[1]
    mean = counts @ values / total
    variance = (counts * (values - mean[:, None]) ** 2).sum(axis=1) / total
    return float(np.sqrt(variance.max()))


def as_utf8(text: str) -> str:
    """The text with "?" for what cannot be UTF-8: half a surrogate pair, which a JSON's escapes can say."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _json_value(meta: Mapping[str, Any], column: str) -> Any:
    """A column that the sample's JSON has; null where it is not there or of another kind."""
    value = meta.get(column.removeprefix(JSON_PREFIX))
    if column == "face_bboxes":
        return _as_boxes(value)
    if column not in METADATA and not column.startswith(JSON_PREFIX):
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    if isinstance(value, str):
        return as_utf8(value)
    if not column.startswith(JSON_PREFIX):
        return None
    return json.dumps(value) if isinstance(value, bool | int | float) else None


def _as_boxes(value: Any) -> list[list[float]] | None:
    """Boxes of four numbers each; None for what is none."""
    if not isinstance(value, list) or not all(isinstance(box, list) and len(box) == 4 for box in value):
        return None
    if any(isinstance(side, bool) or not isinstance(side, int | float) for box in value for side in box):
        return None
    return [[float(side) for side in box] for box in value]
