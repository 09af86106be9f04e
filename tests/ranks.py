"""Real ranks for tests: gloo, one process a rank, started once and used again, since a start costs seconds."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

TIMEOUT_S = 240.0
GRACE_S = 3.0  # for the other ranks, once one has raised
_POOLS: dict[int, _Pool] = {}


def run_ranks(function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """Call `function(group, *args)` on every rank and return what each returned, in rank order.

    `function` must be importable (a test module's top level), what it takes and returns must pickle. Ranks keep what
    they imported and seeded: set seeds inside.

    Raises:
        RuntimeError: a rank raised (its traceback is in the text), died, or took over four minutes.
    """
    pool = _POOLS.get(world)
    if pool is None:
        pool = _POOLS[world] = _Pool(world)
    try:
        return pool.call(function, args)
    finally:
        if pool.broken:
            _POOLS.pop(world).stop()


class _Pool:
    def __init__(self, world: int) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.pipes, self.processes, self.broken = [], [], False
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, world, port), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        atexit.register(self.stop)

    def call(self, function: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        self.broken = True  # until every rank has answered: some may wait in a collective for ever
        for pipe in self.pipes:
            pipe.send((function, args))
        answers: dict[int, tuple[Any, str | None]] = {}
        while len(answers) < len(self.pipes):
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in answers]
            troubles = [f"rank {rank} raised\n{text}" for rank, (_, text) in sorted(answers.items()) if text]
            ready = wait(waiting, timeout=GRACE_S if troubles else TIMEOUT_S)
            if not ready:
                late = sorted(set(range(len(self.pipes))) - set(answers))
                raise RuntimeError("".join(troubles) or f"ranks {late} took too long")
            for pipe in ready:
                rank = self.pipes.index(pipe)
                try:
                    answers[rank] = pipe.recv()
                except EOFError:
                    raise RuntimeError("".join(troubles) or f"rank {rank} died") from None
        self.broken = False
        troubles = [f"rank {rank} raised\n{text}" for rank, (_, text) in sorted(answers.items()) if text]
        if troubles:
            raise RuntimeError("".join(troubles))
        return [answers[rank][0] for rank in range(len(self.pipes))]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _serve(pipe: Connection, rank: int, world: int, port: int) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} | {"DS_ACCELERATOR": "cpu"}

    import torch

    from mmfoundry.pipeline.distributed import init_runtime
    from mmfoundry.pipeline.torchvision_ops import declare_missing_ops

    torch.set_num_threads(1)
    declare_missing_ops()
    group = init_runtime().group
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((function(group, *args), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
