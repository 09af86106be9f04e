"""Batches that a thread sends ahead: in order, with what fails and an end; on CUDA, what arrives is what was sent."""

import threading
from collections.abc import Generator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch

from mmfoundry.data import Ragged
from mmfoundry.data.batch_maker import Made
from mmfoundry.data.device_batches import AHEAD, copied_ahead, map_tensors, on_device
from mmfoundry.data.gather import Batch


def made(number: int) -> Made:
    batch = {
        "image": np.full((2, 3), number, np.uint8),
        "ids": Ragged(np.arange(number), np.array([0, 1, number])),
        "key": ["a", "b"],
    }
    return Made(batch, 2, [])


class Source:
    """Numbers what it makes, fails at one number, and says whether it was closed."""

    def __init__(self, count: int, bad: int = -1) -> None:
        self.count, self.bad, self.given, self.closed = count, bad, 0, False

    def __call__(self) -> Generator[Made, None, None]:
        try:
            for number in range(1, self.count + 1):
                if number == self.bad:
                    raise ZeroDivisionError("a bug")
                self.given = number
                yield made(number)
        finally:
            self.closed = True


class HostCopies:
    """Copies on this machine, which have arrived when they are sent."""

    def send(self, batch: Batch) -> tuple[Batch, Any]:
        return map_tensors(batch, torch.clone), None

    def wait(self, batch: Batch, event: Any) -> Batch:
        return batch


def sent(source: Source) -> Generator[Made, None, None]:
    return copied_ahead(on_device(source()), HostCopies())  # type: ignore[arg-type]


def test_batches_come_in_order_and_end() -> None:
    source = Source(20)
    found = list(sent(source))
    assert [int(each.batch["image"][0, 0]) for each in found] == list(range(1, 21))
    assert found[4].batch["ids"][1].tolist() == [1, 2, 3, 4]
    assert found[4].batch["key"] == ["a", "b"]
    assert source.closed


def test_no_more_is_sent_than_is_wanted() -> None:
    source = Source(1000)
    with closing(sent(source)) as batches:
        next(batches)
        assert source.given <= 1 + AHEAD + 2  # one waits for room, one is being sent
    assert source.closed
    assert not [thread for thread in threading.enumerate() if thread.name == "loader-device"]


def test_what_fails_behind_the_thread_is_raised_here_in_its_turn() -> None:
    source = Source(20, bad=4)
    found = []
    with pytest.raises(ZeroDivisionError, match="a bug"):
        found.extend(sent(source))
    source = Source(20, bad=4)
    batches = sent(source)
    assert [int(next(batches).batch["image"][0, 0]) for _ in range(3)] == [1, 2, 3]
    with pytest.raises(ZeroDivisionError, match="a bug"):
        next(batches)
    assert source.closed


def test_on_the_cpu_tensors_are_the_memory_that_was_made() -> None:
    one = made(3)
    finished = []

    def finish(batch: Batch) -> Batch:
        finished.append(True)
        return batch | {"more": batch["image"].sum()}

    (found,) = on_device(iter_of(one), torch.device("cpu"), finish)
    one.batch["image"][...] = 9
    assert (found.batch["image"] == 9).all()
    assert int(found.batch["more"]) == 18
    assert finished == [True]


def iter_of(one: Made) -> Generator[Made, None, None]:
    yield one


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_what_arrives_is_what_was_sent() -> None:
    source = Source(200)
    with closing(on_device(source(), "cuda")) as batches:
        for number, each in enumerate(batches, start=1):
            assert each.batch["image"].is_cuda
            assert each.batch["ids"].values.is_cuda
            assert torch.equal(each.batch["image"].cpu(), torch.full((2, 3), number, dtype=torch.uint8))
            assert torch.equal(each.batch["ids"].values.cpu(), torch.arange(number))
