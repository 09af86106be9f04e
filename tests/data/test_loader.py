"""The loader: one order for any ranks, workers and batches; exact resume; bad samples replaced, counted, capped."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmfoundry.data import Loader, Pool, Sample, Source, UnreadableSample, write_shards
from mmfoundry.data.inspect import iter_keys
from mmfoundry.data.loader import stack
from mmfoundry.pipeline.errors import ConfigError, TooManyUnreadable
from tests.data.golden_batches import digest

Make = Callable[..., list[Path]]
# of the first release's order, crops, captions and redraws; another one changes what every seed means
GOLDEN = "bfcecc88efdceff330ebb0a57c5e61a879bcd36e7aa988b0bf5026dfba0b3bbc"


def _encode(sample: Sample, rng: np.random.Generator) -> dict:
    return {"key": sample.key, "image": sample.image[:4, :4], "draw": int(rng.integers(2**60)), "text": sample.text[0]}


def _read(loader: Loader, steps: int) -> list[tuple[str, int]]:
    """(key, first draw) of the samples of the next steps of one rank."""
    batches = iter(loader)
    rows = [row for _, batch in zip(range(steps), batches, strict=False) for row in _rows(batch)]
    batches.close()  # type: ignore[attr-defined]
    return rows


def _rows(batch: dict) -> list[tuple[str, int]]:
    return list(zip(batch["key"], batch["draw"].tolist(), strict=True))


def _steps(sources: list[Source], world: int, steps: int, state: dict | None, **options: object) -> tuple[list, dict]:
    """All ranks' samples of the next steps, in the global order, and the state after them."""
    parts, after = [], {}
    for rank in range(world):
        loader = Loader(sources, encode=_encode, rank=rank, world_size=world, **options)  # type: ignore[arg-type]
        if state is not None:
            loader.load_state_dict(state)
        parts.append(_read(loader, steps))
        after = loader.state_dict()
    # ranks take turns within a step and a step is whole before the next one starts, so turns run through
    return [part[place] for place in range(len(parts[0])) for part in parts], after


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    from PIL import Image

    from mmfoundry.data.shards import write_shards

    def rows(name: str, count: int) -> list[dict]:
        import io

        out = []
        for number in range(count):
            data = io.BytesIO()
            Image.new("RGB", (4, 4), (number, 0, 0)).save(data, "PNG")
            out.append({"__key__": f"{name}{number:03d}", "png": data.getvalue(), "txt": f"{name} {number}"})
        return out

    folder = tmp_path_factory.mktemp("sources")
    pools = [
        Pool(write_shards(rows(name, count), folder / name, max_count=20)) for name, count in [("a", 37), ("b", 53)]
    ]
    return [Source(pools[0], 1.0), Source(pools[1], 2.0)]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    worlds=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    workers=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    each=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    stop=st.integers(0, 6),
    seed=st.integers(0, 5),
)
def test_a_run_cut_off_and_taken_up_elsewhere_reads_one_order(
    sources: list[Source],
    worlds: tuple[int, int],
    workers: tuple[int, int],
    each: tuple[int, int],
    stop: int,
    seed: int,
) -> None:
    first_batch, second_batch = (number * world for number, world in zip(each, worlds, strict=True))
    before, state = _steps(
        sources, worlds[0], stop, None, seed=seed, batch_size=first_batch, num_workers=workers[0], prefetch=2
    )
    assert state["samples_consumed"] == len(before) == stop * first_batch
    state = json.loads(json.dumps(state))
    more = 1 + (400 - len(before)) // second_batch
    after, state = _steps(
        sources, worlds[1], more, state, seed=seed, batch_size=second_batch, num_workers=workers[1], prefetch=1
    )
    both = before + after
    assert state["samples_consumed"] == len(both)
    whole = Loader(sources, batch_size=1, encode=_encode, seed=seed, num_workers=0)
    assert both == _read(whole, len(both))
    # the first two epochs of source b, whose share is exact, hold each key as often as the other
    keys = [key for key, _ in both if key.startswith("b")]
    counts = [keys[:106].count(f"b{number:03d}") for number in range(53)]
    assert counts == [2] * 53


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_what_was_read_ahead_is_not_consumed(sources: list[Source], workers: int) -> None:
    loader = Loader(sources, batch_size=8, encode=_encode, num_workers=workers, prefetch=3)
    batches = iter(loader)
    seen = []
    for step in range(1, 6):
        seen += _rows(next(batches))
        assert loader.state_dict()["samples_consumed"] == loader.samples_consumed == 8 * step
        assert loader.tally.drawn == 8 * step
    batches.close()  # type: ignore[attr-defined]
    seen += _read(loader, 2)  # a new iterator goes on where the last one was left
    assert seen == _read(Loader(sources, batch_size=8, encode=_encode, num_workers=0), 7)


