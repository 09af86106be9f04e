"""A batch in shared memory comes out as it went in; its arrays are written once, in place."""

import gc
import os
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfoundry.data.gather import Gather, as_tensors, stack
from mmfoundry.data.ragged import Ragged
from mmfoundry.data.shared_batch import Slot, pack, unpack
from mmfoundry.pipeline.errors import ConfigError

TEXTS = st.text(st.characters(codec=None), max_size=12)  # with lone surrogates, as keys of odd tars have


def through(rows: list[dict], slot: Slot) -> dict:
    """The batch as the other process sees it: by a mapping of its own."""
    slot.clear()
    gather = Gather(len(rows), slot.empty)
    for row in rows:
        gather.add(row)
    layout = pack(gather.batch(), slot)
    return unpack(layout, Slot(os.dup(slot.descriptor)).view(slot.size))


@settings(max_examples=40, deadline=None)
@given(
    side=st.integers(0, 9),
    texts=st.lists(TEXTS, min_size=1, max_size=8),
    lengths=st.lists(st.integers(0, 3000), min_size=8, max_size=8),
)
def test_what_goes_in_comes_out(side: int, texts: list[str], lengths: list[int]) -> None:
    noise = np.random.default_rng(side)
    rows = [
        {
            "image": noise.integers(0, 256, (3, side, side), dtype=np.uint8),
            "number": number,
            "share": number / 3,
            "yes": bool(number % 2),
            "ids": Ragged.one(noise.integers(0, 9, (length, 2)).astype(np.int32)),
            "text": text,
            "meta": {"a": [1, None, {"b": text}]},
        }
        for number, (text, length) in enumerate(zip(texts, lengths, strict=False))
    ]
    slot = Slot()
    for _ in range(2):  # the second time in memory that has been used
        found, expected = as_tensors(through(rows, slot)), stack(rows)
        assert found.keys() == expected.keys()
        for name in ("image", "number", "share", "yes"):
            assert found[name].dtype == expected[name].dtype
            assert torch.equal(found[name], expected[name])
        assert torch.equal(found["ids"].values, expected["ids"].values)
        assert torch.equal(found["ids"].starts, expected["ids"].starts)
        assert found["text"] == texts
        assert found["meta"] == [row["meta"] for row in rows]


def test_arrays_lie_where_they_were_made_and_others_are_moved_there() -> None:
    slot = Slot()
    inside = slot.empty((3, 5), np.dtype("<i4"))
    inside[...] = 7
    size = slot.size
    outside = np.arange(12.0).reshape(3, 4).T  # not contiguous
    layout = pack({"inside": inside, "outside": outside, "tensor": torch.arange(3)}, slot)
    found = unpack(layout, slot.view(slot.size))
    found["inside"][0, 0] = 8
    assert inside[0, 0] == 8  # the same memory
    assert np.array_equal(found["outside"], outside)
    assert found["tensor"].tolist() == [0, 1, 2]
    assert slot.size == size


def test_memory_grows_and_what_was_handed_out_stays() -> None:
    slot = Slot()
    first = slot.empty((1000,), np.dtype("u1"))
    first[...] = 1
    second = slot.empty((5_000_000,), np.dtype("u1"))
    second[...] = 2
    first[0] = 9  # by the mapping from before it grew
    found = unpack(pack({"first": first, "second": second}, slot), slot.view(slot.size))
    assert found["first"][0] == 9
    assert found["first"][1:].all()
    assert (found["second"] == 2).all()


def test_memory_is_free_when_the_last_tensor_is_gone() -> None:
    slot = Slot()
    rows = [{"image": np.zeros((2, 2), np.uint8), "ids": Ragged.one(np.arange(3))}]
    data = slot.view(through(rows, slot) and slot.size)
    gone = []
    weakref.finalize(data, gone.append, True)
    gather = Gather(1, slot.empty)
    slot.clear()
    gather.add(rows[0])
    batch = as_tensors(unpack(pack(gather.batch(), slot), data))
    part = batch["ids"].values[1:]
    del batch, data
    gc.collect()
    assert not gone
    assert part.tolist() == [1, 2]
    del part
    assert gone


@pytest.mark.parametrize("value", [(1, 2), {1: "a"}, [object()], {"a": (1,)}, [np.float32(1)]])
def test_what_would_come_out_as_something_else_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="'odd' cannot leave a worker process"):
        pack({"odd": value}, Slot())
    with pytest.raises(ConfigError, match="array of objects"):
        pack({"odd": np.array([None])}, Slot())


def test_rows_that_do_not_fit_together_are_refused() -> None:
    first = {"image": np.zeros((2, 2), np.uint8), "ids": Ragged.one(np.arange(3))}
    cases = [
        ({"image": np.zeros((2, 3), np.uint8), "ids": first["ids"]}, "one shape and dtype"),
        ({"image": np.zeros((2, 2), np.int32), "ids": first["ids"]}, "one shape and dtype"),
        ({"image": first["image"]}, "the same each time"),
        ({"image": first["image"], "ids": Ragged.one(np.arange(3.0))}, "must agree in dtype"),
    ]
    for second, message in cases:
        with pytest.raises(ConfigError, match=message):
            stack([first, second])


def test_ragged_rows_are_padded_where_a_tensor_is_needed() -> None:
    rows = [np.array([1, 2, 3], np.int32), np.array([], np.int32), np.array([4], np.int32)]
    ragged = Ragged.cat([Ragged.one(row) for row in rows])
    assert [row.tolist() for row in (ragged[0], ragged[1], ragged[2])] == [[1, 2, 3], [], [4]]
    assert ragged.lengths.tolist() == [3, 0, 1]
    assert ragged.padded().tolist() == [[1, 2, 3], [0, 0, 0], [4, 0, 0]]
    assert ragged.padded().dtype == torch.int32
    assert ragged.padded(2, fill=-1).tolist() == [[1, 2], [-1, -1], [4, -1]]
    tiles = Ragged.cat([Ragged.one(np.ones((2, 3), np.uint8)), Ragged.one(np.ones((1, 3), np.uint8))])
    assert tiles.padded().tolist() == [[[1] * 3] * 2, [[1] * 3, [0] * 3]]
    with pytest.raises(IndexError):
        ragged[3]
