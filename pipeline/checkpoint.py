"""Checkpoints: one format for every ZeRO stage and number of ranks, complete or not there.

    <folder>/step-000100/
        model.safetensors       trainable parameters and buffers by name, whole, fp32; frozen ones are not saved
        optimizer.safetensors   `<parameter>/<key>`, e.g. `visual.weight/exp_avg`, whole
        rng-<rank>.safetensors  random generators of each rank
        state.json              step, data position, world size, versions, and the size of every other file

A checkpoint is written into `step-000100.tmp`, synced, and renamed: what is killed half-way is never picked up. Where
the host has room for a copy, the writing can go on beside the next steps; the copy is whole before they begin.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mmfoundry.pipeline import optimizer_state
from mmfoundry.pipeline.artifact import sync_folder, write_atomic
from mmfoundry.pipeline.distributed import Runtime, all_reduce_sum, any_rank, barrier
from mmfoundry.pipeline.engine import Engine
from mmfoundry.pipeline.errors import DamagedInput, MmfoundryError, NotEnoughSpace, disk_full
from mmfoundry.pipeline.rng import gather_rng, reseed, restore_rng
from mmfoundry.pipeline.tensor_file import Spec, TensorFile, file_order, numel_bytes

FORMAT = 1
Copies = list[tuple[Path, dict[str, Spec], list[Tensor]]]
Explain = Callable[[OSError | NotEnoughSpace | None], Exception]
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder, and its `state.json`."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.state["step"])

    def load_model(self, model: nn.Module) -> None:
        """Put trainable parameters and buffers into a model that no engine has taken yet.

        Raises:
            DamagedInput: the checkpoint is of another model.
        """
        targets: dict[str, Tensor] = {**_trainable(model), **_buffers(model)}
        with _open(self.path / MODEL) as file, torch.no_grad():
            _check_fits(self.path / MODEL, file, targets)
            for name, target in targets.items():
                target.copy_(file.get_tensor(name))

    def load_optimizer(self, engine: Engine) -> None:
        """Put the optimizer's states into an engine that has made no step yet."""
        names = {parameter: name for name, parameter in _trainable(engine.model).items()}
        keys, count = self.state["optimizer"]["keys"], self.state["optimizer"]["updates"]
        with _open(self.path / OPTIMIZER) as file:
            held = frozenset(file.keys())

            def read(parameter: nn.Parameter, key: str) -> Tensor | None:
                entry = f"{names[parameter]}/{key}"
                return file.get_tensor(entry) if entry in held else None

            optimizer_state.load_states(engine, keys, count, read)
        engine.restore_loss_scale(self.state["loss_scale"], self.state["good_steps"])

    def restore_rng(self, runtime: Runtime, seed: int) -> None:
        """Put back this rank's generators; with another number of ranks, seed them afresh from seed, step and rank."""
        if self.state["world_size"] == runtime.world_size:
            restore_rng((self.path / _rng_file(runtime.rank)).read_bytes(), runtime)
        else:
            reseed(seed, self.step, runtime.rank)


@dataclass(frozen=True)
class Best:
    """By which number the best checkpoint is known: the name of one in `state["metrics"]`, and which way is better."""

    metric: str
    greater: bool

    def of(self, state: dict[str, Any]) -> float | None:
        """The number, turned so that greater is better; None where a checkpoint has none that is finite."""
        value = state.get("metrics", {}).get(self.metric)
        if value is None or not math.isfinite(value):
            return None
        return float(value) if self.greater else -float(value)


