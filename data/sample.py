"""What the loader hands on: a sample as bytes (`RawSample`) and as the pipeline's own type (`Sample`)."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmfoundry.data.decode import DecodeLimits, LazyImage, UnreadableSample
from mmfoundry.data.npy import NPY
from mmfoundry.data.shard_names import Shard

MAX_TEXT_BYTES = 4 << 20  # of `txt` and of `json`, which grow more than tenfold when they are parsed
IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm")


@dataclass(frozen=True, slots=True)
class RawSample:
    """One sample as it lies in its shard.

    Attributes:
        key: member path without its extension.
        members: payload by extension, lower case and without the dot, e.g. `{"png": b"...", "txt": b"..."}`.
        shard: the tar that it was read from.
    """

    key: str
    members: dict[str, bytes]
    shard: Shard


@dataclass(slots=True, init=False)
class Sample:
    """One image with what is said about it.

    Attributes:
        key: unique within its shard.
        picture: the image as it was given: pixels, or one that is not decoded yet. Hand this to `TrainTransform`,
            which then decodes no more of a JPEG than it needs.
        text: captions, in order; may be empty.
        messages: turns `{"role": "user" | "assistant" | "system", "content": str}`; None if the sample has none.
        meta: every other entry of the sample's JSON.
        arrays: its `.npy` members by extension, lower case and without the first dot, as bytes: see `npy.read_npy`.
    """

    key: str
    picture: np.ndarray | LazyImage
    text: list[str]
    messages: list[dict[str, Any]] | None
    meta: dict[str, Any]
    arrays: dict[str, bytes]

    def __init__(
        self,
        key: str,
        image: np.ndarray | LazyImage,
        text: list[str] | None = None,
        messages: list[dict[str, Any]] | None = None,
        meta: dict[str, Any] | None = None,
        arrays: dict[str, bytes] | None = None,
    ):
        """Take the parts; `image` is uint8 (height, width, 3), RGB, or one not decoded yet."""
        self.key, self.picture, self.messages = key, image, messages
        self.text = [] if text is None else text
        self.meta = {} if meta is None else meta
        self.arrays = {} if arrays is None else arrays

    @property
    def image(self) -> np.ndarray:
        """The whole image: uint8 (height, width, 3), RGB; decoded at the first call.

        Raises:
            UnreadableImage: its pixels are damaged.
        """
        return self.picture.pixels if isinstance(self.picture, LazyImage) else self.picture

    def freeze(self) -> int:
        """Make the image safe to share: read-only, and of a size that stays; see `LazyImage.freeze`.

        Returns:
            The bytes that image and arrays hold.
        Raises:
            UnreadableImage: its pixels are damaged.
        """
        arrays = sum(map(len, self.arrays.values()))
        if isinstance(self.picture, LazyImage):
            return arrays + self.picture.freeze()
        self.picture.flags.writeable = False
        return arrays + self.picture.nbytes


def image_member(members: dict[str, bytes]) -> bytes | None:
    """The payload of the sample's image, by the order of `IMAGE_EXTENSIONS`; None if it has none."""
    for extension in IMAGE_EXTENSIONS:
        if extension in members:
            return members[extension]
    return None


def read_text(raw: RawSample) -> tuple[list[str], list[dict[str, Any]] | None, dict[str, Any]]:
    """Captions, messages and other metadata of a sample, without decoding its image.

    Captions are the JSON's `captions` where it has them, otherwise the lines of `txt`, otherwise those of the JSON's
    `caption`, as img2dataset has it; blank ones are left out.

    Raises:
        UnreadableSample: there is too much text, it is not UTF-8, the JSON is broken or not an object, or a field has
            the wrong type.
    """
    for kind in ("txt", "json"):
        size = len(raw.members.get(kind, b""))
        if size > MAX_TEXT_BYTES:
            raise UnreadableSample("too much text", f"{kind} has {size} > {MAX_TEXT_BYTES} bytes")
    meta = _read_json(raw)
    captions = meta.pop("captions", None)
    messages = meta.pop("messages", None)
    if captions is None:
        try:
            captions = raw.members["txt"].decode("utf-8").splitlines() if "txt" in raw.members else _caption(meta)
        except UnicodeDecodeError as error:
            raise UnreadableSample("text is not UTF-8", str(error)) from error
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise UnreadableSample("captions are not a list of strings")
    if messages is not None and not (isinstance(messages, list) and all(isinstance(turn, dict) for turn in messages)):
        raise UnreadableSample("messages are not a list of objects")
    return [caption.strip() for caption in captions if caption.strip()], messages, meta


def _caption(meta: dict[str, Any]) -> list[str]:
    caption = meta.get("caption")
    return caption.splitlines() if isinstance(caption, str) else []


def to_sample(raw: RawSample, limits: DecodeLimits | None = None, *, lazy: bool = False) -> Sample:
    """Decode a raw sample: `png|jpg|webp|...`, `txt` (one caption a line), `json` (`captions`, `messages`, metadata).

    Members that end in `npy` come along as they are.

    Args:
        raw: the sample's bytes.
        limits: what an image may weigh; the defaults of `DecodeLimits` if None.
        lazy: read the image's header only; its pixels are decoded, and may turn out damaged, when they are asked for.
    Raises:
        UnreadableSample: no image, or a member that cannot be read; `reason` is one of a small set of phrases.
    """
    data = image_member(raw.members)
    if data is None:
        raise UnreadableSample("no image", f"members: {', '.join(sorted(raw.members)) or 'none'}")
    text, messages, meta = read_text(raw)
    image = LazyImage(data, limits or DecodeLimits())
    arrays = {name: payload for name, payload in raw.members.items() if name.endswith(NPY)}
    return Sample(raw.key, image if lazy else image.pixels, text, messages, meta, arrays)


def _read_json(raw: RawSample) -> dict[str, Any]:
    if "json" not in raw.members:
        return {}
    try:
        meta = json.loads(raw.members["json"])
    except (ValueError, RecursionError) as error:  # ValueError covers both broken JSON and broken UTF-8
        raise UnreadableSample("broken JSON", str(error)) from error
    if not isinstance(meta, dict):
        raise UnreadableSample("JSON is not an object", type(meta).__name__)
    return meta
