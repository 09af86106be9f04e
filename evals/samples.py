"""Evaluation data: the samples of a pool that match a selection, their pictures read when they are needed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmfoundry.data.decode import UnreadableSample
from mmfoundry.data.reader import Pool
from mmfoundry.data.sample import Sample, read_text, to_sample
from mmfoundry.pipeline.errors import DamagedInput, MissingInput


@dataclass(frozen=True)
class Samples:
    """Chosen samples of a pool: their captions and metadata in memory, their pictures on disk.

    Attributes:
        pool: where they lie.
        positions: index of each in the pool.
        captions: of each.
        meta: the other metadata of each.
    """

    pool: Pool
    positions: list[int]
    captions: list[list[str]]
    meta: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.positions)

    def sample(self, row: int) -> Sample:
        """The row-th sample with its picture.

        Raises:
            DamagedInput: it cannot be read; a score over the rest would not be the benchmark's.
        """
        raw = self.pool.get(self.positions[row])
        try:
            return to_sample(raw)
        except UnreadableSample as error:
            raise DamagedInput(f"{raw.shard}: sample {raw.key}: {error}; an evaluation needs every sample") from error

    def picture(self, row: int) -> NDArray[np.uint8]:
        """The row-th picture, (H, W, 3) RGB."""
        return self.sample(row).image

    def key(self, row: int) -> str:
        """The row-th sample's key."""
        return self.pool.key(self.positions[row])

    def field(self, name: str) -> list[Any]:
        """One metadata field of every sample.

        Raises:
            DamagedInput: a sample lacks it.
        """
        for row, meta in enumerate(self.meta):
            if name not in meta:
                raise DamagedInput(f"sample {self.key(row)} has no {name!r} in its JSON; it has {', '.join(meta)}")
        return [meta[name] for meta in self.meta]


def select(pool: Pool, where: Mapping[str, Any], limit: int | None = None) -> Samples:
    """The samples of `pool` whose metadata has the wanted values, in the pool's order.

    Args:
        pool: where to look.
        where: field to value; a list of values means any of them.
        limit: stop after this many.

    Raises:
        DamagedInput: a shard is damaged, or a sample's metadata cannot be read.
        MissingInput: none matches.
    """
    for shard, damage in pool.damage:
        raise DamagedInput(f"{shard}: {damage}; an evaluation needs every sample")
    chosen = Samples(pool, [], [], [])
    for position, (captions, meta) in enumerate(_metadata(pool)):
        if len(chosen) == limit:
            break
        if all(_matches(meta.get(name), wanted) for name, wanted in where.items()):
            chosen.positions.append(position)
            chosen.captions.append(captions)
            chosen.meta.append(meta)
    if not chosen.positions:
        wanted = ", ".join(f"{name}={value}" for name, value in where.items()) or "anything"
        raise MissingInput(f"none of {len(pool)} samples matches {wanted}; see `mmfoundry data inspect`")
    return chosen


def _matches(value: Any, wanted: Any) -> bool:
    return value in wanted if isinstance(wanted, list) else value == wanted


def _metadata(pool: Pool) -> Iterator[tuple[list[str], dict[str, Any]]]:
    for position in range(len(pool)):
        raw = pool.get(position, ("txt", "json"))
        try:
            captions, messages, meta = read_text(raw)
        except UnreadableSample as error:
            raise DamagedInput(f"{raw.shard}: sample {raw.key}: {error}; an evaluation needs every sample") from error
        yield captions, meta if messages is None else meta | {"messages": messages}


def clusters_of(samples: Samples, field: str | None) -> list[Any] | None:
    """The labels by which `metrics.bootstrap` draws samples together; None: each on its own."""
    return None if field is None else samples.field(field)


def class_indices(labels: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """Class names in alphabetical order, and each label's index among them."""
    names = sorted(set(labels))
    index = {name: row for row, name in enumerate(names)}
    return names, np.array([index[label] for label in labels], dtype=np.int64)