class Saving:
    """A checkpoint being written; `wait` ends it."""

    def __init__(self, writer: _Attempt, work: Callable[[], None], runtime: Runtime, explain: Explain) -> None:
        self._writer, self._runtime, self._explain = writer, runtime, explain
        self._error: BaseException | None = None  # a bug's

        def do() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error
                raise

        self._thread = threading.Thread(target=do, name="checkpoint") if runtime.is_main else None
        if self._thread is not None:
            self._thread.start()

    def wait(self) -> None:
        """Wait until it is written; a collective.

        Raises:
            NotEnoughSpace: the disk is full; earlier checkpoints are untouched.
            MmfoundryError: it could not be written for another reason; the same holds.
        """
        if self._thread is not None:
            self._thread.join()
        if any_rank(self._writer.failure is not None or self._error is not None, self._runtime.group):
            raise self._error or self._explain(self._writer.failure)


def save(
    folder: Path,
    engine: Engine,
    state: dict[str, Any],
    keep: int,
    runtime: Runtime,
    best: Best | None = None,
    background: bool = False,
) -> Saving:
    """Write a checkpoint and remove old ones; every rank calls it, rank 0 writes.

    Args:
        folder: of the phase's checkpoints.
        engine: what is trained.
        state: JSON values to find again in `Checkpoint.state`; `step` among them.
        keep: how many checkpoints to leave, this one included.
        runtime: this process among the ranks.
        best: by which number one more is left.
        background: come back when everything is copied; at once where there is no room for a copy.
    Returns:
        To wait for: without `background` it is done already.
    Raises:
        NotEnoughSpace: the disk is full; earlier checkpoints are untouched.
    """
    final = folder / f"step-{state['step']:06d}"
    aside = final.with_name(final.name + ".tmp")
    generators = gather_rng(runtime)
    writer = _Attempt(runtime.is_main)
    writer.do(lambda: _make_empty(aside))
    keys = optimizer_state.state_keys(engine)
    model_specs, optimizer_specs = _model_specs(engine), _optimizer_specs(engine, keys)
    needed_bytes = numel_bytes(model_specs) + numel_bytes(optimizer_specs)
    copies: Copies | None = [] if background and runtime.is_main and _room_for(needed_bytes) else None
    _write(writer, aside / MODEL, model_specs, partial(_model_tensors, engine), copies)
    _write(writer, aside / OPTIMIZER, optimizer_specs, partial(_optimizer_tensors, engine), copies)
    full_state = state | {
        "format": FORMAT,
        "world_size": runtime.world_size,
        "loss_scale": engine.loss_scale,
        "good_steps": engine.good_steps,
        "optimizer": {"keys": keys, "updates": optimizer_state.updates(engine)},
        "versions": {"torch": torch.__version__},
    }

    if background:
        full_state = json.loads(json.dumps(full_state))  # what it holds may change with the next step

    def finish() -> None:
        for path, specs, tensors in copies or ():
            _write(writer, path, specs, lambda order, tensors=tensors: iter(tensors))  # type: ignore[misc]
        writer.do(lambda: _publish(aside, final, generators, full_state))
        writer.do(lambda: _prune(folder, keep, best))
        if writer.failure is not None:
            shutil.rmtree(aside, ignore_errors=True)

    saving = Saving(writer, finish, runtime, lambda failure: _as_user_error(failure, folder, needed_bytes))
    if not background:
        saving.wait()
    return saving


def check_place(folder: Path, engine: Engine, runtime: Runtime) -> None:
    """Refuse a place where no checkpoint can be written, before the first step is made; every rank calls it.

    Raises:
        NotEnoughSpace: there is no room even for the weights.
        MmfoundryError: the folder cannot be written to.
    """
    writer, weights_bytes = _Attempt(runtime.is_main), numel_bytes(_model_specs(engine))

    def check() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob("step-*.tmp"):  # of a run that was killed
            shutil.rmtree(left_over)
        write_atomic(folder / ".writable", b"")
        (folder / ".writable").unlink()
        if shutil.disk_usage(folder).free < weights_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer.do(check)
    if any_rank(writer.failure is not None, runtime.group):
        raise _as_user_error(writer.failure, folder, weights_bytes)


