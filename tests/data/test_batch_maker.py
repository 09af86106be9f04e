"""One batch made by several threads at once: what comes out is what one thread makes."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mmfoundry.data import Loader, Pool, Ragged, Sample, Source, UnreadableSample
from mmfoundry.data.batch_maker import BatchMaker
from mmfoundry.data.sampler import Order

Make = Callable[..., list[Path]]


class Picky:
    """Refuses some samples, breaks on others, and takes longer for the first places of a batch."""

    def __init__(self, refused: set[int] = frozenset(), broken: set[int] = frozenset()):
        self.refused, self.broken, self.threads = refused, broken, set[str]()

    def __call__(self, sample: Sample, rng: np.random.Generator) -> dict:
        self.threads.add(threading.current_thread().name)
        number = int(sample.key)
        time.sleep(0.002 * (number % 3))
        if number in self.refused:
            raise UnreadableSample("refused", sample.key)
        if number in self.broken:
            raise ZeroDivisionError(sample.key)
        ids = np.arange(number % 5, dtype=np.int32)
        return {"key": sample.key, "image": sample.image, "ids": Ragged.one(ids), "draw": int(rng.integers(2**60))}


def _maker(pool: Pool, encode: Picky, **options: object) -> BatchMaker:
    return BatchMaker([pool], Order([len(pool)], None, 3), encode, batch_size=16, **options)  # type: ignore[arg-type]


def _shared(maker: BatchMaker, start: int, threads: int = 4) -> object:
    begun = maker.begin(start)
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(threads):
            pool.submit(begun.work)
        return begun.made()


@pytest.mark.parametrize("refused", [set(), {1, 4, 5, 17}, set(range(0, 40, 2)), set(range(40))])
@pytest.mark.parametrize("max_unreadable", [0.002, 0.02, 1.0])
def test_threads_that_share_a_batch_make_what_one_makes(
    make_shards: Make, refused: set[int], max_unreadable: float
) -> None:
    maker = _maker(Pool(make_shards(40, per_shard=20)), Picky(refused), max_unreadable=max_unreadable)
    for start in (0, 16, 32):
        alone, shared = maker.make(start), _shared(maker, start)
        assert (shared.drawn, shared.skips) == (alone.drawn, alone.skips)
        assert (shared.batch is None) == (alone.batch is None)
        if alone.batch is not None:
            assert shared.batch["key"] == alone.batch["key"]
            for name in ("image", "draw"):
                np.testing.assert_array_equal(shared.batch[name], alone.batch[name])
            np.testing.assert_array_equal(shared.batch["ids"].values, alone.batch["ids"].values)
            np.testing.assert_array_equal(shared.batch["ids"].starts, alone.batch["ids"].starts)


def test_a_collate_gets_the_rows_in_order(make_shards: Make) -> None:
    def collate(rows: list) -> dict:
        return {"keys": [row["key"] for row in rows]}

    maker = _maker(Pool(make_shards(40)), Picky(), collate=collate)
    assert _shared(maker, 0).batch == maker.make(0).batch


def test_of_several_errors_the_first_place_counts(make_shards: Make) -> None:
    maker = _maker(Pool(make_shards(40)), Picky(broken=set(range(0, 40, 3))))
    with pytest.raises(ZeroDivisionError) as alone:
        maker.make(0)
    for _ in range(5):
        with pytest.raises(ZeroDivisionError) as shared:
            _shared(maker, 0)
        assert shared.value.args == alone.value.args


def test_who_waits_for_a_batch_works_on_it(make_shards: Make) -> None:
    encode = Picky()
    batches = iter(Loader([Source(make_shards(40))], batch_size=16, encode=encode, num_workers=1))
    for _ in range(3):
        next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert threading.current_thread().name in encode.threads
    assert len(encode.threads) == 2
