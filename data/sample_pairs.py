"""A small pool of image-text pairs as a crawl would give them: most are good, and some are bad in ways that are known.

Each pair's JSON has `uid` and `captions`, and `truth`, which says what is wrong with it. Only reports and tests may
read `truth`; everything that decides about pairs sees the rest.
"""

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from PIL import Image

from mmfoundry.data.captions import OTHER_LANGUAGES, good_captions, other_language_captions, short_captions
from mmfoundry.data.concepts import Concept

PAIRS_PER_CONCEPT = 2  # good ones
# How many pairs are bad in which way; about 28% of the pool with 306 concepts.
BAD = {
    "language": 40,  # captions in another language
    "short_caption": 35,  # one or two words
    "shuffled_caption": 35,  # captions of a thing of another kind
    "exact_duplicate": 30,  # the image bytes of a good pair
    "near_duplicate": 30,  # a good pair's image in another format, a few pixels larger or smaller, or brighter
    "too_small": 20,  # 10 to 20 pixels
    "extreme_aspect": 20,  # a strip more than 5 times as long as it is wide
    "blank": 15,  # one colour
    "truncated": 15,  # the file ends in the middle of the pixels
}
# word and RGB; light enough for dark things and dark enough for white ones
BACKGROUNDS = (
    ("white", (250, 250, 250)),
    ("grey", (196, 198, 202)),
    ("blue", (158, 196, 240)),
    ("green", (170, 222, 166)),
    ("yellow", (250, 234, 150)),
    ("pink", (248, 190, 208)),
    ("purple", (206, 184, 236)),
    ("orange", (250, 204, 150)),
    ("brown", (200, 172, 146)),
    ("black", (38, 38, 42)),
)
ImageFormat = Literal["png", "jpg", "webp"]


@dataclass(kw_only=True)
class Pair:
    """One image with its captions, before it gets a key.

    Attributes:
        concept: name of what the picture shows.
        image: encoded.
        extension: "png", "jpg" or "webp".
        captions: as a crawl would give them, good or bad.
        bad: None, or a key of `BAD`.
        of: for a duplicate, the `uid` of the pair that it repeats.
    """

    concept: str
    image: bytes
    extension: ImageFormat
    captions: list[str]
    uid: str
    bad: str | None = None
    of: str | None = None
    pixels: np.ndarray = field(repr=False, default_factory=lambda: np.zeros((0, 0, 3), np.uint8))


def noisy_pairs(concepts: Sequence[Concept], pictures: Mapping[str, np.ndarray], seed: int) -> list[dict[str, Any]]:
    """The pool as samples for `write_shards`, shuffled; a duplicate always comes after what it repeats.

    Args:
        concepts: what the pool may show; training concepts only.
        pictures: by concept name, uint8 (height, width, 4), alpha not premultiplied.
        seed: the pool is a function of the arguments.
    Returns:
        Samples with an image (`png`, `jpg` or `webp`), `txt` (the first caption) and `json`.
    """
    good = [
        _good_pair(concept, pictures[concept.name], variant, np.random.default_rng([seed, 0, number, variant]))
        for number, concept in enumerate(concepts)
        for variant in range(PAIRS_PER_CONCEPT)
    ]
    bad = _bad_pairs(concepts, pictures, good, seed)
    order = np.random.default_rng([seed, 2]).permutation(len(good) + len(bad))
    pairs = _originals_first([(good + bad)[i] for i in order])
    return [_sample(number, pair) for number, pair in enumerate(pairs)]


def _sample(number: int, pair: Pair) -> dict[str, Any]:
    truth = {"bad": pair.bad, "concept": pair.concept} | ({"of": pair.of} if pair.of else {})
    return {
        "__key__": f"{number:06d}",
        pair.extension: pair.image,
        "txt": pair.captions[0],
        "json": {"uid": pair.uid, "captions": pair.captions, "truth": truth},
    }


def _originals_first(pairs: list[Pair]) -> list[Pair]:
    """Swap each duplicate that comes before its original with it: who keeps the first of two keeps the good one."""
    pairs = list(pairs)
    for _ in range(len(pairs)):  # an original may have several duplicates, so one pass is not enough
        place = {pair.uid: i for i, pair in enumerate(pairs)}
        early = [(i, place[pair.of]) for i, pair in enumerate(pairs) if pair.of and place[pair.of] > i]
        if not early:
            return pairs
        i, j = early[0]
        pairs[i], pairs[j] = pairs[j], pairs[i]
    raise AssertionError("duplicates of duplicates")


