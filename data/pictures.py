"""The clean pictures that scenes are made of, with their alpha channel, read from `pictures-*.tar` shards."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from PIL import Image

from mmfoundry.data.concepts import Concept
from mmfoundry.data.decode import DecodeLimits, UnreadableImage, image_size
from mmfoundry.data.index import ShardSpec
from mmfoundry.data.reader import Pool
from mmfoundry.data.sample import image_member
from mmfoundry.pipeline.errors import ConfigError, DamagedInput

LIMITS = DecodeLimits(max_bytes=4 << 20, max_pixels=1 << 20)
# Which concepts a set of scenes shows: one side of the split, one of the two small groups, or all.
Group = Literal["train", "heldout", "question", "adapt", "all"]


@dataclass(frozen=True)
class Picture:
    """One thing in one style.

    Attributes:
        concept: what it shows.
        style: "noto", "twemoji", or whatever the shards say.
        image: RGBA, alpha not premultiplied.
    """

    concept: Concept
    style: str
    image: Image.Image = field(repr=False)

    @cached_property
    def visible(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom (the last two exclusive) of what is not transparent, in the picture's pixels."""
        box = self.image.getchannel("A").point(lambda alpha: 255 if alpha >= 64 else 0).getbbox()
        return box or (0, 0, *self.image.size)


def load_pictures(shards: ShardSpec) -> list[Picture]:
    """Every picture of the shards, in their order.

    Raises:
        MissingInput: no shards.
        DamagedInput: a sample is not one that `mmfoundry.data.sample_pool` writes, or cannot be read.
    """
    pool = Pool(shards)
    pictures = []
    for number in range(len(pool)):
        key = f"{pool.locate(number)[0].shard}: {pool.key(number)}"
        try:
            members = pool.get(number).members
            meta = json.loads(members.get("json", b"{}"))
            pictures.append(Picture(Concept.from_json(meta), str(meta.get("style")), _rgba(image_member(members))))
        except (DamagedInput, ValueError) as error:
            raise DamagedInput(f"{key}: {error}") from error
    return pictures


def _rgba(data: bytes | None) -> Image.Image:
    if data is None:
        raise UnreadableImage("no image")
    height, width = image_size(data)
    if len(data) > LIMITS.max_bytes or height * width > LIMITS.max_pixels:
        raise UnreadableImage("too large for a part of a scene", f"{width} x {height} pixels, {len(data)} bytes")
    try:
        return Image.open(io.BytesIO(data)).convert("RGBA")
    except (OSError, SyntaxError) as error:
        raise UnreadableImage("damaged image", str(error)) from error


def select_concepts(pictures: Sequence[Picture], group: Group | Sequence[str]) -> list[Concept]:
    """The concepts of a group, or those named, each once, in the order of the pictures.

    Raises:
        ConfigError: a name that no picture shows, or a group without any.
    """
    concepts = list({picture.concept.name: picture.concept for picture in pictures}.values())
    if isinstance(group, str):
        chosen = [concept for concept in concepts if in_group(concept, group)]
    else:
        unknown = sorted(set(group) - {concept.name for concept in concepts})
        if unknown:
            raise ConfigError(f"concepts: no picture shows {', '.join(map(repr, unknown))}")
        chosen = [concept for concept in concepts if concept.name in set(group)]
    if not chosen:
        raise ConfigError(f"concepts: no picture belongs to {group!r}")
    return chosen


def in_group(concept: Concept, group: str) -> bool:
    """Whether a concept belongs to a `Group`."""
    return {
        "train": concept.split == "train",
        "heldout": concept.split == "heldout",
        "question": concept.question,
        "adapt": concept.adapt,
        "all": True,
    }[group]
