"""data/crew.py: what the workers of a merge share is whole, and is not made twice."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mmfoundry.data.crew import Crew, alone
from mmfoundry.data.executors import SerialExecutor
from mmfoundry.pipeline.errors import NotEnoughSpace

ASKED: list[int] = []


def table_of(job: int) -> pl.DataFrame:
    ASKED.append(job)
    if job < 0:
        raise KeyboardInterrupt
    return pl.DataFrame({"number": [job]})


def test_an_array_is_filled_once_and_again_where_it_was_altered(tmp_path: Path) -> None:
    crew = Crew(tmp_path / "merge", SerialExecutor())
    filled = 0

    def fill(made: np.ndarray) -> None:
        nonlocal filled
        filled += 1
        made[:] = np.arange(6).reshape(2, 3)

    for _ in range(2):
        path = crew.array("codes", (2, 3), np.uint64, fill)
    assert filled == 1
    found = np.load(path, mmap_mode="r")
    assert (found.dtype, found.tolist()) == (np.dtype(np.uint64), [[0, 1, 2], [3, 4, 5]])
    path.write_bytes(path.read_bytes()[:-1])
    crew.array("codes", (2, 3), np.uint64, fill)
    assert filled == 2
    assert np.load(path)[1, 2] == 5


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "no space left")])
def test_an_array_that_was_cut_off_is_not_there(tmp_path: Path, error: BaseException) -> None:
    crew = Crew(tmp_path, SerialExecutor())

    def fill(made: np.ndarray) -> None:
        raise error

    with pytest.raises(NotEnoughSpace if isinstance(error, OSError) else KeyboardInterrupt):
        crew.array("codes", (2,), np.uint8, fill)
    assert not list(tmp_path.iterdir())


def test_tables_are_those_of_the_jobs_and_are_not_made_again(tmp_path: Path) -> None:
    crew = Crew(tmp_path, SerialExecutor())
    ASKED.clear()
    with pytest.raises(KeyboardInterrupt):
        crew.tables(table_of, {"a": 3, "b": -1, "c": 5})
    found = crew.tables(table_of, {"a": 3, "b": 4, "c": 5})
    assert [table["number"].item() for table in found] == [3, 4, 5]
    assert ASKED == [3, -1, 4, 5]


def test_alone_leaves_nothing() -> None:
    with alone() as crew:
        assert crew.array("rows", (1,), np.uint8, lambda made: made.fill(1)).exists()
    assert not crew.folder.exists()
