"""Curated shards: the samples that a selection keeps, with their own bytes, and the captions that it keeps."""

import json
from collections.abc import Collection, Iterator
from typing import Any

import polars as pl

from mmfoundry.data.reader import Pool
from mmfoundry.data.sample import RawSample, read_text
from mmfoundry.data.table import first_samples


def curated_samples(pool: Pool, kept: pl.DataFrame) -> Iterator[dict[str, Any]]:
    """The kept samples for `write_shards`, in the order of `kept`.

    A sample's key becomes its uid, which no other sample has, and its JSON gets the uid. All other members keep their
    bytes, unless captions were cut: then the JSON's `captions` and the lines of `txt` are those that are left.

    Args:
        pool: where the samples are.
        kept: "uid", "shard", "index" and "caption_index" of the kept pairs.
    """
    samples = kept.group_by("shard", "index", maintain_order=True).agg(pl.col("uid").first(), pl.col("caption_index"))
    starts = first_samples(pool)
    for shard, index, uid, captions in samples.iter_rows():
        raw = pool.get(starts[shard] + index)
        yield {"__key__": uid, **raw.members, **rewritten(raw, uid, captions)}


def rewritten(raw: RawSample, uid: str, kept: Collection[int | None] | None) -> dict[str, Any]:
    """The members that change: JSON with the uid, and captions where some were cut.

    Args:
        raw: the sample.
        uid: what its JSON is to say.
        kept: numbers of the captions that stay; None: all.
    Raises:
        UnreadableSample: its text cannot be read.
    """
    captions, _, _ = read_text(raw)
    meta = json.loads(raw.members.get("json", b"{}"))
    left = captions if kept is None else [caption for i, caption in enumerate(captions) if i in set(kept)]
    changed: dict[str, Any] = {}
    if len(left) < len(captions):
        if "captions" in meta:
            meta["captions"] = left
        if "txt" in raw.members:
            lines = [line.strip() for line in raw.members["txt"].decode("utf-8", "replace").splitlines()]
            changed["txt"] = "\n".join([line for line in lines if line in left] or left[:1])
        changed["json"] = meta
    if meta.get("uid") != uid:
        changed["json"] = meta | {"uid": uid}
    return changed