def _uid(*parts: object) -> str:
    return hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=16).hexdigest()


def _good_pair(concept: Concept, picture: np.ndarray, variant: int, rng: np.random.Generator) -> Pair:
    """One thing on a plain or shaded background; the two variants of a concept differ in layout and colour."""
    word, colour = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    if variant == 0:
        height, width = rng.integers(72, 97, 2)
        size, spread = rng.uniform(0.72, 0.95), 0.3
    else:
        height, width = rng.integers(80, 113, 2)
        size, spread = rng.uniform(0.5, 0.7), 1.0
    canvas = _background(int(height), int(width), colour, rng)
    where = _paste(canvas, picture, size, spread, rng)
    extension: ImageFormat = ("png", "jpg", "webp")[int(rng.choice(3, p=[0.4, 0.4, 0.2]))]
    return Pair(
        concept=concept.name,
        image=encode(canvas, extension),
        extension=extension,
        captions=good_captions(concept, rng, colour=word, where=where),
        uid=_uid("good", concept.name, variant),
        pixels=canvas,
    )


def _background(height: int, width: int, colour: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    """uint8 (height, width, 3): the colour, a little off, in half of the cases fading from top to bottom."""
    base = np.clip(np.array(colour) + rng.integers(-8, 9, 3), 0, 255).astype(np.float64)
    fade = rng.uniform(-40, 40) if rng.random() < 0.5 else 0.0
    rows = base + fade * np.linspace(-0.5, 0.5, height)[:, None]
    return np.broadcast_to(np.clip(rows, 0, 255).round().astype(np.uint8)[:, None], (height, width, 3)).copy()


def _paste(canvas: np.ndarray, picture: np.ndarray, size: float, spread: float, rng: np.random.Generator) -> str:
    """Lay a picture over the canvas, in place; returns a word for where its centre is.

    Args:
        canvas: uint8 (height, width, 3).
        picture: uint8 (h, w, 4), square.
        size: side of the picture as a fraction of the canvas's shorter side.
        spread: 0 keeps it in the middle, 1 lets it go to the edges.
        rng: draws the place.
    """
    height, width = canvas.shape[:2]
    side = max(1, round(size * min(height, width)))
    scaled = np.array(Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS)).astype(np.int32)
    across, down = rng.uniform(-spread, spread, 2)
    left = round((width - side) * (1 + across) / 2)
    top = round((height - side) * (1 + down) / 2)
    alpha = scaled[..., 3:]
    under = canvas[top : top + side, left : left + side].astype(np.int32)
    canvas[top : top + side, left : left + side] = (scaled[..., :3] * alpha + under * (255 - alpha) + 127) // 255
    x, y = (left + side / 2) / width - 0.5, (top + side / 2) / height - 0.5
    if max(abs(x), abs(y)) < 0.08:
        return "middle"
    return ("right" if x > 0 else "left") if abs(x) >= abs(y) else ("bottom" if y > 0 else "top")


def encode(pixels: np.ndarray, extension: ImageFormat, quality: int = 88) -> bytes:
    """Image bytes of uint8 (height, width, 3); `quality` (0-100) does not count for PNG."""
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    if extension == "png":
        image.save(buffer, "PNG", optimize=True)
    elif extension == "jpg":
        image.save(buffer, "JPEG", quality=quality, optimize=True)
    else:
        image.save(buffer, "WEBP", quality=quality, method=6)
    return buffer.getvalue()


def _bad_pairs(
    concepts: Sequence[Concept], pictures: Mapping[str, np.ndarray], good: Sequence[Pair], seed: int
) -> list[Pair]:
    """The pairs that `BAD` counts; each starts from a fresh good pair and is spoilt in one way."""
    by_name = {concept.name: concept for concept in concepts}
    pairs = []
    for kind_number, (bad, count) in enumerate(BAD.items()):
        # without replacement: no picture is repeated within a kind, so no bad pair is a duplicate by accident
        chosen = np.random.default_rng([seed, 1, kind_number]).permutation(len(concepts))
        for i in range(min(count, len(concepts))):
            rng = np.random.default_rng([seed, 1, kind_number, i])
            if bad == "language":
                language, word = _translated(i)
                concept = by_name.get(word)
                if concept is None:
                    continue
                pair = _fresh(concept, pictures, rng)
                pair.captions = other_language_captions(word, language)
            elif bad in ("exact_duplicate", "near_duplicate"):
                pair = _duplicate(good[int(chosen[i]) * PAIRS_PER_CONCEPT + i % 2], bad, by_name, rng)
            else:
                pair = _fresh(concepts[chosen[i]], pictures, rng)
                _SPOILERS[bad](pair, concepts, pictures, rng)
            pair.bad, pair.uid = bad, _uid(bad, pair.concept, i)
            pairs.append(pair)
    return pairs


