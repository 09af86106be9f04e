"""MetaCLIP's balancing against a straightforward version of its rules, with the same draws."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmfoundry.data.entry_matching import EntryMatcher
from mmfoundry.data.filters.metaclip import MetaClip, MetaClipWorldwide, p_to_t, t_to_p
from mmfoundry.data.uids import uniform
from mmfoundry.pipeline.errors import MissingInput, MmfoundryError
from tests.data.filters.cutting import assert_cuts_do_not_matter, keep_in_parts
from tests.data.filters.rows import table, uid

WORDS = ["dog", "red", "red dog", "Dog", "a", "dog,", ",", "a.b", "b", "hot dog stand", "größe", "犬", "小犬"]
TEXTS = st.lists(
    st.sampled_from([*WORDS, "doghouse", "hot", "stand", "\t", "\n", " ", "!", "", "\x00", "大小犬", "🐕", "שלום"]),
    max_size=7,
).map(" ".join)


def spaced(text: str) -> str:
    """A text as MetaCLIP matches it, mark by mark."""
    text = f" {text} "
    for mark in [",", ".", ";", ":", "?", "!", "`"]:
        text = text.replace(mark, f" {mark} ")
    for space in ["\t", "\n", "\r"]:
        text = text.replace(space, " ")
    return text


def plain_matches(text: str, entries: list[str], unspaced: frozenset[str] = frozenset()) -> list[int]:
    """One `in` after the other."""
    wrapped = []
    for entry in entries:
        before = "" if entry[0] in unspaced else " "
        wrapped.append(before + entry + ("" if entry[-1] in unspaced else " "))
    return [number for number, entry in enumerate(wrapped) if entry in spaced(text)]


def key_of(entry: str) -> int:
    import hashlib

    return int.from_bytes(hashlib.blake2b(entry.encode(), digest_size=8).digest(), "little")


def draw(*numbers: int, seed: int) -> float:
    return float(uniform(*(np.array([number]) for number in numbers), seed=seed)[0])


def plain_metaclip(rows: pl.DataFrame, entries: list[str], t: int, seed: int) -> list[bool | None]:
    """Algorithm 1, row by row: match, count, then a draw for each entry in a caption."""
    matched = [None if text is None else plain_matches(text, entries) for text in rows["caption"]]
    counts = Counter(entry for found in matched if found is not None for entry in found)
    verdicts: list[bool | None] = []
    for row, found in zip(rows.to_dicts(), matched, strict=True):
        high, low = int(row["uid"][:16], 16), int(row["uid"][16:], 16)
        verdicts.append(
            None
            if found is None
            else any(
                draw(high, low, row["caption_index"], key_of(entries[entry]), seed=seed) < t / max(counts[entry], t)
                for entry in found
            )
        )
    return verdicts


@st.composite
def pools(draw: st.DrawFn, languages: tuple[str | None, ...] = ("en",)) -> pl.DataFrame:
    rows: list[dict[str, object]] = []
    for number in range(draw(st.integers(0, 20))):
        place = {"uid": uid(draw(st.integers(0, 2**128 - 1))), "shard": number % 3, "index": number}
        texts = draw(st.lists(TEXTS, max_size=3))
        for i, text in enumerate(texts):
            rows.append(place | {"caption_index": i, "caption": text, "language": draw(st.sampled_from(languages))})
        if not texts:
            rows.append(place | {"caption_index": None})
    return table(*rows)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("entries") / "metadata.json"
    path.write_text(json.dumps(WORDS), "utf-8")
    return path


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_one_pass_finds_what_looking_for_each_entry_finds(text: str) -> None:
    assert EntryMatcher(WORDS).matches(pl.Series([text, None], dtype=pl.String)).to_list() == [
        plain_matches(text, WORDS),
        None,
    ]
    unspaced = frozenset("犬小,")
    found = EntryMatcher(WORDS, unspaced_scripts=True).matches(pl.Series([text]))[0].to_list()
    assert found == plain_matches(text, WORDS, unspaced)


def test_a_megabyte_is_one_caption() -> None:
    text = "hot dog stand " * 75_000
    assert EntryMatcher(WORDS).matches(pl.Series([text]))[0].to_list() == plain_matches(text, WORDS)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.integers(1, 6), st.integers(0, 3))
def test_kept_pairs_are_those_of_the_plain_version(words: Path, data: st.DataObject, t: int, seed: int) -> None:
    rows = data.draw(pools())
    found = assert_cuts_do_not_matter(MetaClip(entries=words, t=t, seed=seed), rows, data)
    assert found == plain_metaclip(rows, WORDS, t, seed)


def test_a_head_entry_keeps_about_t_captions(words: Path) -> None:
    rng = np.random.default_rng(0)
    rows = table(*({"uid": uid(int(n)), "caption": "a dog" if n % 2 else "b"} for n in rng.integers(0, 2**62, 6000)))
    dogs = rows["caption"] == "a dog"
    kept = {seed: MetaClip(entries=words, t=300, seed=seed).keep(rows) for seed in (0, 1)}
    # "a" and "dog" are drawn apart: 1 - (1 - p)^2 of the captions, p about 0.1; four standard deviations
    p = 300 / int(dogs.sum())
    expected = int(dogs.sum()) * (1 - (1 - p) ** 2)
    for keep in kept.values():
        assert abs(int((keep & dogs).sum()) - expected) < 4 * expected**0.5
        assert abs(int((keep & ~dogs).sum()) - 300) < 4 * 300**0.5
    assert (kept[0] & kept[1]).sum() < 0.4 * kept[0].sum(), "another seed, other draws"


def test_a_draw_does_not_depend_on_the_other_entries_of_the_list(tmp_path: Path) -> None:
    rows = table(*({"uid": uid(n * 2**40), "caption": "dog"} for n in range(200)))
    verdicts = []
    for name, entries in (("one", ["dog"]), ("more", ["cat", "hen", "dog"])):
        path = tmp_path / f"{name}.txt"
        path.write_text("\n".join(entries))
        verdicts.append(MetaClip(entries=path, t=50).keep(rows).to_list())
    assert verdicts[0] == verdicts[1]
    assert 20 < sum(map(bool, verdicts[0])) < 90


def test_a_changed_list_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("dog")
    rows = table({"caption": "cat"})
    assert MetaClip(entries=path).keep(rows).to_list() == [False]
    path.write_text("cat")
    assert MetaClip(entries=path).keep(rows).to_list() == [True]
    with pytest.raises(MissingInput, match="none"):
        MetaClip(entries=tmp_path / "none.txt").keep(rows)


LISTS = {"en": ["dog", "red", "a", "red dog"], "ja": ["犬", "小犬", "a"], "other": ["dog", "b"]}
UNSPACED = frozenset("犬小")


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lists")
    for name, entries in LISTS.items():
        (folder / f"{name}.json").write_text(json.dumps(entries), "utf-8")
    return folder


def plain_worldwide(rows: pl.DataFrame, t: int, seed: int) -> list[bool | None]:
    """MetaCLIP 2, sample by sample."""
    listed = [{"en": "en", "jp": "ja"}.get(language or "", "other") for language in rows["language"]]
    matched = [
        [] if text is None else plain_matches(text.strip(), LISTS[name], UNSPACED)
        for text, name in zip(rows["caption"], listed, strict=True)
    ]
    counts = {name: np.zeros(len(entries), np.int64) for name, entries in LISTS.items()}
    for name, found in zip(listed, matched, strict=True):
        counts[name][found] += 1
    thresholds = {"en": t}
    for name in ("ja", "other"):
        if counts[name].sum():
            thresholds[name] = p_to_t(counts[name], t_to_p(counts["en"], t))
    samples: dict[tuple[str, int, int], list[int]] = {}
    for number, row in enumerate(rows.to_dicts()):
        samples.setdefault((row["uid"], row["shard"], row["index"]), []).append(number)
    kept = set()
    for (one, _, _), numbers in samples.items():
        high, low = int(one[:16], 16), int(one[16:], 16)
        candidates = [number for number in numbers if matched[number]]
        if not candidates:
            continue
        drawn = min(candidates, key=lambda number: draw(high, low, rows["caption_index"][number], seed=seed))
        name = listed[drawn]
        missed = 1.0
        for entry in matched[drawn]:
            missed *= 1.0 - thresholds[name] / max(counts[name][entry], thresholds[name])
        if draw(high, low, seed=seed) <= 1.0 - missed:
            kept.add(drawn)
    return [None if text is None else number in kept for number, text in enumerate(rows["caption"])]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.integers(1, 5), st.integers(0, 3))
def test_worldwide_pairs_are_those_of_the_plain_version(lists: Path, data: st.DataObject, t: int, seed: int) -> None:
    rows = data.draw(pools(languages=("en", "en", "jp", "de", None)))
    rows = pl.concat([rows, table({"uid": uid(7), "index": 999, "caption": "a red dog", "language": "en"})])
    one = MetaClipWorldwide(entries=lists, t=t, seed=seed, lists={"jp": "ja"})
    assert assert_cuts_do_not_matter(one, rows, data) == plain_worldwide(rows, t, seed)


def test_p_and_t_are_each_others_inverse_where_they_can_be() -> None:
    counts = np.array([5, 1, 100, 2, 2])
    assert t_to_p(counts, 5) == 5 / 110
    assert t_to_p(counts, 6) == 10 / 110
    assert p_to_t(counts, 5 / 110) == 2
    assert p_to_t(counts, 10 / 110) == 5
    assert p_to_t(counts, 1.0) == 100
    assert p_to_t(np.array([0, 3]), 0.0) == 0


def test_without_a_caption_in_the_language_of_t_nothing_follows(lists: Path) -> None:
    rows = table({"caption": "小犬", "language": "ja"})
    with pytest.raises(MmfoundryError, match="'en'"):
        MetaClipWorldwide(entries=lists).keep(rows)
    assert MetaClipWorldwide(entries=lists, language="ja").keep(rows).to_list() == [True]
    assert keep_in_parts(MetaClipWorldwide(entries=lists), [rows.clear()]).to_list() == []


def test_only_the_second_version_strips_all_white_space(lists: Path, words: Path) -> None:
    rows = table({"caption": "\u3000dog\u3000", "language": "en"})
    assert MetaClipWorldwide(entries=lists).keep(rows).to_list() == [True]
    assert MetaClip(entries=words).keep(rows).to_list() == [False]
