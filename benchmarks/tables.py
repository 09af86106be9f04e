"""Rows of the benchmarks' tables: a piece of work, our number, the peer's, their unit, and the ratio of the two."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def row(work: str, ours: float, peer: float, unit: str, ratio: float, digits: int = 3) -> Row:
    """One row.

    Args:
        work: what was done.
        ours: our number.
        peer: the peer's.
        unit: of both.
        ratio: above 1 where ours is better.
        digits: behind the point, of our number and the peer's; the ratio has 3.
    """
    numbers = {"ours": round(ours, digits), "peer": round(peer, digits)}
    return {"work": work, **numbers, "unit": unit, "ratio": round(ratio, 3)}


def faster(work: str, ours: float, peer: float, unit: str, digits: int = 3) -> Row:
    """A row of a rate: more is better."""
    return row(work, ours, peer, unit, ours / peer, digits)


def smaller(work: str, ours: float, peer: float, unit: str, digits: int = 3) -> Row:
    """A row of a time or of memory: less is better."""
    return row(work, ours, peer, unit, peer / ours, digits)


def print_header(width: int, peer: str = "peer", note: str = "") -> None:
    """Print the line over the rows.

    Args:
        width: of the first column, characters.
        peer: the peer's name.
        note: behind the names of the columns.
    """
    print(f"\n{'work':<{width}}{'ours':>13}{peer:>13}  {'unit':<11} ratio{note}", flush=True)


def print_row(each: Row, width: int) -> None:
    """Print a row, as soon as there is one."""
    line = f"{each['work']:<{width}}{each['ours']:>13}{each['peer']:>13}  {each['unit']:<11} {each['ratio']}"
    print(line, flush=True)


def print_table(rows: Iterable[Row], width: int, peer: str = "peer") -> None:
    """Print header and rows."""
    print_header(width, peer)
    for each in rows:
        print_row(each, width)


def write_rows(path: Path | None, rows: Iterable[Row]) -> None:
    """Write the rows as a JSON list; nothing where no file is asked for."""
    if path is not None:
        path.write_text(json.dumps(list(rows), indent=1) + "\n", encoding="utf-8")
