"""Rows of different lengths, kept end to end: what a batch of captions is until somebody has to pad it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfoundry.pipeline.errors import ConfigError

if TYPE_CHECKING:  # a worker process reads and packs without torch
    import torch


@dataclass(frozen=True, slots=True)
class Ragged:
    """Arrays that differ in their first size, one after the other.

    Attributes:
        values: (n, ...), all rows end to end; an array in a worker, a tensor in what the loader hands out.
        starts: int64 (rows + 1,): row r is `values[starts[r]:starts[r + 1]]`.
    """

    values: Any
    starts: Any

    @classmethod
    def one(cls, row: np.ndarray) -> Ragged:
        """A single row (n, ...): how an `encode` says that its array has a length of its own."""
        return cls(row, np.array([0, len(row)], np.int64))

    @classmethod
    def cat(cls, parts: Sequence[Ragged]) -> Ragged:
        """All rows of several, in order.

        Raises:
            ConfigError: they differ in dtype or in another size than the first.
        """
        kinds = {(part.values.dtype.str, part.values.shape[1:]) for part in parts}
        if len(kinds) != 1:
            raise ConfigError(f"ragged rows of one field must agree in dtype and inner sizes; they are {sorted(kinds)}")
        lengths = np.concatenate([np.diff(part.starts) for part in parts])
        return cls(np.concatenate([part.values for part in parts]), np.concatenate([[0], np.cumsum(lengths)]))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> Any:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self.values[int(self.starts[row]) : int(self.starts[row + 1])]

    @property
    def lengths(self) -> Any:
        """Length of each row, int64 (rows,)."""
        return self.starts[1:] - self.starts[:-1]

    def padded(self, length: int | None = None, fill: float = 0) -> torch.Tensor:
        """The rows as one tensor (rows, length, ...), `fill` behind each.

        Args:
            length: of every row; the longest row's by default. Longer rows are cut.
            fill: what stands behind a row.
        """
        import torch

        values, starts = torch.as_tensor(self.values), torch.as_tensor(self.starts)
        lengths = starts[1:] - starts[:-1]
        if length is None:
            length = int(lengths.max()) if len(lengths) else 0
        padded = values.new_full((len(lengths), length, *values.shape[1:]), fill)
        inside = torch.arange(length, device=values.device) < lengths[:, None]  # (rows, length)
        places = torch.arange(length, device=values.device) + starts[:-1, None]
        padded[inside] = values[places[inside]]
        return padded
