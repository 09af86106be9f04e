"""Columns that models and detectors compute of a shard: every picture is decoded once, whoever looks at it.

`data` knows no model: encoders, heads and detectors are callables that somebody else built and passes in.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, Protocol, TypeVar

import numpy as np
import polars as pl

from mmfoundry.data.decode import DecodeLimits, UnreadableSample, decode_image
from mmfoundry.data.detectors.base import Detect
from mmfoundry.data.reader import Pool
from mmfoundry.data.regions import NO_REGIONS, covered, to_boxes, without
from mmfoundry.data.sample import IMAGE_EXTENSIONS, image_member
from mmfoundry.data.transforms import without_ends

PLACE = ("shard", "index", "caption_index")
TEXT_AREA, FACES = "text_area", "face_bboxes"
_LOOKAHEAD = 4  # pictures a thread may be ahead
Item = TypeVar("Item")
Made = TypeVar("Made")


class Encoder(Protocol):
    """A CLIP as scoring sees it."""

    context_characters: int  # of a caption that are handed to it

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        """One picture, uint8 (height, width, 3), as `embed_images` wants it; called from several threads at once."""

    def embed_images(self, prepared: Sequence[np.ndarray]) -> np.ndarray:
        """Prepared pictures to float32 (n, D), L2-normalised."""

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Captions to float32 (n, D), L2-normalised."""


@dataclass(frozen=True)
class Head:
    """A small network on embeddings.

    Attributes:
        scorer: name of the encoder whose embeddings it reads.
        reads: those of pictures or of captions.
        apply: float32 (n, D) to float32 (n,).
    """

    scorer: str
    reads: Literal["image", "text"]
    apply: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Scoring:
    """What is computed of a shard.

    Attributes:
        columns: names of the columns; each follows from one of the parts below.
        encoders: by name; NAME makes `clip_NAME_similarity_score`, `NAME_img`, `NAME_txt`, and, together with `text`,
            `clip_NAME_masked_similarity_score`, the cosine with the picture without its text (T-MARS).
        batch_sizes: pictures or captions a forward pass, by encoder.
        heads: by the column that they make.
        text: finds text; makes `text_area`, the share of the picture that it covers.
        faces: finds faces; makes `face_bboxes`.
        threads: that decode and prepare pictures.
    """

    columns: frozenset[str]
    encoders: Mapping[str, Encoder] = field(default_factory=dict)
    batch_sizes: Mapping[str, int] = field(default_factory=dict)
    heads: Mapping[str, Head] = field(default_factory=dict)
    text: Detect | None = None
    faces: Detect | None = None
    threads: int = 1

    def images_of(self, name: str) -> bool:
        """Whether an encoder's embeddings of pictures are needed."""
        wanted = {f"{name}_img", similarity(name), similarity(name, masked=True)}
        return bool(wanted & self.columns) or self._heads_read(name, "image")

    def texts_of(self, name: str) -> bool:
        """Whether an encoder's embeddings of captions are needed."""
        wanted = {f"{name}_txt", similarity(name), similarity(name, masked=True)}
        return bool(wanted & self.columns) or self._heads_read(name, "text")

    def masked_of(self, name: str) -> bool:
        """Whether an encoder looks at pictures without their text as well."""
        return similarity(name, masked=True) in self.columns

    def finds_text(self) -> bool:
        """Whether text is looked for."""
        return TEXT_AREA in self.columns or any(self.masked_of(name) for name in self.encoders)

    def _heads_read(self, name: str, what: str) -> bool:
        heads = (head for column, head in self.heads.items() if column in self.columns)
        return any(head.scorer == name and head.reads == what for head in heads)


def similarity(name: str, masked: bool = False) -> str:
    """The column of the cosines that the encoder of this name makes."""
    return f"clip_{name}{'_masked' if masked else ''}_similarity_score"