def best_of(folder: Path, best: Best, runtime: Runtime) -> Checkpoint | None:
    """The best complete checkpoint in a folder; None where none has the number. Every rank calls it, none writes."""
    barrier(runtime.group)
    return _best_in(folder, best)


def _best_in(folder: Path, best: Best) -> Checkpoint | None:
    found = [(value, each.step, each) for each in _complete(folder) if (value := best.of(each.state)) is not None]
    return max(found, key=lambda entry: entry[:2])[2] if found else None


def newest(folder: Path, runtime: Runtime, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest complete checkpoint in a folder, the same on every rank; None where there is none.

    Args:
        folder: of a phase's checkpoints; need not exist.
        runtime: this process among the ranks; the filesystem is shared.
        say: told of each damaged checkpoint that is passed over.
    """
    found: Checkpoint | None = None
    if runtime.is_main:
        for path in sorted(folder.glob("step-*"), key=_step_of, reverse=True):
            if path.suffix == ".tmp":
                continue
            found = _read_complete(path)
            if found is not None:
                break
            say(f"checkpoint {path.name} is incomplete and passed over")
    step = int(all_reduce_sum({"step": found.step + 1 if found else 0}, runtime.group)["step"]) - 1
    if step < 0:
        return None
    found = found or _read_complete(folder / f"step-{step:06d}")
    if found is None:
        raise MmfoundryError(
            f"{folder}/step-{step:06d}: not seen by rank {runtime.rank}; ranks must share a filesystem"
        )
    return found


class _Attempt:
    """Does what rank 0 does alone; after its first failure nothing more, so that collectives still match."""

    def __init__(self, active: bool) -> None:
        self._active = active
        self.failure: OSError | NotEnoughSpace | None = None

    def do(self, action: Callable[[], Any]) -> Any:
        if not self._active or self.failure is not None:
            return None
        try:
            return action()
        except (OSError, NotEnoughSpace) as error:
            self.failure = error
            return None


def _room_for(copy_bytes: int) -> bool:
    """Whether the host has memory for a copy, and as much again for what else goes on."""
    return psutil.virtual_memory().available > 2 * copy_bytes


def _write(
    writer: _Attempt,
    path: Path,
    specs: dict[str, Spec],
    tensors: Callable[[list[str]], Iterator[Tensor]],
    copies: Copies | None = None,
) -> None:
    order = file_order(specs)
    if copies is not None:
        copies.append((path, specs, [tensor.detach().to("cpu", copy=True) for tensor in tensors(order)]))
        return
    file: TensorFile | None = writer.do(lambda: TensorFile(path, specs))
    for name, tensor in zip(order, tensors(order), strict=True):  # collectives: every rank goes through all of them
        if file is not None:
            writer.do(partial(file.add, name, tensor))
    if file is not None:
        writer.do(file.close)
        if writer.failure is not None:
            file.abandon()


def _as_user_error(failure: OSError | NotEnoughSpace | None, folder: Path, needed_bytes: int) -> Exception:
    if failure is None:
        return MmfoundryError(f"rank 0 could not write a checkpoint to {folder}; see its error")
    if disk_full(failure):
        free_bytes = shutil.disk_usage(folder).free  # with what was written of this one gone again
        return NotEnoughSpace(
            f"no space left for a checkpoint in {folder}: it takes {needed_bytes / 1e6:.1f} MB, {free_bytes / 1e6:.1f} "
            "MB are free; the previous one is untouched: free some and run again"
        )
    if isinstance(failure, OSError):
        reason = (failure.strerror or str(failure)).lower()
        return MmfoundryError(
            f"cannot write a checkpoint to {folder}: {reason}; the previous one is untouched: see to the folder and "
            "run again"
        )
    return failure


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that a state dict holds; the others follow from the config."""
    named = dict(model.named_buffers())
    return {name: named[name] for name in model.state_dict() if name in named}


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))  # at ZeRO stage 3 the parameter itself is cut up


