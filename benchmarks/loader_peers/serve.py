"""One side as a process of its own: `python serve.py SIDE`, told what to do by JSON lines, answering by JSON lines.

    {"do": "prepare", "pool": PATH}                                          -> {}
    {"do": "open", "pool": PATH, "workers": N, "batch": B, "device": "cpu"}  -> {"seconds": to the first batch}
    {"do": "run", "seconds": S, "skip": K}                                   -> {"samples": ..., "seconds": ...}
    {"do": "close"}                                                          -> {}

What a side needs is imported first; each "prepare" and "open" is a fork of that state, so that no configuration
inherits the memory or the workers of the one before. "prepare" makes what a run after the first finds (index, shards).
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Generator
from pathlib import Path
from typing import Any, TextIO

SIDES = {
    "ours": "side_ours",
    "open_clip": "side_open_clip",
    "webdataset": "side_webdataset",
    "mosaicml-streaming": "side_mosaicml",
    "decode": "side_decode",
}


_PR_SET_PDEATHSIG = 1  # of Linux's prctl


def main() -> None:
    """Serve one side until the input ends."""
    _end_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    orders = os.fdopen(os.dup(0), "r")
    if sys.argv[1] != "decode":
        importlib.import_module("torch")  # as every trainer has; what a side imports of its own comes on top
    side = importlib.import_module(SIDES[sys.argv[1]])
    _answer(answers, {})
    for line in orders:
        child = os.fork()
        if child == 0:
            status = _serve_order(side, json.loads(line), orders, answers)
            atexit._run_exitfuncs()  # peers unlink shared memory there; the rest of an interpreter's end takes seconds
            sys.stderr.flush()
            os._exit(status)
        status = os.waitpid(child, 0)[1]
        if status:
            sys.exit(f"{sys.argv[1]} ended with status {status}")
        _answer(answers, {})


def _serve_order(side: Any, order: dict[str, Any], orders: TextIO, answers: TextIO) -> int:
    """Serve one "prepare", or one "open" until it is closed; returns the exit status of this process."""
    _end_with_parent()
    try:
        if order["do"] == "prepare":
            side.prepare(Path(order["pool"]))
            return 0
        start = time.perf_counter()
        batches = side.batches(Path(order["pool"]), order["workers"], order["batch"], order["device"])
        _next(batches, order["device"])
        _answer(answers, {"seconds": time.perf_counter() - start})
        for line in orders:
            order = {**order, **json.loads(line)}
            if order["do"] == "close":
                break
            _answer(answers, _run(batches, order["seconds"], order["skip"], order["device"]))
        batches.close()  # ends the workers
        return 0
    except BaseException:  # whatever it is: a fork must not go on as if it were the parent
        traceback.print_exc()
        return 1


def _run(batches: Generator[Any, None, None], seconds: float, skip: int, device: str) -> dict[str, float]:
    for _ in range(skip):
        _next(batches, device)
    samples, start = 0, time.perf_counter()
    while True:
        samples += _next(batches, device)
        now = time.perf_counter()
        if now - start >= seconds:
            return {"samples": samples, "seconds": now - start}


def _next(batches: Generator[Any, None, None], device: str) -> int:
    """Take one batch; returns its number of samples once it stands on the device."""
    rows = len(next(batches))
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return rows


def _end_with_parent() -> None:
    """Have the system kill this process with the one that started it: stopped, it would not see its input end."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _answer(answers: TextIO, answer: dict[str, float]) -> None:
    print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