def score_pairs(pool: Pool, table: pl.DataFrame, scoring: Scoring, limits: DecodeLimits) -> pl.DataFrame:
    """Score the pairs of one shard.

    Args:
        pool: the shard alone.
        table: "shard", "index", "caption_index", "caption" and "unreadable" of its pairs, as its metadata table has
            them; those with a reason in "unreadable" are left out.
        scoring: what to compute.
        limits: what an image may weigh.
    Returns:
        The place of each row of `table`, in its order, and the columns. Null is what could not be computed: the image
        does not decode, there is no caption, or a network gave no finite number.
    """
    pictures = table.filter(pl.col("unreadable").is_null())["index"].unique(maintain_order=True).to_list()
    images = _look(pool, pictures, scoring, limits)
    captions = table["caption"].to_list()
    readable = table["unreadable"].is_null().to_list()
    spoken = (text for text, fine in zip(captions, readable, strict=True) if fine and text is not None)
    texts = list(dict.fromkeys(spoken))
    number_of_text = {text: number for number, text in enumerate(texts)}
    number_of_picture = {index: number for number, index in enumerate(pictures)}
    seen = np.array([number_of_picture.get(index, -1) for index in table["index"]], np.int64)
    seen = np.where([number >= 0 and images.decoded[number] for number in seen], seen, -1)
    # a caption of a picture that does not decode gets no embedding either: the pair is not there
    said = np.array([-1 if text is None else number_of_text.get(text, -1) for text in captions], np.int64)
    said = np.where(seen >= 0, said, -1)
    made = dict(_columns(scoring, images, texts, seen, said))
    return table.select(PLACE).with_columns(**{name: made[name] for name in sorted(scoring.columns)})


@dataclass
class _Images:
    """What became known of the pictures, by their number.

    Attributes:
        decoded: bool (n,).
        plain, masked: by encoder: float32 (n, D), zeros where nothing is known; `masked` is of pictures without text.
        text_area, faces: by picture.
    """

    decoded: np.ndarray
    plain: dict[str, np.ndarray]
    masked: dict[str, np.ndarray]
    text_area: list[float | None]
    faces: list[list[list[float]] | None]


def _look(pool: Pool, pictures: Sequence[int], scoring: Scoring, limits: DecodeLimits) -> _Images:
    """Decode every picture once and hand it to all who want to see it, in batches."""
    names = [name for name in scoring.encoders if scoring.images_of(name)]
    found = _Images(np.zeros(len(pictures), bool), {}, {}, [None] * len(pictures), [None] * len(pictures))
    batches = {
        (name, masked): _Batches(scoring.encoders[name], scoring.batch_sizes.get(name, 64), len(pictures))
        for name in names
        for masked in ([False, True] if scoring.masked_of(name) else [False])
    }

    def open_picture(index: int) -> tuple[np.ndarray, dict[str, np.ndarray]] | None:
        try:
            data = image_member(pool.get(index, IMAGE_EXTENSIONS).members)
            if data is None:
                return None
            pixels = decode_image(data, limits)
        except UnreadableSample:  # the pair has no scores, so no filter on them keeps it; the table counts the reason
            return None
        cut = without_ends(pixels)
        return pixels, {name: scoring.encoders[name].prepare(cut) for name in names}

    if names or scoring.finds_text() or FACES in scoring.columns:
        for number, opened in enumerate(_ahead(open_picture, pictures, scoring.threads)):
            if opened is None:
                continue
            pixels, prepared = opened
            found.decoded[number] = True
            regions = scoring.text(pixels) if scoring.text is not None and scoring.finds_text() else NO_REGIONS
            found.text_area[number] = covered(regions, *pixels.shape[:2])
            if scoring.faces is not None and FACES in scoring.columns:
                found.faces[number] = to_boxes(scoring.faces(pixels))
            bare = without_ends(without(pixels, regions)) if len(regions) else None
            for (name, masked), batch in batches.items():
                if not masked:
                    batch.add(number, prepared[name])
                elif bare is not None:
                    batch.add(number, scoring.encoders[name].prepare(bare))
    else:
        found.decoded[:] = True  # captions only: nobody looks
    for (name, masked), batch in batches.items():
        (found.masked if masked else found.plain)[name] = batch.finish()
    for name, rows in found.masked.items():  # without text the picture is its own masked one
        numbers = batches[name, True].numbers
        found.masked[name] = found.plain[name].copy()
        if numbers:
            found.masked[name][numbers] = rows[numbers]
    return found


class _Batches:
    """Prepared pictures are collected until they fill a forward pass."""

    def __init__(self, encoder: Encoder, size: int, total: int):
        self._encoder, self._size, self._total = encoder, size, total
        self._waiting: list[np.ndarray] = []
        self._rows: list[np.ndarray] = []
        self.numbers: list[int] = []

    def add(self, number: int, prepared: np.ndarray) -> None:
        self.numbers.append(number)
        self._waiting.append(prepared)
        if len(self._waiting) == self._size:
            self._flush()

    def finish(self) -> np.ndarray:
        """Embeddings of all pictures by their number, zeros for those that never came."""
        self._flush()
        width = self._rows[0].shape[1] if self._rows else 0
        rows = np.zeros((self._total, width), np.float32)
        if self._rows:
            rows[self.numbers] = np.concatenate(self._rows)
        return rows

    def _flush(self) -> None:
        if self._waiting:
            self._rows.append(self._encoder.embed_images(self._waiting))
            self._waiting = []


