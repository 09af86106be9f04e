"""Memory that is used again: not before it is free, and without growing."""

import gc
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from mmfoundry.data.recycled import Recycled

MB = 1 << 20


def _place(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_is_used_again_when_the_last_view_is_gone() -> None:
    memory = Recycled()
    first = memory.empty((3, MB), np.uint8)
    place = _place(first)
    held = torch.from_numpy(first[1:]).view(2, -1)[0]
    del first
    second = memory.empty((3, MB), np.uint8)
    assert _place(second) != place
    del held
    second[:] = 7
    third = memory.empty((MB - 7,), np.float32)  # of another type, and larger than what is free
    third[:] = 1.0
    assert (second == 7).all(), "what is free is too small, and may be given up, but what is held stays untouched"
    del second, third
    assert memory.empty((2, MB), np.uint8).shape == (2, MB)


def test_blocks_of_two_sizes_keep_to_themselves() -> None:
    memory = Recycled()
    seen = set()
    for _ in range(20):
        large, small = memory.empty((9 * MB,), np.uint8), memory.empty((2 * MB,), np.uint8)
        seen |= {_place(large), _place(small)}
        del large, small
    assert len(seen) == 2


def test_what_is_held_is_never_handed_out_and_what_is_free_does_not_pile_up() -> None:
    memory = Recycled()

    def work(seed: int) -> None:
        noise = random.Random(seed)
        held: list[tuple[int, np.ndarray]] = []
        for number in range(150):
            array = memory.empty((noise.randint(1, 12), MB // 8), np.int64)
            array[:, ::4096] = number
            held.append((number, array))
            if len(held) > 3:
                was, array = held.pop(noise.randrange(4))
                assert (array[:, ::4096] == was).all()
            del array

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(work, range(3)))
    gc.collect()
    assert len(memory._free) <= 3 * 4


def test_small_arrays_are_plain_ones() -> None:
    memory = Recycled()
    assert memory.empty((3, 4), np.float32).flags.owndata
    assert memory.empty((0, 4), np.float32).shape == (0, 4)
