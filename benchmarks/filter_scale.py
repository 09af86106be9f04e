"""How time and memory of the `filter` stage grow with the pool: drawn DataComp metadata, 1 to 10 million rows.

    python benchmarks/filter_scale.py [--quick] [--json PATH] [--rows 1e6 2e6 ...] [--workers 2] [--work FOLDER]
                                      [--plot PATH] [--filters TREE] [--hashes] [--width 64]

Each run is the whole stage in a process of its own, as a user starts it: repeated uids, DataComp's basic filtering with
fastText's language, and the best 30% by CLIP score of what is left; out come the subset, the kept rows and the account.
Memory is that of all processes together, shared pages counted once (PSS), looked at every tenth of a second; it is held
against the 4 GB that ten million rows may take. CPU seconds are those of all processes together: on a machine that does
other work as well they say more than seconds. Seconds a million rows say whether time grows in line: the last row
compares the largest pool with the smallest. `--filters` measures another tree, e.g. caption_near_duplicate; for
near_duplicate the pool needs `--hashes`, for semantic_duplicate embeddings of a `--width`.

Pools lie in `--work` (git ignores it) and are drawn once.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
FULL = (1_000_000, 2_000_000, 5_000_000, 10_000_000)
QUICK = (50_000, 100_000, 200_000)
LIMIT_GB = 4.0
_ROWS_PER_FILE = 250_000
TREE = "{all: [basic, clip_score: {model: l14, top: 0.3}]}"


@dataclass(frozen=True)
class Measured:
    """One run of the stage."""

    rows: int
    seconds: float
    cpu_seconds: float
    peak_gb: float
    kept: int


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run all sizes, print a table, write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="small pools: under 50 seconds")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--rows", type=float, nargs="+", help="sizes of the pools")
    parser.add_argument("--workers", type=int, default=2, help="processes of the stage")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "benchmark-filter-scale", help="folder for pools")
    parser.add_argument("--filters", default=TREE, metavar="TREE", help="YAML (default: %(default)s)")
    parser.add_argument("--hashes", action="store_true", help="pools with perceptual hashes")
    parser.add_argument("--width", type=int, default=0, help="of b32_img in the pools (default: none)")
    parser.add_argument("--plot", type=Path, help="also draw seconds and memory over rows, as SVG")
    options = parser.parse_args(arguments)
    sizes = [int(rows) for rows in options.rows or (QUICK if options.quick else FULL)]
    measured = []
    print(f"{'rows':>12} {'seconds':>9} {'s / million':>12} {'CPU s':>9} {'peak GB':>8} {'kept':>10}")
    for rows in sizes:
        one = run(
            pool_of(options.work, rows, options.hashes, options.width),
            options.work,
            rows,
            options.workers,
            options.filters,
        )
        measured.append(one)
        per_million = one.seconds / rows * 1e6
        times = f"{one.seconds:>9.1f} {per_million:>12.2f} {one.cpu_seconds:>9.1f}"
        print(f"{rows:>12,} {times} {one.peak_gb:>8.2f} {one.kept:>10,}", flush=True)
    table = rows_of(measured)
    print(f"time of the last against time in line with the first: {table[-1]['ratio']:.2f}")
    if options.plot:
        options.plot.write_text(drawn(measured), encoding="utf-8")
    if options.json:
        options.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return table


def rows_of(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """What `--json` has: memory against the limit, and seconds a million rows of the largest pool and the smallest."""
    table = [
        {"work": f"peak memory, {one.rows:,} rows", "ours": one.peak_gb, "peer": LIMIT_GB, "unit": "GB"}
        | {"ratio": LIMIT_GB / one.peak_gb}
        for one in measured
    ]
    first, last = measured[0], measured[-1]
    ours, peer = (one.seconds / one.rows * 1e6 for one in (last, first))
    work = f"time, {last.rows:,} rows against {first.rows:,}"
    return [*table, {"work": work, "ours": ours, "peer": peer, "unit": "s / million rows", "ratio": peer / ours}]


def pool_of(work: Path, rows: int, hashes: bool = False, width: int = 0) -> Path:
    """A pool of so many rows, drawn if it is not there yet."""
    from tests.data.filters.datacomp_pool import write_pool

    folder = work / f"pool-{rows}{'-hashes' if hashes else ''}{f'-{width}' if width else ''}"
    if not (folder / "whole").exists():
        shutil.rmtree(folder, ignore_errors=True)
        files = -(-rows // _ROWS_PER_FILE)
        write_pool(folder, rows, files=files, edges=False, hashes=hashes, width=width, names=("b32_img",))
        (folder / "whole").touch()
    return folder


def run(pool: Path, work: Path, rows: int, workers: int, filters: str = TREE) -> Measured:
    """Filter a pool, with nothing kept from before.

    Args:
        pool: folder of metadata.
        work: folder for config, log and outputs.
        rows: of the pool.
        workers: processes of the stage.
        filters: a tree as YAML.

    Raises:
        SystemExit: the stage failed; what it said is in `stage.log`.
    """
    output = work / "output"
    for left_over in (output, work / "output.cache"):
        shutil.rmtree(left_over, ignore_errors=True)
    config = work / "filter.yaml"
    tree = yaml.safe_load(filters)
    settings = {"pool": str(pool), "filters": tree if isinstance(tree, dict) else {tree: None}}
    settings |= {"alone": False, "max_unreadable": 0.1, "num_workers": workers}
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    code = "from mmfoundry.launch.cli import main; main()"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    began, cpu_before = time.perf_counter(), _cpu_of_children()
    with open(work / "stage.log", "wb") as log:
        command = [sys.executable, "-c", code, "filter", str(config), f"output={output}"]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        peak = PeakMemory(process.pid)
        failed = process.wait()
    seconds, cpu_seconds = time.perf_counter() - began, _cpu_of_children() - cpu_before
    peak_bytes = peak.stop()
    if failed:
        raise SystemExit(f"the stage ended with {failed}; see {work / 'stage.log'}")
    kept = json.loads((output / "funnel.json").read_text(encoding="utf-8"))["kept"]
    for made in (output, work / "output.cache"):
        shutil.rmtree(made)
    return Measured(rows, seconds, cpu_seconds, peak_bytes / 1e9, kept)


def _cpu_of_children() -> float:
    """Seconds of all cores, user and system, of the processes below this one that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class PeakMemory:
    """The most that a process and all below it held at one time."""

    def __init__(self, process: int):
        self._root, self._peak = psutil.Process(process), 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            self._peak = max(self._peak, held_by(self._root))

    def stop(self) -> int:
        """Bytes."""
        self._over.set()
        self._thread.join()
        return self._peak