def _columns(
    scoring: Scoring, images: _Images, texts: Sequence[str], seen: np.ndarray, said: np.ndarray
) -> Iterator[tuple[str, pl.Series]]:
    """Every column of the scoring, a row each; `seen` and `said` number each row's picture and caption, -1: none."""
    yield TEXT_AREA, _picked(images.text_area, seen, pl.Float32())
    yield FACES, _picked(images.faces, seen, pl.List(pl.List(pl.Float64())))
    embedded: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
    for name, encoder in scoring.encoders.items():
        if scoring.images_of(name):
            embedded[name, "image"] = images.plain[name], seen
            yield f"{name}_img", _vectors(images.plain[name], seen)
        if scoring.texts_of(name):
            rows = _embed_texts(encoder, texts, scoring.batch_sizes.get(name, 64))
            embedded[name, "text"] = rows, said
            yield f"{name}_txt", _vectors(rows, said)
            if scoring.images_of(name):
                yield similarity(name), _cosines(images.plain[name], seen, rows, said)
            if scoring.masked_of(name):
                yield similarity(name, masked=True), _cosines(images.masked[name], seen, rows, said)
    for column, head in scoring.heads.items():
        if column in scoring.columns:
            rows, places = embedded[head.scorer, head.reads]
            values = head.apply(rows) if len(rows) else np.zeros(0, np.float32)
            yield column, _numbers(values[places] if len(values) else np.zeros(len(places)), places >= 0)


def _embed_texts(encoder: Encoder, texts: Sequence[str], batch_size: int) -> np.ndarray:
    limit = encoder.context_characters
    # what cannot be UTF-8 (lone surrogates) no tokenizer takes; what is far behind the context no model reads
    clean = [text[:limit].encode("utf-8", "replace").decode("utf-8") for text in texts]
    parts = [encoder.embed_texts(clean[start : start + batch_size]) for start in range(0, len(clean), batch_size)]
    return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)


def _cosines(images: np.ndarray, seen: np.ndarray, texts: np.ndarray, said: np.ndarray) -> pl.Series:
    there = (seen >= 0) & (said >= 0)
    values = np.zeros(len(seen), np.float32)
    if there.any():
        values[there] = np.einsum("nd,nd->n", images[seen[there]], texts[said[there]])
    return _numbers(values, there)


def _numbers(values: np.ndarray, there: np.ndarray) -> pl.Series:
    """Float32, null where there is nothing or nothing finite."""
    series = pl.Series(values.astype(np.float32))
    mask = pl.Series(there & np.isfinite(values))
    return pl.select(pl.when(mask).then(series)).to_series()


def _vectors(rows: np.ndarray, places: np.ndarray) -> pl.Series:
    """A list of Float32 a row; null where there is nothing or something that is not finite."""
    dtype = pl.List(pl.Float32())
    if not rows.size or (places < 0).all():
        return pl.Series([None], dtype=dtype).new_from_index(0, len(places))
    there = (places >= 0) & np.isfinite(rows).all(axis=1)[places]
    vectors = pl.Series(np.ascontiguousarray(rows[places])).cast(dtype)
    return pl.select(pl.when(pl.Series(there)).then(vectors)).to_series()


def _picked(values: Sequence[object], places: np.ndarray, dtype: pl.DataType) -> pl.Series:
    return pl.Series([values[place] if place >= 0 else None for place in places], dtype=dtype)


def _ahead(function: Callable[[Item], Made], items: Iterable[Item], threads: int) -> Iterator[Made]:
    """`map` in order, with threads that work a few items ahead."""
    if threads <= 1:
        yield from map(function, items)
        return
    waiting: list[Future[Made]] = []
    source = iter(items)
    with ThreadPoolExecutor(threads) as workers:
        waiting += [workers.submit(function, item) for item in islice(source, threads * _LOOKAHEAD)]
        while waiting:
            done = waiting.pop(0)
            waiting += [workers.submit(function, item) for item in islice(source, 1)]
            yield done.result()
