"""Duplicates: the same bytes, or pictures that look the same. Of each group the sample with the smallest uid stays.

uids are hashes, so "smallest" is an arbitrary choice, but the same one whatever the order of the shards.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import polars as pl
from pydantic import Field

from mmfoundry.data.filters.base import FILTERS, Filter


@FILTERS.register("exact_duplicate")
class ExactDuplicate(Filter):
    """Of samples whose images have the same bytes, the one with the smallest uid stays."""

    @property
    def scope(self) -> Literal["row", "pool"]:
        """Samples are compared with each other."""
        return "pool"

    def columns(self) -> frozenset[str]:
        """SHA-256 of the image's bytes."""
        return frozenset({"sha256"})

    def keep(self, table: pl.DataFrame) -> pl.Series:
        """True for the first of each group; null where there are no bytes."""
        first = pl.col("uid") == pl.col("uid").min().over("sha256")
        return table.select(keep=pl.when(pl.col("sha256").is_not_null()).then(first)).to_series()


@FILTERS.register("unique_uid")
class UniqueUid(Filter):
    """Of samples with one uid, the first in the pool stays: a uid names one sample."""

    @property
    def scope(self) -> Literal["row", "pool"]:
        """Samples are compared with each other."""
        return "pool"

    def columns(self) -> frozenset[str]:
        """Place in the pool."""
        return frozenset({"shard", "index"})

    def keep(self, table: pl.DataFrame) -> pl.Series:
        """True for the rows of the first sample of each uid."""
        place = pl.col("shard").cast(pl.UInt64) * 2**32 + pl.col("index")
        return table.select(keep=place == place.min().over("uid")).to_series()


@FILTERS.register("near_duplicate")
class NearDuplicate(Filter):
    """Of samples whose pictures look the same (perceptual hashes differ in few bits), the smallest uid stays.

    Samples are taken in the order of their uid; one is dropped if an earlier sample that stays is within `radius`. So
    a chain of pictures that change step by step is thinned, not reduced to its first.
    """

    radius: int = Field(
        28, ge=0, le=200, description="bits of 512 in which two hashes may differ and be called the same"
    )

    @property
    def scope(self) -> Literal["row", "pool"]:
        """Samples are compared with each other."""
        return "pool"

    def columns(self) -> frozenset[str]:
        """The perceptual hash."""
        return frozenset({"perceptual_hash"})

    def keep(self, table: pl.DataFrame) -> pl.Series:
        """True for samples that stay; null where there is no hash."""
        samples = table.select("uid", "perceptual_hash").drop_nulls().unique("uid", keep="any").sort("uid")
        stays = leaders(_as_array(samples["perceptual_hash"]), self.radius)
        kept = samples["uid"].filter(pl.Series(stays))
        is_kept = pl.col("uid").is_in(kept.implode())
        return table.select(keep=pl.when(pl.col("perceptual_hash").is_not_null()).then(is_kept)).to_series()


def leaders(hashes: np.ndarray, radius: int) -> np.ndarray:
    """Which rows stay when each is dropped that is near an earlier one that stays.

    Args:
        hashes: uint8 (n, bytes), in order of precedence.
        radius: bits; at most this distance is near.
    Returns:
        bool (n,).
    """
    stays = np.zeros(len(hashes), bool)
    if len(hashes):
        # later rows of an equal hash are near their first one, or near what that one is near: they never stay
        first = np.sort(np.unique(hashes, axis=0, return_index=True)[1])
        stays[first] = _greedy(hashes[first], radius)
    return stays


def _greedy(hashes: np.ndarray, radius: int) -> np.ndarray:
    near: dict[int, list[int]] = {}
    for later, earlier in near_pairs(hashes, radius):
        near.setdefault(int(later), []).append(int(earlier))
    stays = np.ones(len(hashes), bool)
    for later in sorted(near):
        stays[later] = not stays[near[later]].any()
    return stays


def near_pairs(hashes: np.ndarray, radius: int) -> np.ndarray:
    """All pairs of rows within `radius` bits of each other.

    The bits are dealt out to radius + 1 bands; two hashes within the radius agree in at least one band (pigeonhole), so
    only rows that share a band are compared.

    Args:
        hashes: uint8 (n, bytes).
        radius: bits, less than a hash has.
    Returns:
        int64 (pairs, 2), later row before earlier row, sorted, without repeats.
    """
    bits = np.unpackbits(hashes, axis=1)
    words = _as_words(hashes)
    found = [np.empty((0, 2), np.int64)]
    for band in range(radius + 1):
        for rows, others in _sharing(np.packbits(bits[:, band :: radius + 1], axis=1)):
            near = np.bitwise_count(words[rows] ^ words[others]).sum(axis=1) <= radius
            found.append(np.stack([others[near], rows[near]], axis=1))
    return np.unique(np.concatenate(found), axis=0)


def _sharing(band: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of rows of equal content, in arrays of at most n: row and later row."""
    _, group = np.unique(band, axis=0, return_inverse=True)
    order = np.argsort(group.reshape(-1), kind="stable")
    group = group.reshape(-1)[order]
    start, ahead = np.arange(len(order)), 1
    while True:  # each turn pairs a row with the one `ahead` places on in its group; groups that end drop out
        start = start[start + ahead < len(order)]
        start = start[group[start] == group[start + ahead]]
        if not len(start):
            return
        yield order[start], order[start + ahead]
        ahead += 1


def _as_words(hashes: np.ndarray) -> np.ndarray:
    """uint8 (n, bytes) -> uint64 (n, words), padded with zeros."""
    padded = np.pad(hashes, ((0, 0), (0, -hashes.shape[1] % 8)))
    return np.ascontiguousarray(padded).view(np.uint64)


def _as_array(hashes: pl.Series) -> np.ndarray:
    """Binary series of one length -> uint8 (n, bytes)."""
    values = hashes.to_list()
    return np.frombuffer(b"".join(values), np.uint8).reshape(len(values), -1 if values else 1)