def held_by(root: psutil.Process) -> int:
    """Bytes that a process and all below it hold now; a page that several share counts once."""
    total = 0
    try:
        processes = [root, *root.children(recursive=True)]
    except psutil.Error:
        return 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:  # it has just ended
            continue
    return total


def drawn(measured: Sequence[Measured]) -> str:
    """Seconds and memory over rows, as an SVG that reads on light and dark pages."""
    panels = [
        _panel(0, "seconds", [(one.rows / 1e6, one.seconds) for one in measured], None),
        _panel(360, "peak memory, GB", [(one.rows / 1e6, one.peak_gb) for one in measured], LIMIT_GB),
    ]
    style = "font: 12px system-ui, sans-serif; fill: #77858b"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 240" style="{style}">'
    return "\n".join([head, *panels, "</svg>\n"])


def _panel(left: int, title: str, points: Sequence[tuple[float, float]], limit: float | None) -> str:
    x_top = points[-1][0]
    in_line = points[0][1] / points[0][0] * x_top  # at the right end, if time grew as the rows do
    y_top = 1.15 * max(limit or in_line, *(y for _, y in points))

    def at(x: float, y: float) -> tuple[float, float]:
        return round(left + 50 + 280 * x / x_top, 1), round(200 - 160 * y / y_top, 1)

    parts = [f'<text x="{left + 50}" y="22" font-weight="600">{title}</text>']
    for x, y in points:
        px, py = at(x, y)
        parts.append(f'<circle cx="{px}" cy="{py}" r="4" fill="#0e7c6b"/>')
        parts.append(
            f'<text x="{px}" y="{py - 9}" text-anchor="middle">{y:.2g}</text>'
            if y < 1
            else f'<text x="{px}" y="{py - 9}" text-anchor="middle">{y:.0f}</text>'
        )
        parts.append(f'<text x="{px}" y="218" text-anchor="middle">{x:g}M</text>')
    line = " ".join("{},{}".format(*at(x, y)) for x, y in [(0.0, 0.0) if limit is None else points[0], *points])
    parts.append(f'<polyline points="{line}" fill="none" stroke="#0e7c6b" stroke-width="1.8"/>')
    parts.append(f'<line x1="{left + 50}" x2="{left + 340}" y1="200" y2="200" stroke="#77858b"/>')
    ends = (at(0, limit), at(x_top, limit)) if limit else (at(0, 0), at(x_top, in_line))
    (x1, y1), (x2, y2) = ends
    said = "limit" if limit else "in line with the first"
    parts.append(f'<path d="M{x1} {y1}L{x2} {y2}" stroke="#c2571a" stroke-dasharray="4 4" fill="none"/>')
    parts.append(f'<text x="{left + 60}" y="46" fill="#c2571a">- - {said}</text>')
    return "\n".join(parts)


if __name__ == "__main__":
    main()
