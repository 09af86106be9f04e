"""Rows -> one batch, each field in one contiguous array; where the arrays lie (heap, shared memory) is the caller's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from threading import Lock
from typing import Any

import numpy as np

from mmfoundry.data.ragged import Ragged
from mmfoundry.pipeline.errors import ConfigError

Batch = dict[str, Any]
Row = Mapping[str, Any]
# shape, dtype -> an array to be filled
Empty = Callable[[tuple[int, ...], np.dtype], np.ndarray]


class Gather:
    """Collects the rows of one batch.

    A row's arrays and numbers are written to their place at once, so that a batch never exists twice: (b, ...) in the
    dtype of the first row. `Ragged` values become one `Ragged`, everything else a list.
    """

    def __init__(self, rows: int, empty: Empty = np.empty):
        """Expect so many rows; arrays come from `empty`."""
        self._rows, self._empty = rows, empty
        self._added = 0
        self._batch: Batch = {}
        self._lock = Lock()

    def __len__(self) -> int:
        return self._added

    def add(self, row: Row) -> None:
        """Take the next row; errors as those of `put`."""
        self.put(self._added, row)

    def put(self, place: int, row: Row) -> None:
        """Take the row of a place, each once and in any order, by any number of threads.

        Raises:
            ConfigError: its names, shapes or dtypes are not those of the row that came first.
        """
        with self._lock:
            if not self._batch:
                self._batch = {name: self._field(value) for name, value in row.items()}
            self._added += 1
        if row.keys() != self._batch.keys():
            raise ConfigError(f"encode gave {list(row)}, before {list(self._batch)}; give the same each time")
        for name, value in row.items():
            field = self._batch[name]
            if isinstance(field, list):
                field[place] = value
                continue
            array = as_array(value)
            if array.shape != field.shape[1:] or array.dtype != field.dtype:
                raise ConfigError(
                    f"encode gave {array.dtype} {array.shape} for {name!r}, before {field.dtype} {field.shape[1:]}; "
                    "give one shape and dtype, or Ragged.one(array) where rows have lengths of their own"
                )
            field[place] = array

    def batch(self) -> Batch:
        """The batch, once all rows are there."""
        assert self._added == self._rows, f"{self._added} of {self._rows} rows"
        return {name: self._joined(field) for name, field in self._batch.items()}

    def _field(self, first: Any) -> np.ndarray | list[Any]:
        if not is_array(first):
            return [None] * self._rows
        array = as_array(first)
        return self._empty((self._rows, *array.shape), array.dtype)

    def _joined(self, field: np.ndarray | list[Any]) -> Any:
        if isinstance(field, list) and isinstance(field[0], Ragged):
            return Ragged.cat(field)
        return field


def is_array(value: Any) -> bool:
    """Whether a value is stacked: arrays, tensors and numbers are, strings and the rest are listed."""
    return isinstance(value, np.ndarray | np.number | np.bool_ | int | float | bool) or is_tensor(value)


def is_tensor(value: Any) -> bool:
    """Whether a value is a torch tensor, without importing torch: there is none in a process that has not."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def as_array(value: Any) -> np.ndarray:
    """An array, tensor or number as an array, on the same memory where there is one."""
    return value.numpy() if is_tensor(value) else np.asarray(value)


def as_tensors(batch: Batch) -> Batch:
    """The batch with its arrays as tensors on the same memory; `Ragged` ones, too."""
    import torch

    made: Batch = {}
    for name, value in batch.items():
        if isinstance(value, np.ndarray):
            made[name] = torch.from_numpy(value)
        elif isinstance(value, Ragged):
            made[name] = Ragged(torch.as_tensor(value.values), torch.as_tensor(value.starts))
        else:
            made[name] = value
    return made


def stack(rows: list[Row]) -> Batch:
    """Collate by name: arrays and numbers are stacked into tensors (b, ...) of their own dtype, others listed."""
    gather = Gather(len(rows))
    for row in rows:
        gather.add(row)
    return as_tensors(gather.batch())
