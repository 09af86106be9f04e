"""From made batches to batches of tensors where they are needed; on CUDA, copied ahead on a stream of their own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mmfoundry.data.batch_maker import Made
from mmfoundry.data.gather import Batch, as_tensors, is_tensor
from mmfoundry.data.ragged import Ragged

if TYPE_CHECKING:  # imported where it is needed: reading shards is not
    import torch

AHEAD = 2  # batches that are on the device before they are asked for
_POLL_S = 0.1  # seconds after which a full queue is looked at again by a thread that may have been told to end
Generated = Generator[Made, None, None]


def on_device(
    source: Generated, device: torch.device | str | None = None, finish: Callable[[Batch], Batch] | None = None
) -> Generated:
    """Turn batches of arrays into batches of tensors.

    Args:
        source: made batches; closed when this ends.
        device: where the tensors are to be; None or the CPU leaves them in the memory that they were made in.
        finish: applied to each batch of tensors, on the host.
    """
    if device is not None:
        import torch

        device = torch.device(device)
        if device.type == "cuda":
            return copied_ahead(_finished(source, finish), CudaCopies(device))
    return _finished(source, finish)


def _finished(source: Generated, finish: Callable[[Batch], Batch] | None) -> Generated:
    with closing(source):
        for made in source:
            if made.batch:
                made = replace(made, batch=as_tensors(made.batch))
                if finish is not None:
                    made = replace(made, batch=finish(made.batch))  # type: ignore[arg-type]
            yield made
            del made  # else its memory is not free while the next is waited for


class CudaCopies:
    """Copies batches to one CUDA device, beside what is computed there."""

    def __init__(self, device: torch.device):
        """Open a stream on the device."""
        import torch

        self._torch = torch
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def send(self, batch: Batch) -> tuple[Batch, Any]:
        """Begin to copy a batch; returns it with what tells when it is there."""
        with self._torch.cuda.stream(self._stream):
            sent = map_tensors(batch, lambda each: each.pin_memory().to(self._device, non_blocking=True))
            return sent, self._stream.record_event()

    def wait(self, batch: Batch, event: Any) -> Batch:
        """Have the present stream wait for a batch before it computes on it."""
        present = self._torch.cuda.current_stream(self._device)
        present.wait_event(event)
        # its memory is the copying stream's: not to be used again before the present stream is done with it
        map_tensors(batch, lambda each: each.record_stream(present))
        return batch


@dataclass(frozen=True, slots=True)
class _Failed:
    error: BaseException


def copied_ahead(source: Generated, copies: CudaCopies) -> Generated:
    """Batches of `source`, up to `AHEAD` of them sent by a thread before they are asked for."""
    ready: queue.Queue[tuple[Made, Any] | _Failed | None] = queue.Queue(AHEAD)
    told_to_end = threading.Event()

    def put(item: tuple[Made, Any] | _Failed | None) -> None:
        while not told_to_end.is_set():
            try:
                return ready.put(item, timeout=_POLL_S)
            except queue.Full:
                continue

    def run() -> None:
        try:
            with closing(source):
                for made in source:
                    if made.batch is None:
                        put((made, None))
                    else:
                        batch, event = copies.send(made.batch)
                        put((replace(made, batch=batch), event))
                    del made
                    if told_to_end.is_set():
                        return
            put(None)
        except BaseException as error:
            put(_Failed(error))
            if not isinstance(error, Exception):
                raise

    thread = threading.Thread(target=run, name="loader-device", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, _Failed):
                raise item.error
            made, event = item
            if made.batch is not None:
                made = replace(made, batch=copies.wait(made.batch, event))
            del item
            yield made
            del made
    finally:
        told_to_end.set()
        thread.join()


def map_tensors(value: Any, change: Callable[[Any], Any]) -> Any:
    """A batch with `change` applied to its tensors, at any depth of dicts, lists, tuples and `Ragged`."""
    if is_tensor(value):
        return change(value)
    if isinstance(value, Ragged):
        return Ragged(change(value.values), change(value.starts))
    if isinstance(value, dict):
        return {name: map_tensors(part, change) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(part, change) for part in value)
    return value
