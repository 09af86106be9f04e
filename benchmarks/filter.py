"""What the `filter` stage gives against DataComp's baselines written plainly, on the same metadata.

    python benchmarks/filter.py [--quick] [--json PATH] [--only basic ...] [--work FOLDER] [--wordnet FOLDER]

`basic`, `text_based` and `clip_score` (top 30% by L/14) run on a drawn pool in DataComp's format, in the same number of
processes. The peer is our own plain version of what DataComp's baselines do, step by step as its apply_filter.py does
it (filter_peers/plain.py: pandas, row by row, one process a parquet file, entity ids in a list, NLTK's WordNet). Clocks
start when processes are up and have imported what they need, the peer's models and WordNet too. Both must keep the same
uids. `basic, bare fastText` holds the whole stage against nothing but fastText's inference of the captions that the
cheap rules leave, each of them; a ratio of 0.83 is what we ask of ourselves. (The stage asks about a caption once a
part, and half of the drawn ones come again.) `metaclip matching` is one pass over a caption for 500,000 entries against
looking for each of them, in one process.

A rate is rows (captions) a second; with --quick, and where a peer is too slow, it looks at the first rows of each file.
Memory is the peak of all processes of a side, shared pages counted once. WordNet is `wordnet-base` of Debian or what
NLTK downloads; without it `text_based` is left out. pandas, pyarrow and nltk are the peer's (`pip install` them).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil
import yaml
from tables import Row, faster, print_table, smaller, write_rows

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from mmfoundry.data.entry_matching import EntryMatcher, spaced_text  # noqa: E402
from mmfoundry.data.filters.subset import to_subset  # noqa: E402
from mmfoundry.data.wordnet import find_wordnet, imagenet21k_file  # noqa: E402
from mmfoundry.pipeline.errors import MissingInput  # noqa: E402
from tests.data.filters.datacomp_pool import write_pool  # noqa: E402
from tests.data.filters.nltk_wordnet import copy_for_nltk  # noqa: E402

PEERS = Path(__file__).parent / "filter_peers"
WORKS = ("basic", "text_based", "clip_score", "metaclip")


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        rows, files: of the pool.
        peer_rows: of each file that a peer looks at, by work; all where it is not named.
        captions: that are matched against the entries, by us and, entry by entry, by the peer.
        entries: to look for.
        workers: processes of each side.
    """

    rows: int
    files: int
    peer_rows: dict[str, int]
    captions: tuple[int, int]
    entries: int = 500_000
    workers: int = 2


QUICK = Effort(200_000, 4, {"basic": 10_000, "text_based": 1000}, (20_000, 20))
FULL = Effort(1_000_000, 4, {}, (100_000, 200))
TREES: dict[str, Any] = {
    "basic": {"basic": {}},
    "text_based": {"text_based": {}},
    "clip_score": {"clip_score": {"top": 0.3, "model": "l14"}},
}


@dataclass
class Measured:
    """One side in one work."""

    rows: float
    seconds: float
    memory_mb: float

    @property
    def rate(self) -> float:
        """Rows/s."""
        return self.rows / self.seconds


def run_side(command: Sequence[str | Path], environment: dict[str, str]) -> Measured:
    """Run one side to its end.

    Raises:
        SystemExit: it failed; what it said is above.
    """
    # one thread a process: "2 workers" is to mean the same on both sides
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **one, **environment, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
    )
    peak = [0.0]
    watcher = threading.Thread(target=_watch, args=(process.pid, peak), daemon=True)
    watcher.start()
    said, _ = process.communicate()
    watcher.join()
    if process.returncode != 0:
        raise SystemExit(f"{command[0]} ended with exit code {process.returncode}; what it said is above")
    answer = json.loads(said.strip().splitlines()[-1])
    return Measured(answer["rows"], answer["seconds"], peak[0])


def _watch(pid: int, peak: list[float]) -> None:
    """Follow the proportional set size of a process and those it started; MB."""
    try:
        main = psutil.Process(pid)
        while main.is_running() and main.status() != psutil.STATUS_ZOMBIE:
            total = 0
            for one in [main, *main.children(recursive=True)]:
                try:
                    total += one.memory_full_info().pss
                except psutil.Error:
                    continue
            peak[0] = max(peak[0], total / 1e6)
            time.sleep(0.2)
    except psutil.Error:
        return