def test_batches_are_tensors_of_their_own_types(sources: list[Source]) -> None:
    batch = next(iter(Loader(sources, batch_size=6, encode=_encode, num_workers=0)))
    assert batch["image"].shape == (6, 4, 4, 3)
    assert batch["image"].dtype == torch.uint8
    assert batch["draw"].dtype == torch.int64
    assert len(batch["text"]) == 6
    both = stack([{"a": torch.ones(2), "b": 1.5, "c": True}] * 3)
    assert both["a"].shape == (3, 2)
    assert both["b"].dtype == torch.float64
    assert both["c"].dtype == torch.bool


@pytest.mark.parametrize("cache_bytes", [0, 20_000, 1 << 30])
def test_a_cache_changes_nothing_but_the_time(sources: list[Source], cache_bytes: int) -> None:
    plain = Loader(sources, batch_size=10, encode=_encode, num_workers=0)
    cached = Loader(sources, batch_size=10, encode=_encode, num_workers=2, cache_bytes=cache_bytes)
    pairs = zip(plain, cached, strict=False)
    for _, (one, two) in zip(range(25), pairs, strict=False):
        assert one["key"] == two["key"]
        assert torch.equal(one["image"], two["image"])


def test_a_saved_position_of_other_data_is_refused(sources: list[Source], make_shards: Make) -> None:
    def load(state: dict, **options: object) -> None:
        settings = {"batch_size": 4, "encode": _encode, "seed": 1} | options
        Loader(settings.pop("sources", sources), **settings).load_state_dict(state)  # type: ignore[arg-type]

    state = Loader(sources, batch_size=4, encode=_encode, seed=1).state_dict()
    load(state, batch_size=6)
    with pytest.raises(ConfigError, match="seed 1, now 2"):
        load(state, seed=2)
    with pytest.raises(ConfigError, match="sources"):
        load(state, sources=[Source(make_shards(5))])
    with pytest.raises(ConfigError, match="sources"):
        load(state, sources=[Source(sources[0].shards, 2.0), Source(sources[1].shards, 2.0)])
    with pytest.raises(ConfigError, match="shares weights, now upsampling"):
        load(state, sources=[Source(source.shards, upsampling=1) for source in sources])


def test_an_uneven_share_is_refused(sources: list[Source]) -> None:
    with pytest.raises(ConfigError, match="10 samples cannot be shared evenly by 3 ranks"):
        Loader(sources, batch_size=10, encode=_encode, rank=0, world_size=3)
    with pytest.raises(ConfigError, match="num_workers"):
        Loader(sources, batch_size=10, encode=_encode, num_workers=-1)


def _with_bad(folder: Path, count: int, bad: dict[int, dict[str, bytes]], make: Make) -> Path:
    from mmfoundry.data.reader import Pool

    pool = Pool(make(count))
    rows = []
    for number in range(count):
        raw = pool.get(number)
        members = bad.get(number, raw.members)
        rows.append({"__key__": raw.key, **members})
    write_shards(rows, folder, max_count=50)
    return folder


BAD = {
    3: {"png": b"\x89PNG\r\n\x1a\nnot really", "txt": b"x"},
    11: {"txt": b"no picture"},
    40: {"png": b"", "txt": b"x", "json": b"{}"},
    41: {"json": b"{broken", "txt": b"x"},
}


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_replaced_by_one_rule(make_shards: Make, tmp_path: Path, world: int, workers: int) -> None:
    folder = _with_bad(tmp_path / "bad", 100, BAD, make_shards)
    log = tmp_path / "run" / "skipped.jsonl"
    options = {"batch_size": 20, "seed": 4, "max_unreadable": 0.5}
    alone, _ = _steps([Source(folder)], 1, 10, None, num_workers=0, **options)
    found, _ = _steps([Source(folder)], world, 10, None, num_workers=workers, skip_log=log, **options)
    assert found == alone
    bad = {f"{number:06d}" for number in BAD}
    assert not bad & {key for key, _ in found}
    intended = list(iter_keys(folder, seed=4, count=200))
    assert [key for key in intended if key not in bad] == [
        key for key, meant in zip([key for key, _ in found], intended, strict=True) if meant not in bad
    ]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {(line["key"], line["reason"]) for line in lines} == {
        ("000003", "damaged image"),
        ("000011", "no image"),
        ("000040", "empty image"),
        ("000041", "no image"),
    }
    first = {line["position"]: line["key"] for line in reversed(lines)}  # a replacement may be bad as well
    assert first == {position: key for position, key in enumerate(intended) if key in bad}


