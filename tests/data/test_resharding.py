"""Resharding against the rule of DataComp's resharder, told sample by sample, and what it does where that is silent."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from mmfoundry.data.decode import DecodeLimits, decode_image
from mmfoundry.data.executors import LocalExecutor, SerialExecutor
from mmfoundry.data.filters.subset import write_subset
from mmfoundry.data.new_shards import ReshardOptions
from mmfoundry.data.reader import Pool
from mmfoundry.data.resharding import Resharded, reshard
from mmfoundry.data.sample import image_member
from mmfoundry.data.shards import write_shards
from mmfoundry.pipeline.errors import DamagedInput, MissingInput, MmfoundryError, TooManyUnreadable, UnknownColumn
from tests.data.conftest import encode, samples, smooth


def uid(number: int) -> str:
    return f"{number:032x}"


def wanted(folder: Path, numbers: list[int]) -> Path:
    write_subset([uid(number) for number in numbers], folder / "subset.npy")
    return folder / "subset.npy"


def run(pool: Path, subset: Path, output: Path, **options: Any) -> Resharded:
    return reshard(Pool(pool), subset, output, SerialExecutor(), ReshardOptions(**options))


def content(folder: Path) -> list[tuple[str, dict[str, bytes]]]:
    pool = Pool(folder)
    return [(raw.key, raw.members) for raw in (pool.get(number) for number in range(len(pool)))]


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    write_shards(samples(30), tmp_path / "pool", max_count=8)
    return tmp_path / "pool"


def test_each_sample_comes_as_often_as_the_subset_says(pool: Path, tmp_path: Path) -> None:
    asked = random.Random(3).choices(range(35), k=40)  # with repetitions, and with uids that the pool lacks
    found = run(pool, wanted(tmp_path, asked), tmp_path / "out", max_count=7)
    times = Counter(asked)
    expected = [
        (uid(number) if copy == 0 else f"{uid(number)}-{copy}", members)
        for number, (_, members) in enumerate(content(pool))
        for copy in range(times[number])
    ]
    assert content(tmp_path / "out") == expected  # in the order of the pool, byte for byte
    assert len({key for key, _ in expected}) == len(expected)
    sizes = [len(Pool(path)) for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert sizes[:-1] == [7] * (len(sizes) - 1)
    missing = sorted({number for number in asked if number >= 30})
    assert missing
    assert (found.asked, found.written, found.shards) == (40, len(expected), len(sizes))
    assert (found.missing, found.examples["missing"]) == (len(missing), [uid(number) for number in missing])
    assert (found.repeated, found.conflicting, found.unreadable) == (0, 0, Counter())
    assert json.loads((tmp_path / "out" / "reshard.json").read_text())["written"] == len(expected)


def test_processes_make_the_same_bytes(pool: Path, tmp_path: Path) -> None:
    subset = wanted(tmp_path, [*range(0, 30, 2), 4, 4])
    run(pool, subset, tmp_path / "serial", max_count=5)
    with LocalExecutor(2) as executor:
        reshard(Pool(pool), subset, tmp_path / "local", executor, ReshardOptions(max_count=5))
    serial, local = (
        {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".tar", ".json")}
        for folder in (tmp_path / "serial", tmp_path / "local")
    )
    assert serial == local
    assert len(serial) == 5


def test_shards_of_an_earlier_call_are_replaced(pool: Path, tmp_path: Path) -> None:
    run(pool, wanted(tmp_path, list(range(30))), tmp_path / "out", max_count=3)
    run(pool, wanted(tmp_path, [1, 2]), tmp_path / "out")
    assert [key for key, _ in content(tmp_path / "out")] == [uid(1), uid(2)]
    assert {path.name.split(".")[0] for path in (tmp_path / "out").iterdir()} == {"shard-00000", "reshard"}


def test_shards_are_cut_by_bytes(pool: Path, tmp_path: Path) -> None:
    one = sum(512 + -(-len(data) // 512) * 512 for data in content(pool)[0][1].values())
    run(pool, wanted(tmp_path, list(range(30))), tmp_path / "out", max_bytes=4 * one)
    sizes = [len(Pool(path)) for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert sum(sizes) == 30
    assert max(sizes) <= 4
    run(pool, wanted(tmp_path, list(range(30))), tmp_path / "out", max_bytes=1)  # a sample larger than that has its own
    assert [len(Pool(path)) for path in sorted((tmp_path / "out").glob("*.tar"))] == [1] * 30


def test_of_one_uid_the_first_counts_and_conflicts_are_named(tmp_path: Path) -> None:
    pool = samples(6)
    same = {**pool[1], "__key__": "same"}
    other = {**pool[2], "__key__": "other", "png": encode(smooth(99))}
    said = {**pool[3], "__key__": "said", "txt": "something else"}
    write_shards([*pool, same, other, said], tmp_path / "pool", max_count=4)
    found = run(tmp_path / "pool", wanted(tmp_path, [1, 2, 3, 4]), tmp_path / "out")
    assert [members["png"] for _, members in content(tmp_path / "out")] == [pool[n]["png"] for n in (1, 2, 3, 4)]
    assert (found.written, found.repeated, found.conflicting) == (4, 3, 2)
    assert found.examples["conflicting"] == [uid(2), uid(3)]


def test_samples_without_uid_get_the_one_of_the_filter_stage(tmp_path: Path) -> None:
    from mmfoundry.data.decode import DecodeLimits
    from mmfoundry.data.table import Request, describe_shard

    bare = [{**sample, "json": {"width": 16}} for sample in samples(4)]
    write_shards(bare, tmp_path / "pool")
    (shard,) = (tmp_path / "pool").glob("*.tar")
    uids = describe_shard(Request(frozenset(), DecodeLimits()), 0, shard)[0]["uid"].unique(maintain_order=True)
    write_subset(uids[1:3], tmp_path / "subset.npy")
    run(tmp_path / "pool", tmp_path / "subset.npy", tmp_path / "out")
    found = content(tmp_path / "out")
    assert [key for key, _ in found] == uids[1:3].to_list()
    assert [json.loads(members["json"]) for _, members in found] == [{"width": 16, "uid": one} for one in uids[1:3]]


def test_what_cannot_be_read_is_counted_and_limited(tmp_path: Path) -> None:
    broken = samples(10)
    broken[3]["json"] = b"{"
    broken[5]["txt"] = b"\xff\xfe"
    write_shards(broken, tmp_path / "pool", max_count=4)
    subset = wanted(tmp_path, list(range(10)))
    with pytest.raises(TooManyUnreadable, match=r"1 of 10 samples cannot be read \(1 x broken JSON\)"):
        run(tmp_path / "pool", subset, tmp_path / "out", max_unreadable=0.05)
    assert not (tmp_path / "out").exists()
    found = run(tmp_path / "pool", subset, tmp_path / "out", max_unreadable=0.2)
    assert found.unreadable == {"broken JSON": 1, "text is not UTF-8": 1}
    assert (found.written, found.missing) == (8, 1)


def test_faces_are_blurred(pool: Path, tmp_path: Path) -> None:
    boxes = pl.DataFrame(
        {"uid": [uid(2), uid(3)], "face_bboxes": [[[0.25, 0.25, 0.75, 0.75]], []]},
        schema={"uid": pl.String, "face_bboxes": pl.List(pl.List(pl.Float64))},
    )
    boxes.write_parquet(tmp_path / "faces.parquet")
    run(pool, wanted(tmp_path, [2, 2, 3, 4]), tmp_path / "out", faces=tmp_path / "faces.parquet")
    before, after = dict(content(pool)), dict(content(tmp_path / "out"))
    for key in (uid(2), f"{uid(2)}-1"):
        old, new = (decode_image(image_member(m) or b"", DecodeLimits()) for m in (before["000002"], after[key]))
        assert np.abs(old.astype(int) - new)[5:11, 5:11].mean() > 2
        assert (old[0] == new[0]).all()
        assert json.loads(after[key]["json"])["face_bboxes"] == [[0.25, 0.25, 0.75, 0.75]]
    for number in (3, 4):
        assert after[uid(number)] == before[f"{number:06d}"]
    boxes.rename({"face_bboxes": "faces"}).write_parquet(tmp_path / "faces.parquet")
    with pytest.raises(UnknownColumn, match="no column face_bboxes"):
        run(pool, wanted(tmp_path, [2]), tmp_path / "out", faces=tmp_path / "faces.parquet")


def test_a_subset_that_cannot_be_meant(pool: Path, tmp_path: Path) -> None:
    with pytest.raises(MmfoundryError, match="none of the 1 uids"):
        run(pool, wanted(tmp_path, [77]), tmp_path / "out")
    with pytest.raises(MissingInput, match="no such file"):
        run(pool, tmp_path / "nowhere.npy", tmp_path / "out")
    np.save(tmp_path / "subset.npy", np.array([(0, 5), (0, 4)], "u8,u8"))
    with pytest.raises(DamagedInput, match="not in order"):
        run(pool, tmp_path / "subset.npy", tmp_path / "out")
