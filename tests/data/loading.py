"""Encodes that worker processes can import; nothing here imports torch, as none of it would for real."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from mmfoundry.data.decode import UnreadableSample
from mmfoundry.data.loader import Loader, Source
from mmfoundry.data.pairs import PairEncoder
from mmfoundry.data.ragged import Ragged
from mmfoundry.data.sample import Sample


def encode(sample: Sample, rng: np.random.Generator) -> dict[str, Any]:
    """A field of every kind that a batch can have."""
    draw = int(rng.integers(2**60))
    return {
        "key": sample.key,
        "image": sample.image[:4, :4],
        "draw": draw,
        "share": draw / 2**60,
        "text": Ragged.one(np.arange(draw % 7, dtype=np.int32)),
        "words": sample.text[0],
        "meta": {"of": [sample.key, None]},
    }


def picky(sample: Sample, rng: np.random.Generator) -> dict[str, Any]:
    if sample.key.endswith("7"):
        raise UnreadableSample("ends in 7")
    return encode(sample, rng)


def broken(sample: Sample, rng: np.random.Generator) -> dict[str, Any]:
    if sample.key.endswith("8"):
        raise ZeroDivisionError("a bug")
    return encode(sample, rng)


def opaque(sample: Sample, rng: np.random.Generator) -> dict[str, Any]:
    return {"what": [object()]}


def keys_alone(rows: list[Any]) -> dict[str, Any]:
    """A collate of one's own."""
    return {"key": [row["key"] for row in rows], "sum": np.array([row["image"].sum() for row in rows])}


class KillsItself:
    """Ends its own process with a signal when it meets a sample: once, or as often as it meets it."""

    def __init__(self, key: str, once: Path | None = None):
        self.key, self.once = key, once

    def __call__(self, sample: Sample, rng: np.random.Generator) -> dict[str, Any]:
        if sample.key == self.key and not (self.once is not None and self.once.exists()):
            if self.once is not None:
                self.once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(sample, rng)


class Slow:
    """Takes its time and leaves the number of its process in a folder."""

    def __init__(self, folder: Path, seconds: float):
        self.folder, self.seconds = folder, seconds

    def __call__(self, sample: Sample, rng: np.random.Generator) -> dict[str, Any]:
        (self.folder / str(os.getpid())).touch()
        time.sleep(self.seconds)
        return encode(sample, rng)


def loaded_modules(sample: Sample, rng: np.random.Generator) -> dict[str, Any]:
    """Which heavy modules the process that reads has imported by now."""
    return {"heavy": [name for name in ("torch", "open_clip", "transformers") if name in sys.modules]}


class AfterPairs:
    """What `loaded_modules` says once a `PairEncoder` has done its work."""

    def __init__(self) -> None:
        self.pairs = PairEncoder(8)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> dict[str, Any]:
        self.pairs(sample, rng)
        return loaded_modules(sample, rng)


def rank_until_killed(arguments: list[str]) -> None:
    """One rank that writes, after each step, its position and keys; started as a program, and killed by the test."""
    shards, log, rank, world, workers, state = arguments
    loader = Loader(
        [Source(shards)],
        batch_size=4 * int(world),
        encode=encode,
        rank=int(rank),
        world_size=int(world),
        num_workers=int(workers),
        workers="process",
    )
    if state:
        loader.load_state_dict(json.loads(state))
    for batch in loader:
        line = {"state": loader.state_dict(), "keys": batch["key"], "draws": batch["draw"].tolist()}
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    rank_until_killed(sys.argv[1:])