def test_skips_are_counted_by_source_and_reason(make_shards: Make, tmp_path: Path) -> None:
    folder = _with_bad(tmp_path / "bad", 100, BAD, make_shards)
    loader = Loader([Source(Pool(folder, name="web"))], batch_size=50, encode=_encode, max_unreadable=0.5)
    _read(loader, 2)
    metrics = loader.tally.as_metrics()
    assert metrics["drawn"] == 100 + metrics["skipped"]
    assert metrics["skipped/web/no image"] >= 2
    assert metrics["skipped"] == sum(value for name, value in metrics.items() if name.startswith("skipped/"))


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_samples_stop_the_run_in_one_line(make_shards: Make, tmp_path: Path, workers: int) -> None:
    folder = _with_bad(tmp_path / "bad", 30, {number: {"png": b"junk"} for number in range(0, 30, 2)}, make_shards)
    log = tmp_path / "skipped.jsonl"
    loader = Loader([Source(folder)], batch_size=10, encode=_encode, num_workers=workers, skip_log=log)
    with pytest.raises(TooManyUnreadable) as caught:
        _read(loader, 100)
    text = str(caught.value)
    assert "\n" not in text
    assert "11 of" in text  # 1% of the first 1,000 allows 10
    assert "11 x unknown image format" in text
    assert str(log) in text
    assert len(log.read_text().splitlines()) == 11


def test_a_source_without_one_good_sample_ends(make_shards: Make, tmp_path: Path) -> None:
    folder = _with_bad(tmp_path / "bad", 10, {number: {"png": b"junk"} for number in range(10)}, make_shards)
    with pytest.raises(TooManyUnreadable, match="unknown image format"):
        next(iter(Loader([Source(folder)], batch_size=10, encode=_encode, max_unreadable=1.0)))


def test_no_tolerance_means_none(make_shards: Make, tmp_path: Path) -> None:
    folder = _with_bad(tmp_path / "bad", 50, {7: {"png": b"junk"}}, make_shards)
    with pytest.raises(TooManyUnreadable, match="1 of"):
        _read(Loader([Source(folder)], batch_size=50, encode=_encode, max_unreadable=0), 2)


def test_what_encode_refuses_is_replaced_and_what_breaks_it_names_the_sample(sources: list[Source]) -> None:
    def picky(sample: Sample, rng: np.random.Generator) -> dict:
        if sample.key.endswith("7"):
            raise UnreadableSample("ends in 7")
        if sample.key == "a018":
            raise ZeroDivisionError("a bug")
        return _encode(sample, rng)

    loader = Loader(sources, batch_size=10, encode=picky, max_unreadable=1.0, num_workers=2)
    with pytest.raises(ZeroDivisionError) as caught:
        _read(loader, 100)
    assert "while encoding sample a018" in caught.value.__notes__[0]
    assert {reason for _, reason in loader.tally.counts} == {"ends in 7"}


