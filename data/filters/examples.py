"""A few pictures that each step of a filter tree kept and dropped, small, for people to look at.

They are drawn by a hash of the uid, the smallest first: so the draws of parts can be put together, and do not depend on
how the pool is cut.
"""

import io

import numpy as np
import polars as pl
from PIL import Image

from mmfoundry.data.columns import as_utf8
from mmfoundry.data.decode import DecodeLimits, UnreadableSample, decode_image
from mmfoundry.data.filters.account import Judgement
from mmfoundry.data.filters.sample import draws_of
from mmfoundry.data.reader import Pool
from mmfoundry.data.sample import image_member, read_text
from mmfoundry.data.table import first_samples
from mmfoundry.data.uids import mixed

SIDE = 96  # pixels, longer side of a thumbnail
_CANDIDATES = {
    "step": pl.Int32(),
    "kept": pl.Boolean(),
    "draw": pl.UInt64(),
    "uid": pl.String(),
    "key": pl.String(),
    "shard": pl.UInt32(),
    "index": pl.UInt32(),
}
_SCHEMA = {
    "filter": pl.String(),
    "kept": pl.Boolean(),
    "uid": pl.String(),
    "key": pl.String(),
    "captions": pl.List(pl.String()),
    "unreadable": pl.String(),
    "png": pl.Binary(),
}


def candidates_of(judgement: Judgement, count: int, seed: int) -> pl.DataFrame:
    """Of one part, the samples that may be shown: for each step the `count` first of those kept, and of those dropped.

    Returns:
        "step" (its number), "kept" (whether the sample passed it), "draw" (the smallest first), "uid", "key", "shard"
        and "index".
    """
    steps = len(judgement.names)
    found = [pl.DataFrame(schema=_CANDIDATES)]
    if count:
        samples = judgement.samples.with_columns(step=pl.col("step").fill_null(steps))
        for number in range(steps):
            for kept in (True, False):
                these = samples.filter(pl.col("step") > number if kept else pl.col("step") == number)
                draws = mixed(draws_of(these["uid"], seed), number)  # other ones for each step
                first = np.argsort(draws, kind="stable")[:count]
                rows = (
                    these[first]
                    .select("uid", "key", "shard", "index")
                    .with_columns(
                        step=pl.lit(number, pl.Int32), kept=pl.lit(kept), draw=pl.Series(draws[first], dtype=pl.UInt64)
                    )
                )
                found.append(rows.select(list(_CANDIDATES)))
    return pl.concat(found)


def examples_of(
    candidates: pl.DataFrame, names: list[str], pool: Pool, count: int, limits: DecodeLimits
) -> pl.DataFrame:
    """Read the pictures that are shown.

    Args:
        candidates: of all parts.
        names: of the steps.
        pool: where the pictures are.
        count: examples of each sort a step, at most.
        limits: what an image may weigh.
    Returns:
        "filter" (name of the step), "kept" (whether the sample passed it), "uid", "key", "captions" (all that the
        sample had), "unreadable" (null, or why there is no picture) and "png" (null without picture), by step.
    """
    starts = first_samples(pool)
    rows = []
    for number, name in enumerate(names):
        for kept in (True, False):
            these = candidates.filter((pl.col("step") == number) & (pl.col("kept") == kept))
            for row in (
                these.sort("draw", "uid", "shard", "index").head(count).sort("shard", "index").iter_rows(named=True)
            ):
                shown = _shown(pool, starts[row["shard"]] + row["index"], limits)
                rows.append({"filter": name, "kept": kept, "uid": row["uid"], "key": row["key"]} | shown)
    return pl.DataFrame(rows, schema=_SCHEMA, orient="row")


def _shown(pool: Pool, number: int, limits: DecodeLimits) -> dict[str, object]:
    """Captions and thumbnail of a sample, as far as it can be read."""
    captions: list[str] = []
    try:
        raw = pool.get(number)
        captions = [as_utf8(caption) for caption in read_text(raw)[0]]
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
