"""MetaCLIP's balancing: what many captions speak of is thinned, what few speak of is kept."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import polars as pl
from pydantic import Field

from mmfoundry.data.entry_matching import EntryMatcher
from mmfoundry.data.filters.base import FILTERS, PoolFilter
from mmfoundry.data.metadata_list import build_entries, read_entries, wordnet_files
from mmfoundry.data.uids import high_low, uniform
from mmfoundry.pipeline.errors import ConfigError, MissingInput, MmfoundryError

WORDNET = "wordnet"
_OTHER = "other"  # MetaCLIP 2's list for languages that have none


@FILTERS.register("metaclip")
class MetaClip(PoolFilter):
    """Balances captions by the entries of a list that stand in them; a caption in which none stands is dropped.

    MetaCLIP (Xu et al. 2023, arXiv 2309.16671, algorithm 1): an entry that stands in `count` captions of the pool is
    drawn for each of them with probability t / max(count, t); a pair is kept if one of its entries is. Draws follow
    from seed, uid, number of the caption and the entry's text alone. `t` is 20,000 for 400M pairs of 1.6G that match,
    and 170,000 for 2.5G; it goes with the size of the pool.
    """

    entries: Path = Field(
        Path(WORDNET), description="the list: .json (MetaCLIP's) or text, one a line; wordnet: made of WordNet's names"
    )
    t: int = Field(20_000, ge=1, description="captions from which an entry is thinned")
    seed: int = Field(0, ge=0, description="of the draws")

    def columns(self) -> frozenset[str]:
        """The captions."""
        return frozenset({"caption", "caption_index"})

    def files(self) -> tuple[Path, ...]:
        """The list, or WordNet's."""
        return wordnet_files() if self.entries == Path(WORDNET) else (self.entries,)

    def partial(self, table: pl.DataFrame, states: Sequence[pl.DataFrame]) -> pl.DataFrame:
        """The entries in each caption, as numbers in the list."""
        return _matcher(*_version(self.entries), False).matches(table["caption"]).to_frame()

    def merge(self, partials: Sequence[pl.LazyFrame], states: Sequence[pl.DataFrame]) -> pl.DataFrame:
        """The entries that are thinned: "entry", "count", "probability", and "key" for the draws."""
        texts = _entries(*_version(self.entries))
        counts = _counted(partials, len(texts))
        return _thinned(counts, np.full(len(counts), self.t), texts)

    def judge(self, table: pl.DataFrame, states: Sequence[pl.DataFrame], partials: Sequence[pl.DataFrame]) -> pl.Series:
        """True where one of the entries is drawn; null without a caption."""
        rows = table.select(*high_low(), "caption_index", row=pl.int_range(pl.len(), dtype=pl.UInt32))
        matches = partials[0].select("entries").with_row_index("row").explode("entries").drop_nulls()
        matches = matches.join(states[0].rename({"entry": "entries"}), on="entries", how="left")
        sure = matches.filter(pl.col("probability").is_null())["row"]
        drawn = matches.drop_nulls("probability").join(rows, on="row", maintain_order="left")
        draws = uniform(*_numbers(drawn, "high", "low", "caption_index", "key"), seed=self.seed)
        kept = drawn["row"].filter(pl.Series(draws < drawn["probability"].to_numpy()))
        verdict = pl.Series("keep", [False]).new_from_index(0, table.height)
        verdict = verdict.scatter(pl.concat([sure, kept]).unique(), True)
        return pl.select(keep=pl.when(table["caption"].is_not_null()).then(verdict)).to_series()


