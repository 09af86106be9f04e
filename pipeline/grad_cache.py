"""The gradient cache: a contrastive loss over a batch whose activations do not fit in memory (arXiv 2101.06983).

Two passes. The first runs the model chunk by chunk without gradients and keeps its outputs only; the objective then
sees the outputs of the whole batch, and gives their gradients. The second runs each chunk again, with gradients, from
the random state that it had, and backpropagates the inner product of its outputs with those gradients: the same
gradient of the weights as one pass over the whole batch, in the memory of one chunk.

How outputs of chunks become those of the batch: tensors are joined along their first dimension (rows, tokens, whatever
the model counts there), numbers (0-d) are averaged, everything else must be alike in all chunks and is taken once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mmfoundry.pipeline.errors import ConfigError
from mmfoundry.pipeline.rng import rng_state, set_rng_state

Batch = dict[str, Any]
HOST = torch.device("cpu")
PLAIN = bool | int | float | str | None


def split_rows(batch: Batch, rows: int, chunk: int) -> list[Batch]:
    """Cut a batch into chunks of rows.

    Args:
        batch: tensors and lists with one entry a row are cut; 0-d tensors and plain values go to every chunk.
        rows: of the batch.
        chunk: rows of one chunk; divides `rows`.

    Raises:
        ConfigError: a tensor has another number of rows, so that it cannot be told what belongs together.
    """
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.ndim and len(value) != rows:
            raise ConfigError(
                f"grad_cache_chunk_size: the batch has {rows} rows, but its {name} has {len(value)}; such batches "
                "cannot be cut: leave it out and set train_micro_batch_size_per_gpu instead"
            )

    def part(value: Any, start: int) -> Any:
        cut = (isinstance(value, Tensor) and value.ndim) or (isinstance(value, list | tuple) and len(value) == rows)
        return value[start : start + chunk] if cut else value

    return [{name: part(value, start) for name, value in batch.items()} for start in range(0, rows, chunk)]


def joined(outputs: Sequence[Any]) -> Any:
    """The output of the whole batch from those of its chunks; its floating-point tensors want gradients."""

    def join(*parts: Tensor) -> Tensor:
        first = parts[0]
        if not first.is_floating_point():
            return torch.cat(parts) if first.ndim else first
        whole = torch.cat(parts) if first.ndim else torch.stack(parts).mean()
        return whole.detach().requires_grad_()

    return _map(join, *outputs)


def gradients(loss: Tensor, output: Any, chunks: Sequence[Any]) -> list[list[Tensor | None]]:
    """What each chunk's outputs must be multiplied with in the second pass.

    Args:
        loss: of the whole batch.
        output: what `joined` gave, which `loss` was computed from.
        chunks: the outputs that it was given.

    Returns:
        For each chunk, the gradient of each of its tensors in the order of `tensors`; None where there is none.
    """
    wanted = [tensor for tensor in tensors(output) if tensor.requires_grad]
    found = iter(torch.autograd.grad(loss, wanted, allow_unused=True))
    whole = [next(found) if tensor.requires_grad else None for tensor in tensors(output)]
    cut: list[list[Tensor | None]] = [[] for _ in chunks]
    for position, grad in enumerate(whole):
        parts = [list(tensors(chunk))[position] for chunk in chunks]
        if grad is None:
            shares: Sequence[Tensor | None] = [None] * len(chunks)
        elif grad.ndim:
            shares = grad.split([len(part) for part in parts])
        else:
            shares = [grad / len(chunks)] * len(chunks)
        for own, share in zip(cut, shares, strict=True):
            own.append(share)
    return cut


def accumulate(
    chunks: Sequence[Batch],
    forward: Callable[[Batch], Any],
    values: Callable[[Any], dict[str, Tensor]],
    backward: Callable[[Batch, Sequence[Tensor | None]], None],
    *,
    factor: Tensor | float = 1.0,
    buffers: Iterable[Tensor] = (),
    device: torch.device = HOST,
) -> dict[str, Tensor]:
    """Add the gradient of a loss over all chunks.

    Args:
        chunks: from `split_rows`.
        forward: runs the model.
        values: runs the objective on the output of the whole batch.
        backward: runs the model on a chunk again and backpropagates `inner_product` of its output and these gradients.
        factor: what the loss is multiplied with before its gradients are taken.
        buffers: of the model, that the forward pass may change; they change once.
        device: whose random generator is replayed, with the host's.

    Returns:
        What `values` gave.
    """
    kept = [(buffer, buffer.clone()) for buffer in buffers]
    outputs, generators = [], []
    with torch.no_grad():
        for chunk in chunks:
            generators.append(rng_state(device))
            outputs.append(forward(chunk))
        for buffer, before in kept:
            buffer.copy_(before)
    whole = joined(outputs)
    found = values(whole)
    grads = gradients(found["loss"] * factor, whole, outputs)
    del whole, outputs
    after = rng_state(device)
    for chunk, generator, own in zip(chunks, generators, grads, strict=True):
        set_rng_state(generator, device)
        backward(chunk, own)
    set_rng_state(after, device)
    return {name: value.detach() for name, value in found.items()}


def inner_product(output: Any, grads: Sequence[Tensor | None]) -> Tensor:
    """What the second pass backpropagates through a chunk: its outputs times their gradients, at least fp32."""
    products = []
    for tensor, grad in zip(tensors(output), grads, strict=True):
        if grad is not None and tensor.requires_grad:
            wide = torch.promote_types(tensor.dtype, torch.float32)
            products.append((tensor.to(wide) * grad.to(wide)).sum())
    if not products:
        raise ValueError("no output of the model depends on a trainable weight")
    return sum(products[1:], products[0])


def tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of a model's output, in a fixed order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors(value)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            yield from tensors(getattr(output, field.name))
    elif not isinstance(output, PLAIN):
        raise TypeError(f"a gradient cache cannot join outputs of type {type(output).__name__}; a NamedTuple it can")


def _map(function: Callable[..., Tensor], *outputs: Any) -> Any:
    """The first output with each tensor replaced by what `function` makes of the tensors at its place in all."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return function(*outputs)
    if isinstance(first, dict):
        return type(first)({name: _map(function, *(each[name] for each in outputs)) for name in first})
    if isinstance(first, list | tuple):
        parts = (_map(function, *each) for each in zip(*outputs, strict=True))
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in dataclasses.fields(first)]
        parts_ = {name: _map(function, *(getattr(each, name) for each in outputs)) for name in names}
        return dataclasses.replace(first, **parts_)
    if any(each != first for each in outputs):
        raise ValueError(f"chunks of a batch differ in a plain output: {outputs[0]!r} and others")
    return first