def _model_specs(engine: Engine) -> dict[str, Spec]:
    specs: dict[str, Spec] = {name: (torch.float32, _shape(p)) for name, p in _trainable(engine.model).items()}
    return specs | {name: (buffer.dtype, tuple(buffer.shape)) for name, buffer in _buffers(engine.model).items()}


def _model_tensors(engine: Engine, names: list[str]) -> Iterator[Tensor]:
    parameters, buffers = _trainable(engine.model), _buffers(engine.model)
    for name in names:
        if name in buffers:
            yield buffers[name]
        else:
            yield optimizer_state.full_parameter(engine, parameters[name]).float()


def _optimizer_specs(engine: Engine, keys: list[str]) -> dict[str, Spec]:
    shapes = {name: optimizer_state.state_shapes(engine, p, keys) for name, p in _trainable(engine.model).items()}
    return {f"{name}/{key}": (torch.float32, shape) for name, kept in shapes.items() for key, shape in kept.items()}


def _optimizer_tensors(engine: Engine, names: list[str]) -> Iterator[Tensor]:
    parameters = _trainable(engine.model)
    for entry in names:
        name, _, key = entry.rpartition("/")
        yield optimizer_state.full_state(engine, parameters[name], key)


def _rng_file(rank: int) -> str:
    return f"rng-{rank}.safetensors"


def _step_of(path: Path) -> int:
    digits = path.name.removeprefix("step-").removesuffix(".tmp")
    return int(digits) if digits.isdigit() else -1


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _publish(aside: Path, final: Path, generators: list[bytes], state: dict[str, Any]) -> None:
    """Write the small files, `state.json` last, and give the folder its name."""
    for rank, generator in enumerate(generators):
        write_atomic(aside / _rng_file(rank), generator)
    sizes = {path.name: path.stat().st_size for path in sorted(aside.iterdir())}
    write_atomic(aside / STATE, json.dumps(state | {"files": sizes}, indent=1) + "\n")
    sync_folder(aside)
    if final.exists():  # of an earlier run that was resumed from before it, or damaged
        _remove(final)
    os.rename(aside, final)
    sync_folder(final.parent)


def _prune(folder: Path, keep: int, best: Best | None) -> None:
    """Remove all but the newest, and the best if one is wanted."""
    spared: Path | None = None
    if best is not None:
        found = _best_in(folder, best)
        spared = None if found is None else found.path
    kept = 0
    for path in sorted(folder.glob("step-*"), key=_step_of, reverse=True):
        kept += path.suffix != ".tmp"
        if path.suffix == ".tmp" or (kept > keep and path != spared):
            _remove(path)


def _complete(folder: Path) -> list[Checkpoint]:
    found = (_read_complete(path) for path in folder.glob("step-*") if path.suffix != ".tmp")
    return [each for each in found if each is not None]


def _remove(path: Path) -> None:
    """Take the name away first, so that a kill leaves no half-removed checkpoint under it."""
    if path.suffix != ".tmp":
        path = path.rename(path.with_name(f"{path.name}.old.tmp"))
    shutil.rmtree(path)


def _read_complete(path: Path) -> Checkpoint | None:
    """The checkpoint in a folder, or None where a file is missing or has not its full size."""
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        whole = all((path / name).stat().st_size == size for name, size in state["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Checkpoint(path, state) if whole and state.get("format") == FORMAT else None


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise DamagedInput(
            f"{path}: not a readable safetensors file ({error}); remove its folder to go back"
        ) from error


def _check_fits(path: Path, file: Any, targets: dict[str, Tensor]) -> None:
    saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    wanted = {name: tuple(target.shape) for name, target in targets.items()}
    differing = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
    if differing:
        raise DamagedInput(
            f"{path}: is of another model: {', '.join(differing[:3])} differ(s) in presence or shape; "
            "remove the checkpoints to start over"
        )
