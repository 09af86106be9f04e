"""The state of every random generator a training step may draw from, as plain tensors: no pickle."""

from __future__ import annotations

import math
import random

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from mmfoundry.pipeline.distributed import Runtime, all_gather_into


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """This process's torch, NumPy and Python generators; the same names, sizes and types at every call."""
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, words, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy.keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy.rest": torch.tensor([position, has_gauss, cached], dtype=torch.float64),
        "python.words": torch.tensor([version, *words], dtype=torch.int64),
        "python.gauss": torch.tensor([math.nan if gauss is None else gauss], dtype=torch.float64),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Put back what `rng_state` returned, on this machine or another."""
    torch.set_rng_state(state["torch"])
    position, has_gauss, cached = state["numpy.rest"].tolist()
    keys = state["numpy.keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))
    version, *words = state["python.words"].tolist()
    gauss = state["python.gauss"].item()
    random.setstate((version, tuple(words), None if math.isnan(gauss) else gauss))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def gather_rng(runtime: Runtime) -> list[bytes]:
    """Every rank's state as the bytes of a safetensors file, in rank order, on all ranks; a collective."""
    mine = save(rng_state(runtime.device))
    if runtime.group is None:
        return [mine]
    sent = torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(runtime.device)
    received = sent.new_empty(runtime.world_size * len(sent))
    all_gather_into(received, sent, runtime.group)
    return [bytes(part.cpu().numpy()) for part in received.chunk(runtime.world_size)]


def restore_rng(blob: bytes, runtime: Runtime) -> None:
    """Put back one of the states that `gather_rng` returned."""
    set_rng_state(load(blob), runtime.device)


def reseed(seed: int, step: int, rank: int) -> None:
    """Seed all generators afresh: for ranks that a checkpoint of another world size does not know."""
    word = int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
    random.seed(word)
    np.random.seed(word)
    torch.manual_seed(word)
