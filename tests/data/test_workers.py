"""Worker processes: the batches of threads in their order; killed ones cost nothing; what fails says what and where."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmfoundry.data import Loader, Pool, Ragged, Source
from mmfoundry.data.shards import write_shards
from mmfoundry.data.workers import WorkerDied, WorkerFailed
from mmfoundry.pipeline.errors import ConfigError, DamagedInput, TooManyUnreadable
from tests.data import loading
from tests.data.conftest import samples

ROOT = Path(__file__).resolve().parents[2]
_PATIENCE_S = 120  # a busy machine may need long for what takes milliseconds


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workers") / "shards"
    write_shards(samples(60), folder, max_count=25)
    return folder


def read(source: Path, steps: int, **options: Any) -> list[dict]:
    settings = {"batch_size": 8, "encode": loading.encode, "seed": 3} | options
    with closing(iter(Loader([Source(source)], **settings))) as batches:  # type: ignore[arg-type]
        return [batch for _, batch in zip(range(steps), batches, strict=False)]


def assert_same(found: list[dict], expected: list[dict]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            if isinstance(value, torch.Tensor):
                assert one[name].dtype == value.dtype
                assert torch.equal(one[name], value), name
            elif isinstance(value, Ragged):
                assert torch.equal(one[name].values, value.values)
                assert torch.equal(one[name].starts, value.starts)
            else:
                assert one[name] == value, name


def wait_for(happened: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        if found := happened():
            return found
        time.sleep(0.02)
    raise AssertionError("it did not happen")


def alive(process: int) -> bool:
    with suppress(OSError):
        # a process that has ended but was not waited for is none
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_one_order_whatever_makes_the_batches_and_how_often(shards: Path) -> None:
    expected = read(shards, 12, num_workers=0)
    assert len({key for batch in expected[:7] for key in batch["key"]}) == 56  # an order without repeats
    for workers in (1, 2, 4):
        assert_same(read(shards, 12, num_workers=workers, workers="thread"), expected)
        assert_same(read(shards, 12, num_workers=workers, workers="process"), expected)
    assert_same(read(shards, 12, num_workers=2, workers="process"), expected)


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    worlds=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    workers=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    each=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    stop=st.integers(0, 4),
    seed=st.integers(0, 5),
)
def test_a_run_cut_off_goes_on_with_other_ranks_and_processes(
    shards: Path,
    worlds: tuple[int, int],
    workers: tuple[int, int],
    each: tuple[int, int],
    stop: int,
    seed: int,
) -> None:
    rows: list[tuple[str, int]] = []
    state: dict = {}
    for world, number, share, steps in zip(worlds, workers, each, (stop, 3), strict=True):
        parts = []
        for rank in range(world):
            loader = Loader(
                [Source(shards)],
                batch_size=share * world,
                encode=loading.encode,
                seed=seed,
                rank=rank,
                world_size=world,
                num_workers=number,
                workers="process",
            )
            if state:
                loader.load_state_dict(state)
            with closing(iter(loader)) as batches:  # type: ignore[type-var]
                got = [batch for _, batch in zip(range(steps), batches, strict=False)]
            parts.append([row for batch in got for row in zip(batch["key"], batch["draw"].tolist(), strict=True)])
        state = json.loads(json.dumps(loader.state_dict()))
        rows += [part[place] for place in range(len(parts[0])) for part in parts]
        assert state["samples_consumed"] == len(rows)
    whole = read(shards, len(rows), batch_size=1, seed=seed, num_workers=0)
    assert rows == [(batch["key"][0], int(batch["draw"])) for batch in whole]


def test_a_batch_stays_as_it_is_while_it_is_held(shards: Path) -> None:
    """Memory is used again only when nothing of a batch is left."""
    found = read(shards, 20, num_workers=1, prefetch=1, workers="process")  # all held at once
    assert_same(found, read(shards, 20, num_workers=0))


def test_a_killed_worker_costs_nothing(shards: Path, tmp_path: Path) -> None:
    slow = loading.Slow(tmp_path, 0.005)
    loader = Loader([Source(shards)], batch_size=8, encode=slow, seed=3, num_workers=2, workers="process")
    with pytest.warns(RuntimeWarning, match="ended with signal SIGKILL; another goes on"):
        found = read_and_kill(loader, tmp_path)
    assert_same(found, read(shards, 12, num_workers=0))
    assert len(list(tmp_path.iterdir())) >= 4  # two were killed, and two more


def read_and_kill(loader: Loader, workers: Path) -> list[dict]:
    found = []
    for batch in loader:
        found.append(batch)
        if len(found) in (2, 5):
            for process in workers.iterdir():
                with suppress(ProcessLookupError):
                    os.kill(int(process.name), signal.SIGKILL)
        if len(found) == 12:
            break
    return found


def test_a_sample_that_ends_workers_is_named(shards: Path, tmp_path: Path) -> None:
    once = loading.KillsItself("000017", once=tmp_path / "done")
    with pytest.warns(RuntimeWarning, match="SIGKILL"):
        assert_same(read(shards, 8, encode=once, num_workers=2, workers="process"), read(shards, 8, num_workers=0))
    assert (tmp_path / "done").exists()
    always = loading.KillsItself("000017")
    with pytest.warns(RuntimeWarning), pytest.raises(WorkerDied, match="at sample 000017 of") as caught:
        read(shards, 8, encode=always, num_workers=2, workers="process")
    assert "\n" not in str(caught.value)


def test_signals_that_stop_a_run_are_not_for_the_workers(shards: Path, tmp_path: Path) -> None:
    slow = loading.Slow(tmp_path, 0.0)
    loader = Loader([Source(shards)], batch_size=8, encode=slow, seed=3, num_workers=1, workers="process")
    with closing(iter(loader)) as batches:  # type: ignore[type-var]
        found = [next(batches)]
        (process,) = (int(each.name) for each in tmp_path.iterdir())
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(process, number)
        found += [next(batches) for _ in range(7)]
        assert {int(each.name) for each in tmp_path.iterdir()} == {process}
    assert_same(found, read(shards, 8, num_workers=0))
    assert not alive(process)


@pytest.mark.parametrize("world", [1, 2])
def test_killed_ranks_leave_no_process_and_go_on_elsewhere(shards: Path, tmp_path: Path, world: int) -> None:
    Pool(shards)  # the indexes are there, as after any first run
    ranks, logs = [], [tmp_path / f"rank-{rank}.jsonl" for rank in range(world)]
    for rank, log in enumerate(logs):
        command = [sys.executable, "-m", "tests.data.loading", shards, log, rank, world, 2, ""]
        ranks.append(subprocess.Popen([str(word) for word in command], cwd=ROOT))
    workers: list[int] = []
    try:
        for rank, log in zip(ranks, logs, strict=True):
            wait_for(lambda log=log: log.exists() and len(log.read_text().splitlines()) >= 3)
            workers += children(rank.pid)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert len(workers) >= 2 * world
    wait_for(lambda: not any(map(alive, workers)))
    steps = [
        [json.loads(line) for line in log.read_text().splitlines(keepends=True) if line[-1] == "\n"] for log in logs
    ]
    done = min(map(len, steps))  # as of the last checkpoint that all ranks have reached
    rows = [
        row
        for step in range(done)
        for place in range(4)
        for rank in range(world)
        for row in [(steps[rank][step]["keys"][place], steps[rank][step]["draws"][place])]
    ]
    state = steps[0][done - 1]["state"]
    assert state["samples_consumed"] == len(rows)
    loader = Loader([Source(shards)], batch_size=6, encode=loading.encode, num_workers=1, workers="process")
    loader.load_state_dict(state)
    with closing(iter(loader)) as batches:  # type: ignore[type-var]
        for batch in (next(batches) for _ in range(10)):
            rows += zip(batch["key"], batch["draw"].tolist(), strict=True)
    whole = read(shards, len(rows), batch_size=1, seed=0, num_workers=0)
    assert rows == [(batch["key"][0], int(batch["draw"])) for batch in whole]


def children(process: int) -> list[int]:
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it may have ended since
            if int(file.read_text().rpartition(")")[2].split()[1]) == process:
                found.append(int(file.parent.name))
    return found


def test_bad_samples_are_counted_and_replaced_as_by_threads(shards: Path, tmp_path: Path) -> None:
    def run(log: Path, **options: Any) -> tuple[list[dict], dict]:
        loader = Loader(
            [Source(Pool(shards, name="web"))],
            batch_size=8,
            encode=loading.picky,
            max_unreadable=0.5,
            skip_log=log,
            **options,
        )
        with closing(iter(loader)) as batches:  # type: ignore[type-var]
            return [next(batches) for _ in range(10)], loader.counters()

    expected, counts = run(tmp_path / "one.jsonl", num_workers=0)
    found, same = run(tmp_path / "two.jsonl", num_workers=2, workers="process")
    assert_same(found, expected)
    assert same == counts
    assert counts["skipped/web/ends in 7"] == counts["skipped"] > 0
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "two.jsonl").read_text()
    with pytest.raises(TooManyUnreadable, match="ends in 7"):
        read(shards, 90, encode=loading.picky, max_unreadable=0.0, num_workers=2, workers="process")


def test_what_fails_in_a_worker_says_what_and_where(shards: Path) -> None:
    with pytest.raises(WorkerFailed, match="ZeroDivisionError") as caught:
        read(shards, 9, encode=loading.broken, num_workers=2, workers="process")
    assert "while encoding sample" in caught.value.__notes__[0]
    assert "in broken" in caught.value.__notes__[0]
    with pytest.raises(ConfigError, match="'what' cannot leave a worker process"):
        read(shards, 1, encode=loading.opaque, num_workers=1, workers="process")
    with pytest.raises(ConfigError, match="cannot be sent to a worker process"):
        read(shards, 1, encode=lambda sample, rng: {}, num_workers=1, workers="process")
    with pytest.raises(ConfigError, match="thread and process are known"):
        read(shards, 1, workers="fork")


def test_shards_that_change_under_a_worker_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    write_shards(samples(20), folder)
    loader = Loader([Source(folder)], batch_size=4, encode=loading.encode, num_workers=1, workers="process")
    write_shards(samples(30), folder)
    with pytest.raises(DamagedInput, match="the shards changed"):
        next(iter(loader))


def test_a_collate_of_ones_own_runs_in_the_worker(shards: Path) -> None:
    options = {"collate": loading.keys_alone, "batch_size": 6}
    found = read(shards, 3, num_workers=1, workers="process", **options)
    expected = read(shards, 3, num_workers=0, **options)
    assert_same(found, expected)
    assert isinstance(found[0]["sum"], torch.Tensor)


def test_workers_do_without_torch(shards: Path) -> None:
    (batch,) = read(shards, 1, encode=loading.AfterPairs(), num_workers=1, workers="process")
    assert batch["heavy"] == [[]] * 8


def test_decoded_samples_are_cached_in_each_worker(shards: Path) -> None:
    options = {"num_workers": 2, "workers": "process", "cache_bytes": 1 << 20}
    assert_same(read(shards, 20, **options), read(shards, 20, num_workers=0))


def test_an_order_with_an_end_ends_there(shards: Path) -> None:
    for options in ({"num_workers": 0}, {"num_workers": 2}, {"num_workers": 2, "workers": "process"}):
        found = read(shards, 99, batch_size=16, epochs=1, **options)
        assert [len(batch["key"]) for batch in found] == [16, 16, 16, 12]
        assert len({key for batch in found for key in batch["key"]}) == 60
    loader = Loader([Source(shards)], batch_size=16, encode=loading.encode, samples=20, rank=1, world_size=4)
    assert [len(batch["key"]) for batch in loader] == [4, 1]
    assert loader.samples_consumed == 20
    assert list(loader) == []
    last = Loader([Source(shards)], batch_size=16, encode=loading.encode, samples=17, rank=1, world_size=4)
    assert [len(batch["key"]) for batch in last] == [4]  # none of the last step's one sample is its share
    assert last.samples_consumed == 17
