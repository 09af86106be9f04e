"""One rank of a tiny training that kills itself (SIGKILL) inside a step, as `start_ranks` starts it.

Arguments: OUTPUT CONFIG ATTEMPT [PLACE STEP RANK]. PLACE is one of `PLACES`, RANK -1 stands for all. What this rank was
given to learn from, and where it was killed, is noted beside OUTPUT.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from mmfoundry.launch.failures import exit_code_of, leave
from mmfoundry.pipeline import checkpoint
from mmfoundry.pipeline.distributed import init_runtime
from mmfoundry.pipeline.ranks import end_with_starter
from mmfoundry.pipeline.stage import run_stage
from mmfoundry.pipeline.tensor_file import TensorFile
from tests.pipeline import tiny_training
from tests.pipeline.tiny_training import TINY, TinyConfig, TinyLoader, TokenLoss

SAVE_STEPS = 2
WRITING = ["first file", "last file", "publish", "prune"]  # parts of a checkpoint that rank 0 writes
PLACES = ["data", "forward", "backward", "update", "updated", *WRITING]


class Killer:
    """Knows the step, and ends this process at a place of one."""

    def __init__(self, folder: Path, place: str, step: int, rank: int) -> None:
        self.folder, self.place, self.step, self.rank = folder, place, step, rank
        self.now = 0

    def at(self, place: str) -> None:
        """Die, if this is the place and the step; a checkpoint may be written beside the steps before the next one."""
        if place == self.place and self.step <= self.now <= self.step + (SAVE_STEPS if place in WRITING else 0):
            with (self.folder / "killed.jsonl").open("a") as file:
                file.write(json.dumps([self.place, self.step, self.rank]) + "\n")
            os.kill(os.getpid(), signal.SIGKILL)


def before(holder: Any, name: str, what: Callable[..., None]) -> None:
    """Call `what` with the same arguments before each call of a function."""
    function = getattr(holder, name)

    def both(*args: Any, **kwargs: Any) -> Any:
        what(*args, **kwargs)
        return function(*args, **kwargs)

    setattr(holder, name, both)


def watch(killer: Killer, seen: Path, attempt: int) -> None:
    """Have the killer asked at each place, and the samples noted."""

    class Seen(TinyLoader):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            for batch in super().__iter__():
                killer.now = self.consumed // self.batch_size
                killer.at("data")
                with seen.open("a") as file:
                    file.write(json.dumps([attempt, killer.now, batch["__key__"]]) + "\n")
                yield batch

    def backward(loss: TokenLoss, output: Tensor, *unused: Any) -> None:
        killer.at("forward")
        output.register_hook(lambda gradient: killer.at("backward"))

    def add(file: TensorFile, name: str, tensor: Tensor) -> None:
        if name.startswith("mix"):  # in the middle of it
            killer.at("first file" if "model" in file.path.name else "last file")

    tiny_training.TinyLoader = Seen  # type: ignore[misc]
    before(TokenLoss, "__call__", backward)
    register_optimizer_step_pre_hook(lambda *unused: killer.at("update"))
    register_optimizer_step_post_hook(lambda *unused: killer.at("updated"))
    before(TensorFile, "add", add)
    before(checkpoint, "_publish", lambda *unused: killer.at("publish"))
    before(checkpoint, "_prune", lambda *unused: killer.at("prune"))
    if killer.rank and killer.place in WRITING:  # what other ranks are at meanwhile
        before(checkpoint, "save", lambda *unused: killer.at(killer.place))


def main(output: str, config: str, attempt: str, place: str = "", step: str = "0", lost: str = "0") -> None:
    end_with_starter()
    runtime = init_runtime()
    folder, mine = Path(output).parent, int(lost) in (runtime.rank, -1)
    killer = Killer(folder, place if mine else "", int(step), runtime.rank)
    watch(killer, folder / f"seen-{runtime.rank}.jsonl", int(attempt))
    run_stage(TINY, TinyConfig.model_validate(json.loads(config)), Path(output), runtime)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    leave(exit_code_of(lambda: main(*sys.argv[1:])))
