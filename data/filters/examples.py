"""A few pictures that each step of a filter tree kept and dropped, small, for people to look at."""

import io

import numpy as np
import polars as pl
from PIL import Image

from mmfoundry.data.decode import DecodeLimits, UnreadableSample, decode_image
from mmfoundry.data.filters.funnel import Judgement
from mmfoundry.data.reader import Pool
from mmfoundry.data.sample import image_member, read_text
from mmfoundry.data.table import first_samples

SIDE = 96  # pixels, longer side of a thumbnail
_SCHEMA = {
    "filter": pl.String(),
    "kept": pl.Boolean(),
    "uid": pl.String(),
    "key": pl.String(),
    "captions": pl.List(pl.String()),
    "unreadable": pl.String(),
    "png": pl.Binary(),
}


def examples_of(judgement: Judgement, pool: Pool, count: int, seed: int, limits: DecodeLimits) -> pl.DataFrame:
    """Draw examples.

    Args:
        judgement: what each step did.
        pool: where the pictures are.
        count: examples of each sort a step, at most.
        seed: of the draw.
        limits: what an image may weigh.
    Returns:
        "filter" (name of the step), "kept" (whether the sample passed it), "uid", "key", "captions" (all that the
        sample had), "unreadable" (null, or why there is no picture) and "png" (null without picture), by step.
    """
    order = {name: number for number, name in enumerate(judgement.names)}
    last = len(order)
    samples = judgement.samples.with_columns(
        step=pl.col("reason").replace_strict(order, default=last, return_dtype=pl.UInt32)
    )
    starts = first_samples(pool)
    rows = []
    for number, name in enumerate(judgement.names):
        for kept in (True, False):
            these = samples.filter(pl.col("step") > number if kept else pl.col("step") == number)
            rng = np.random.default_rng([seed, number, kept])
            chosen = np.sort(rng.permutation(these.height)[:count])
            for row in these[chosen].iter_rows(named=True):
                shown = _shown(pool, starts[row["shard"]] + row["index"], limits)
                rows.append({"filter": name, "kept": kept, "uid": row["uid"], "key": row["key"]} | shown)
    return pl.DataFrame(rows, schema=_SCHEMA, orient="row")


def _shown(pool: Pool, number: int, limits: DecodeLimits) -> dict[str, object]:
    """Captions and thumbnail of a sample, as far as it can be read."""
    captions: list[str] = []
    try:
        raw = pool.get(number)
        captions = read_text(raw)[0]
        data = image_member(raw.members)
        if data is None:
            raise UnreadableSample("no image")
        return {"captions": captions, "unreadable": None, "png": _thumbnail(decode_image(data, limits))}
    except UnreadableSample as error:
        return {"captions": captions, "unreadable": error.reason, "png": None}


def _thumbnail(pixels: np.ndarray) -> bytes:
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
