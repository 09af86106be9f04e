import random

import numpy as np
import torch
from safetensors.torch import load

from mmfoundry.pipeline.distributed import Runtime
from mmfoundry.pipeline.rng import gather_rng, reseed, restore_rng


def draw() -> list[float]:
    return [
        torch.rand(()).item(),
        torch.randn(3).sum().item(),
        np.random.rand(),
        np.random.normal(),
        random.random(),
        random.gauss(0, 1),
    ]


def test_every_generator_goes_on_where_it_was() -> None:
    for already in range(3):  # with and without the second value that gaussians keep for the next call
        reseed(7, 0, 0)
        for _ in range(already):
            random.gauss(0, 1)
            np.random.normal()
        (blob,) = gather_rng(Runtime())
        expected = draw() + draw()
        draw()
        restore_rng(blob, Runtime())
        assert draw() + draw() == expected


def test_states_have_one_size_and_no_pickle() -> None:
    sizes = set()
    for already in range(3):
        reseed(already, 0, 0)
        random.gauss(0, 1)
        (blob,) = gather_rng(Runtime())
        sizes.add(len(blob))  # ranks exchange them in one collective
        assert set(load(blob)) == {"torch", "numpy.keys", "numpy.rest", "python.words", "python.gauss"}
    assert len(sizes) == 1


def test_reseeding_tells_ranks_and_steps_apart() -> None:
    draws = set()
    for step, rank in [(0, 0), (0, 1), (1, 0)]:
        reseed(3, step, rank)
        draws.add(tuple(draw()))
    assert len(draws) == 3
    reseed(3, 0, 1)
    assert tuple(draw()) in draws
