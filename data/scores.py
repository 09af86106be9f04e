"""Columns that a model computes: each pair's image and caption go through a callable that somebody else built.

`data` knows no model; the stage that owns one passes it in.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np
import polars as pl

from mmfoundry.data.decode import DecodeLimits, UnreadableSample, decode_image
from mmfoundry.data.reader import Pool
from mmfoundry.data.sample import image_member
from mmfoundry.data.table import first_samples

# images uint8 (height, width, 3), and the captions of each -> scores of each, one a caption
Scorer = Callable[[Sequence[np.ndarray], Sequence[Sequence[str]]], Sequence[np.ndarray]]


def score_table(
    pool: Pool, table: pl.DataFrame, column: str, scorer: Scorer, batch_size: int, limits: DecodeLimits
) -> pl.DataFrame:
    """Score pairs.

    Args:
        pool: where the images are.
        table: rows of the metadata table; those without caption or readable image are left out.
        column: name of the new column.
        scorer: see `Scorer`.
        batch_size: images handed to the scorer at once.
        limits: what an image may weigh.
    Returns:
        "shard", "index", "caption_index" and the column (Float32), one row a scored pair, in the order of the table.
    """
    rows = table.filter(pl.col("unreadable").is_null() & pl.col("caption").is_not_null())
    places: list[tuple[int, int, int]] = []
    values: list[np.ndarray] = []
    samples = _samples(pool, rows, limits)
    while batch := list(islice(samples, batch_size)):
        images, captions, of_samples = zip(*batch, strict=True)
        values += scorer(images, captions)
        places += [place for of_sample in of_samples for place in of_sample]
    schema = {name: pl.UInt32() for name in ("shard", "index", "caption_index")}
    scores = np.concatenate([np.empty(0, np.float32), *values]).astype(np.float32)
    return pl.DataFrame(places, schema=schema, orient="row").with_columns(pl.Series(column, scores))


def _samples(
    pool: Pool, rows: pl.DataFrame, limits: DecodeLimits
) -> Iterator[tuple[np.ndarray, list[str], list[tuple[int, int, int]]]]:
    """Image, captions and the captions' places, by sample."""
    starts = first_samples(pool)
    grouped = rows.group_by("shard", "index", maintain_order=True).agg("caption", "caption_index")
    for shard, index, captions, numbers in grouped.iter_rows():
        try:
            data = image_member(pool.get(starts[shard] + index).members)
            if data is not None:
                yield decode_image(data, limits), captions, [(shard, index, number) for number in numbers]
        except UnreadableSample:  # no score, so no filter on it keeps the pair; the table counts what does not decode
            continue