def _translated(number: int) -> tuple[str, str]:
    """The language and concept of the n-th pair in another language: languages in turn, each concept once."""
    languages = list(OTHER_LANGUAGES)
    language = languages[number % len(languages)]
    words = list(OTHER_LANGUAGES[language][1])
    return language, words[number // len(languages) % len(words)]


def _fresh(concept: Concept, pictures: Mapping[str, np.ndarray], rng: np.random.Generator) -> Pair:
    return _good_pair(concept, pictures[concept.name], int(rng.integers(PAIRS_PER_CONCEPT)), rng)


def _duplicate(original: Pair, bad: str, by_name: Mapping[str, Concept], rng: np.random.Generator) -> Pair:
    """The same picture again with captions of its own: the same bytes, or other bytes that look the same."""
    image, extension, pixels = original.image, original.extension, original.pixels
    if bad == "near_duplicate":
        way = int(rng.integers(3))
        if way == 0:
            extension = "png" if original.extension != "png" else "jpg"
        elif way == 1:
            height, width = pixels.shape[:2]
            change = int(rng.choice([-2, -1, 1, 2]))
            resized = Image.fromarray(pixels).resize((width + change, height + change), Image.Resampling.BICUBIC)
            pixels = np.array(resized)
        else:
            pixels = np.clip(pixels.astype(np.int32) + int(rng.integers(3, 9)), 0, 255).astype(np.uint8)
        image = encode(pixels, extension, quality=80)
    captions = good_captions(by_name[original.concept], rng, colour="plain", where="middle")
    return Pair(concept=original.concept, image=image, extension=extension, captions=captions, uid="", of=original.uid)


Spoiler = Callable[[Pair, Sequence[Concept], Mapping[str, np.ndarray], np.random.Generator], None]


def _short(
    pair: Pair, concepts: Sequence[Concept], pictures: Mapping[str, np.ndarray], rng: np.random.Generator
) -> None:
    pair.captions = short_captions(next(c for c in concepts if c.name == pair.concept), rng)


def _shuffled(
    pair: Pair, concepts: Sequence[Concept], pictures: Mapping[str, np.ndarray], rng: np.random.Generator
) -> None:
    kind = next(c for c in concepts if c.name == pair.concept).kind
    others = [c for c in concepts if c.kind != kind]
    colour = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))][0]
    pair.captions = good_captions(others[int(rng.integers(len(others)))], rng, colour=colour, where="middle")


def _too_small(
    pair: Pair, concepts: Sequence[Concept], pictures: Mapping[str, np.ndarray], rng: np.random.Generator
) -> None:
    side = int(rng.integers(10, 21))
    small = np.array(Image.fromarray(pair.pixels).resize((side, side), Image.Resampling.BICUBIC))
    pair.image = encode(small, pair.extension)


def _strip(
    pair: Pair, concepts: Sequence[Concept], pictures: Mapping[str, np.ndarray], rng: np.random.Generator
) -> None:
    short, long = int(rng.integers(34, 49)), int(rng.integers(240, 321))
    height, width = (short, long) if rng.random() < 0.5 else (long, short)
    canvas = _background(height, width, BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))][1], rng)
    _paste(canvas, pictures[pair.concept], 0.95, 1.0, rng)
    pair.image = encode(canvas, pair.extension)


def _blank(
    pair: Pair, concepts: Sequence[Concept], pictures: Mapping[str, np.ndarray], rng: np.random.Generator
) -> None:
    height, width = rng.integers(72, 113, 2)
    colour = rng.integers(0, 256, 3).astype(np.uint8)
    pair.image = encode(np.broadcast_to(colour, (height, width, 3)).copy(), pair.extension)


def _truncated(
    pair: Pair, concepts: Sequence[Concept], pictures: Mapping[str, np.ndarray], rng: np.random.Generator
) -> None:
    pair.image = pair.image[: int(len(pair.image) * rng.uniform(0.35, 0.7))]


_SPOILERS: dict[str, Spoiler] = {
    "short_caption": _short,
    "shuffled_caption": _shuffled,
    "too_small": _too_small,
    "extreme_aspect": _strip,
    "blank": _blank,
    "truncated": _truncated,
}