@FILTERS.register("metaclip_worldwide")
class MetaClipWorldwide(PoolFilter):
    """Balances the captions of each language by its own list, and keeps at most one caption of a sample.

    MetaCLIP 2 (Chuang et al. 2025, arXiv 2507.22062): `t` belongs to one language; the share of matches that it leaves
    whole there decides the t of the others. Of a sample's captions that match, one is drawn; the sample is kept with
    probability 1 - prod(1 - p) over the entries in it. Draws follow from seed and uid alone.
    """

    entries: Path = Field(description="folder of lists, LANGUAGE.json or LANGUAGE.txt; other.* is for all others")
    t: int = Field(170_000, ge=1, description="captions of `language` from which an entry is thinned; MetaCLIP: 170000")
    language: str = Field("en", description="the language that `t` is for")
    lists: dict[str, str] = Field(
        default_factory=dict, description="language, as fastText names it -> name of its list where that is another"
    )
    seed: int = Field(0, ge=0, description="of the draws")

    def columns(self) -> frozenset[str]:
        """Captions, their language, and which sample they belong to."""
        return frozenset({"caption", "caption_index", "language", "shard", "index"})

    def files(self) -> tuple[Path, ...]:
        """The lists."""
        return tuple(_lists(self.entries).values())

    def partial(self, table: pl.DataFrame, states: Sequence[pl.DataFrame]) -> pl.DataFrame:
        """The entries in each caption, numbered through all lists in the order of their names."""
        lists, first = _lists(self.entries), self._first_entries()
        asked = [_OTHER if code is None else self.lists.get(code, code) for code in table["language"].to_list()]
        captions = table.select(
            "caption",
            list=pl.Series([name if name in lists else _OTHER for name in asked], dtype=pl.String),
            row=pl.int_range(pl.len(), dtype=pl.UInt32),
        )
        found = []
        for (name,), rows in captions.group_by("list"):
            if name in lists:
                texts = [None if caption is None else caption.strip() for caption in rows["caption"].to_list()]
                matcher = _matcher(*_version(lists[name]), True)
                entries = matcher.matches(pl.Series(texts, dtype=pl.String)).list.eval(pl.element() + first[name])
                found.append(rows.select("row", entries=entries))
        matched = pl.concat(found) if found else pl.DataFrame(schema={"row": pl.UInt32, "entries": pl.List(pl.UInt32)})
        return captions.select("row").join(matched, on="row", how="left", maintain_order="left").select("entries")

    def merge(self, partials: Sequence[pl.LazyFrame], states: Sequence[pl.DataFrame]) -> pl.DataFrame:
        """The entries that are thinned: "entry", "count", "probability", and "key".

        Raises:
            MmfoundryError: captions match, but none in `language`, so that nothing follows for the others.
        """
        lists, first = _lists(self.entries), self._first_entries()
        texts = [text for path in lists.values() for text in _entries(*_version(path))]
        counts = _counted(partials, len(texts))
        ends = [*first.values(), len(texts)][1:]
        spans = {name: slice(start, end) for (name, start), end in zip(first.items(), ends, strict=True)}
        own = spans.get(self.language)
        if counts.any() and (own is None or not counts[own].any()):
            raise MmfoundryError(
                f"metaclip_worldwide: no caption in {self.language!r} has an entry of {self.entries}, so the t of "
                f"other languages cannot be found; set language to one that the pool has"
            )
        thresholds = np.full(len(counts), self.t)
        if counts.any():
            share = t_to_p(counts[own], self.t)
            for name, span in spans.items():
                if name != self.language and counts[span].any():
                    thresholds[span] = p_to_t(counts[span], share)
        return _thinned(counts, thresholds, texts)

    def judge(self, table: pl.DataFrame, states: Sequence[pl.DataFrame], partials: Sequence[pl.DataFrame]) -> pl.Series:
        """True for the drawn caption of a sample that is kept; null without a caption."""
        probability = pl.col("probability").fill_null(1.0)
        by_row = (
            partials[0]
            .select("entries")
            .with_row_index("row")
            .explode("entries")
            .drop_nulls()
            .join(states[0].rename({"entry": "entries"}), on="entries", how="left", maintain_order="left")
            .group_by("row")
            .agg(probability=1.0 - (1.0 - probability).product())
        )
        rows = table.select(*high_low(), "shard", "index", "caption_index").with_row_index("row")
        rows = rows.join(by_row, on="row", maintain_order="left")  # captions in which an entry stands
        one_of = uniform(*_numbers(rows, "high", "low", "caption_index"), seed=self.seed)
        draws = uniform(*_numbers(rows, "high", "low"), seed=self.seed)
        rows = rows.with_columns(one_of=pl.Series(one_of), drawn=pl.Series(draws)).sort("one_of", "caption_index")
        first = rows.unique(["high", "low", "shard", "index"], keep="first")
        kept = first.filter(pl.col("drawn") <= pl.col("probability"))["row"]
        verdict = pl.Series("keep", [False]).new_from_index(0, table.height).scatter(kept, True)
        return pl.select(keep=pl.when(table["caption"].is_not_null()).then(verdict)).to_series()

    def _first_entries(self) -> dict[str, int]:
        """By list, the number of its first entry."""
        first, start = {}, 0
        for name, path in _lists(self.entries).items():
            first[name] = start
            start += len(_entries(*_version(path)))
        return first