def test_damage_that_the_index_found_is_logged_and_capped(make_shards: Make, tmp_path: Path) -> None:
    shards = make_shards(60, per_shard=30)
    shards[1].write_bytes(shards[1].read_bytes()[:20_000])
    log = tmp_path / "skipped.jsonl"
    with pytest.raises(TooManyUnreadable, match="gone since indexed"):
        Loader([Source(shards)], batch_size=4, encode=_encode, skip_log=log)
    assert {json.loads(line)["reason"] for line in log.read_text().splitlines()} >= {"gone since indexed"}
    loader = Loader([Source(shards)], batch_size=4, encode=_encode, max_unreadable=0.1, rank=1, world_size=2)
    assert loader.damage.skipped + len(loader.pools[0]) >= 60
    assert len(_read(loader, 30)) == 60


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_shard_raises_nothing_else(make_shards: Make, seed: int) -> None:
    shards = make_shards(24, per_shard=12)
    noise = np.random.default_rng(seed)
    data = np.frombuffer(shards[0].read_bytes(), np.uint8).copy()
    for _ in range(20):
        at = int(noise.integers(len(data)))
        data[at : at + int(noise.integers(1, 600))] = noise.integers(256)
    shards[0].write_bytes(data.tobytes()[: int(noise.integers(len(data) // 2, len(data)))])
    unhurt = {f"{number:06d}" for number in range(12, 24)}
    loader = Loader([Source(shards)], batch_size=8, encode=_encode, max_unreadable=1.0)
    keys = {key for key, _ in _read(loader, math.ceil(2 * 24 / 8))}
    assert unhurt <= keys


def test_the_cap_does_not_wait_for_a_batch_of_bad_samples(make_shards: Make, tmp_path: Path) -> None:
    folder = _with_bad(tmp_path / "bad", 10, {number: {"png": b"junk"} for number in range(10)}, make_shards)
    loader = Loader([Source(folder)], batch_size=1000, encode=_encode, num_workers=1)
    with pytest.raises(TooManyUnreadable):
        next(iter(loader))
    assert loader.tally.drawn == 11


def test_importing_the_package_stays_light() -> None:
    import subprocess
    import sys

    code = "import sys, mmfoundry.data; assert not {'torch', 'PIL', 'numpy'} & set(sys.modules), 'heavy'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_run_that_is_taken_up_logs_each_skip_once(make_shards: Make, tmp_path: Path) -> None:
    """Steps that were made after the last checkpoint, or before the first, are made again."""
    folder = _with_bad(tmp_path / "bad", 100, BAD, make_shards)

    def loader(log: Path, batch: int = 20) -> Loader:
        pools = [Source(Pool(folder, name="web"))]
        return Loader(pools, batch_size=batch, encode=_encode, seed=4, max_unreadable=0.5, skip_log=log)

    whole, log = tmp_path / "whole.jsonl", tmp_path / "skipped.jsonl"
    _read(loader(whole), 12)
    _read(loader(log), 3)  # cut off before a checkpoint
    before = loader(log)
    _read(before, 4)
    state = before.state_dict()
    _read(before, 3)  # cut off after it
    after = loader(log, batch=40)
    after.load_state_dict(state)
    _read(after, 4)
    assert log.read_bytes() == whole.read_bytes()
    assert log.stat().st_size


def test_what_was_skipped_before_a_resume_still_counts(make_shards: Make, tmp_path: Path) -> None:
    folder = _with_bad(tmp_path / "bad", 100, BAD, make_shards)

    def loader() -> Loader:
        return Loader([Source(Pool(folder, name="web"))], batch_size=20, encode=_encode, seed=4, max_unreadable=0.5)

    whole = loader()
    _read(whole, 10)
    before = loader()
    _read(before, 4)
    after = loader()
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert after.counters() == before.counters()
    _read(after, 6)
    assert after.counters() == whole.counters()
    assert whole.counters()["skipped"] == whole.tally.skipped > before.tally.skipped


def test_upsampling_is_given_to_all_sources_or_none(sources: list[Source]) -> None:
    pools = [source.shards for source in sources]
    loader = Loader(
        [Source(pools[0], upsampling=2), Source(pools[1], upsampling=1)], batch_size=127, encode=_encode, epochs=1
    )
    (batch,) = loader
    counts = [batch["key"].count(key) for key in sorted(set(batch["key"]))]
    assert counts == [2] * 37 + [1] * 53
    with pytest.raises(ConfigError, match="either all sources have upsampling or none"):
        Loader([Source(pools[0], upsampling=2), Source(pools[1])], batch_size=1, encode=_encode)


def test_the_window_of_a_large_source_is_part_of_its_order(make_shards: Make) -> None:
    pool = Pool(make_shards(520, per_shard=520))

    def loader(window: int) -> Loader:
        return Loader([Source(pool)], batch_size=520, encode=_encode, window=window, epochs=1)

    whole, windows = loader(1000), loader(256)
    orders = [[key for batch in each for key in batch["key"]] for each in (whole, windows)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])
    with pytest.raises(ConfigError, match="another order of samples"):
        windows.load_state_dict(whole.state_dict())


@pytest.mark.parametrize("options", [{"num_workers": 0}, {"num_workers": 2}, {"num_workers": 2, "workers": "process"}])
def test_order_pixels_and_tokens_are_what_they_were(options: dict) -> None:
    assert digest(**options) == GOLDEN
