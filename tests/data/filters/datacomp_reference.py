"""DataComp's baselines, row by row, from what its paper and its code say they do. Slow, and made to be read.

Each function returns the uids that stay, in the order of the rows. Where DataComp's code would stop with an error (a
text that is null, in every baseline that reads texts), the row is left out instead.
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

Row = dict[str, Any]
Guess = Callable[[str], str]


def read_rows(files: Sequence[Path]) -> list[Row]:
    """The rows of metadata files in turn, each with its image's L/14 embedding where there is one."""
    rows = []
    for path in files:
        some = pl.read_parquet(path).to_dicts()
        if path.with_suffix(".npz").is_file():
            for row, embedding in zip(some, np.load(path.with_suffix(".npz"))["l14_img"], strict=True):
                row["l14_img"] = embedding.astype(np.float32)
        rows += some
    return rows


def basic(rows: Sequence[Row], fasttext: Guess) -> list[str]:
    """English, more than 2 words, more than 5 characters, shorter side at least 200, aspect at most 3."""
    kept = []
    for row in rows:
        text, width, height = row["text"], row["original_width"], row["original_height"]
        if text is None or width is None or height is None:
            continue
        if min(width, height) < 200 or max(width, height) / min(width, height) > 3.0:
            continue
        if len(text.split()) > 2 and len(text) > 5 and fasttext(text.replace("\n", " ")) == "en":
            kept.append(row["uid"])
    return kept


def threshold_of(rows: Sequence[Row], key: str, fraction: float) -> np.float32:
    """The score at place int(n f) of all, the highest first, those that are not numbers last."""
    scores = [np.float32("nan") if row[key] is None else np.float32(row[key]) for row in rows]
    numbers = sorted((score for score in scores if not np.isnan(score)), reverse=True)
    place = int(len(rows) * fraction)
    if place >= len(rows):
        return np.float32("-inf")  # an index error there; here all that have a score stay
    return numbers[place] if place < len(numbers) else np.float32("nan")


def clip_score(rows: Sequence[Row], key: str, threshold: float | np.float32) -> list[str]:
    """A score of at least the threshold, in single precision; what is no number is not at least anything."""
    limit = np.float32(threshold)
    return [row["uid"] for row in rows if row[key] is not None and np.float32(row[key]) >= limit]


def laion2b(rows: Sequence[Row], cld3: Guess) -> list[str]:
    """English by CLD3, then B/32 score at least 0.28."""
    english = [row for row in rows if row["text"] is not None and cld3(row["text"].replace("\n", " ")) == "en"]
    return clip_score(english, "clip_b32_similarity_score", 0.28)


def text_based(
    rows: Sequence[Row], fasttext: Guess, synsets: Callable[[str], Sequence[int]], wanted: Collection[int]
) -> list[str]:
    """English, and the first synset of a word is wanted."""
    kept = []
    for row in rows:
        text = row["text"]
        if text is None or fasttext(text.replace("\n", " ")) != "en":
            continue
        firsts = [found[0] for word in text.split() if (found := synsets(word))]
        if any(first in wanted for first in firsts):
            kept.append(row["uid"])
    return kept


def image_based(rows: Sequence[Row], fasttext: Guess, centroids: np.ndarray, reference: np.ndarray) -> list[str]:
    """English, more than 1 token of fastText's, more than 5 characters, and the image in a cluster that is hit."""
    hit = {int(np.argmax(centroids @ embedding)) for embedding in reference}
    kept = []
    for row in rows:
        text = row["text"]
        if text is None or len(text) <= 5 or len(tokens(text)) <= 1 or fasttext(text.replace("\n", " ")) != "en":
            continue
        if int(np.argmax(centroids @ row["l14_img"])) in hit:
            kept.append(row["uid"])
    return kept


def tokens(text: str) -> list[str]:
    """fastText's `tokenize`: words between spaces, tabs, line ends and NUL; a newline is the token `</s>`."""
    found, word = [], ""
    for character in text:
        if character not in " \n\r\t\v\f\0":
            word += character
            continue
        if word:
            found.append(word)
        word = ""
        if character == "\n":
            found.append("</s>")
    return [*found, word] if word else found