def t_to_p(counts: np.ndarray, t: int) -> float:
    """The share of all matches that are of entries with fewer than t."""
    return float(counts[counts < t].sum() / counts.sum())


def p_to_t(counts: np.ndarray, p: float) -> int:
    """The count at which entries, sorted by it, have a share of all matches that is nearest to p."""
    ordered = np.sort(counts)
    return int(ordered[np.abs(np.cumsum(ordered) / ordered.sum() - p).argmin()])


def _counted(partials: Sequence[pl.LazyFrame], count: int) -> np.ndarray:
    """How many captions have each entry: int64 (count,)."""
    counts = np.zeros(count, np.int64)
    for partial in partials:
        found = partial.select(pl.col("entries").explode().drop_nulls()).collect()["entries"].to_numpy()
        counts += np.bincount(found, minlength=count)
    return counts


def _thinned(counts: np.ndarray, thresholds: np.ndarray, texts: Sequence[str]) -> pl.DataFrame:
    """The entries with a probability below 1."""
    entries = np.flatnonzero(counts > thresholds)
    chosen = [texts[entry].encode() for entry in entries.tolist()]
    keys = [int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") for text in chosen]
    return pl.DataFrame(
        {
            "entry": pl.Series(entries, dtype=pl.UInt32),
            "count": pl.Series(counts[entries], dtype=pl.UInt64),
            "probability": pl.Series(thresholds[entries] / counts[entries], dtype=pl.Float64),
            "key": pl.Series(keys, dtype=pl.UInt64),
        }
    )


def _numbers(rows: pl.DataFrame, *names: str) -> list[np.ndarray]:
    """Columns as arrays for a draw; a missing number is 0."""
    return [rows[name].cast(pl.UInt64).fill_null(0).to_numpy() for name in names]


def _lists(folder: Path) -> dict[str, Path]:
    """The lists of a folder by name, in its order."""
    if not folder.is_dir():
        raise MissingInput(f"metaclip_worldwide.entries: {folder} is not a folder of lists such as en.json")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".txt"):
            if path.stem in found:
                raise ConfigError(f"{folder}: two lists for {path.stem!r}: {found[path.stem].name} and {path.name}")
            found[path.stem] = path
    if not found:
        raise MissingInput(f"metaclip_worldwide.entries: {folder} has no list such as en.json")
    return dict(sorted(found.items()))


def _version(path: Path) -> tuple[Path, int]:
    """A list and when it was written, so that a changed one is read again."""
    try:
        return path, 0 if path == Path(WORDNET) else path.stat().st_mtime_ns
    except OSError as error:
        raise MissingInput(f"metaclip.entries: {path}: {error.strerror}") from error


@lru_cache(maxsize=512)
def _entries(path: Path, written: int) -> list[str]:
    return build_entries() if path == Path(WORDNET) else read_entries(path)


@lru_cache(maxsize=512)
def _matcher(path: Path, written: int, unspaced_scripts: bool) -> EntryMatcher:
    return EntryMatcher(_entries(path, written), unspaced_scripts)