def filter_rows(name: str, pool: Path, work: Path, wordnet: Path | None, effort: Effort) -> list[Row]:
    """Rows of one filter: speed and memory.

    Raises:
        SystemExit: a side failed, or the two do not keep the same.
    """
    output = work / f"filter-{name}"
    for folder in (output, output.with_name(f"{output.name}.cache")):
        shutil.rmtree(folder, ignore_errors=True)
    config = work / f"filter-{name}.yaml"
    settings = {"pool": str(pool), "filters": TREES[name], "alone": False, "tables": False, "reshard": False}
    config.write_text(yaml.safe_dump(settings))
    environment = {} if wordnet is None else {"WNSEARCHDIR": str(wordnet)}
    ours = run_side([PEERS / "stage.py", config, output, str(effort.workers)], environment)
    limit = effort.peer_rows.get(name, effort.rows)
    kept = work / f"filter-{name}.npy"
    further = [] if name != "text_based" else [str(wordnet), str(imagenet21k_file())]
    plain = [PEERS / "plain.py"]
    peer = run_side([*plain, name, pool, kept, str(effort.workers), str(limit), *further], environment)
    _expect_the_same(name, np.load(output / "subset.npy"), np.load(kept), pool, limit)
    rows = [faster(name, ours.rate, peer.rate, "rows/s")]
    rows.append(smaller(f"memory, {name}", ours.memory_mb, peer.memory_mb, "MB"))
    if name == "basic":
        bare = run_side([*plain, "bare", pool, kept, str(effort.workers), str(effort.rows)], environment)
        rows.insert(1, smaller("basic, bare fastText", ours.seconds, bare.seconds, "s"))
    return rows


def _expect_the_same(name: str, ours: np.ndarray, peer: np.ndarray, pool: Path, limit: int) -> None:
    looked_at = [pl.read_parquet(path, columns=["uid"])["uid"].head(limit) for path in sorted(pool.glob("*.parquet"))]
    both = np.intersect1d(ours, to_subset(pl.concat(looked_at)))
    if not np.array_equal(both, peer):
        raise SystemExit(f"{name}: we keep {len(both)} of the rows that the peer looked at, it keeps {len(peer)}")


def matching_rows(pool: Path, effort: Effort) -> list[Row]:
    """Rows of MetaCLIP's matching of captions with entries, in one process.

    Raises:
        SystemExit: the two sides do not find the same.
    """
    captions = pl.read_parquet(min(pool.glob("*.parquet")), columns=["text"])["text"].head(max(effort.captions))
    words = sorted(set(captions.drop_nulls().str.split(" ").explode().to_list()) - {""})
    draw = random.Random(0)
    entries = {word for word in words if "\n" not in word}
    while len(entries) < effort.entries:  # about as long as WordNet's and Wikipedia's
        entries.add(
            " ".join("".join(draw.choices("etaoinshrdlu", k=draw.randint(3, 9))) for _ in range(draw.randint(1, 2)))
        )
    names = sorted(entries)[: effort.entries]
    matcher = EntryMatcher(names)
    many, few = (captions.head(count) for count in effort.captions)
    start = time.perf_counter()
    found = matcher.matches(many)
    ours = len(many) / (time.perf_counter() - start)
    spaced = [f" {name} " for name in names]
    start = time.perf_counter()
    plain = [[number for number, name in enumerate(spaced) if name in text] for text in map(spaced_text, few)]
    peer = len(few) / (time.perf_counter() - start)
    if found.head(len(few)).to_list() != plain:
        raise SystemExit("metaclip matching: the two sides do not find the same entries")
    return [faster("metaclip matching", ours, peer, "captions/s")]


def run(only: Sequence[str], work: Path, wordnet: Path | None, effort: Effort) -> list[Row]:
    """Make the pool if it is missing, then measure.

    Args:
        only: of `WORKS`.
        work: folder for the pool and outputs, kept between runs.
        wordnet: folder with WordNet's files; None leaves `text_based` out.
        effort: how much is measured.
    Raises:
        SystemExit: a side failed, or the sides do not agree.
    """
    pool = work / f"filter-pool-{effort.rows}"
    if not pool.exists():
        making = pool.with_name(f"{pool.name}.making")
        shutil.rmtree(making, ignore_errors=True)
        write_pool(making, effort.rows, effort.files, edges=False)
        making.rename(pool)
    here = None if wordnet is None else copy_for_nltk(wordnet, work / "wordnet")
    rows = []
    for name in only:
        if name == "text_based" and here is None:
            continue
        rows += matching_rows(pool, effort) if name == "metaclip" else filter_rows(name, pool, work, here, effort)
    return rows


def main() -> None:
    """Run the rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller pool, of which slow peers see a part")
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    parser.add_argument("--only", nargs="*", choices=WORKS, default=WORKS)
    parser.add_argument("--work", type=Path, default=ROOT / ".bench", help="pool and outputs, kept (default: .bench)")
    parser.add_argument("--wordnet", type=Path, help="folder with index.noun (default: where Debian and NLTK put it)")
    arguments = parser.parse_args()
    start = time.perf_counter()
    wordnet = None
    try:
        wordnet = find_wordnet(arguments.wordnet)
    except MissingInput as error:
        print(f"text_based is left out: {error}", file=sys.stderr)
    arguments.work.mkdir(parents=True, exist_ok=True)
    rows = run(arguments.only, arguments.work.resolve(), wordnet, QUICK if arguments.quick else FULL)
    print_table(rows, width=26)
    print(f"{time.perf_counter() - start:.0f} s")
    write_rows(arguments.json, rows)


if __name__ == "__main__":
    main()
