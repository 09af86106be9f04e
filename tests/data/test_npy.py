"""Arrays in shards: from their bytes to a teacher's embeddings in a batch, and what is no such array."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmfoundry.data.decode import UnreadableSample
from mmfoundry.data.executors import SerialExecutor
from mmfoundry.data.filters.subset import write_subset
from mmfoundry.data.loader import Loader, Source
from mmfoundry.data.new_shards import ReshardOptions
from mmfoundry.data.npy import MAX_NPY_BYTES, read_npy
from mmfoundry.data.pairs import PairEncoder, StoredTeacher, pad_text
from mmfoundry.data.reader import Pool
from mmfoundry.data.resharding import reshard
from mmfoundry.data.sample import to_sample
from mmfoundry.data.shards import write_shards
from tests.data.conftest import encode, smooth

WIDTH = 6


def npy(array: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, **options)
    return file.getvalue()


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f2", ">f4"])
@pytest.mark.parametrize("shape", [(5,), (3, 4), (0, 4)])
def test_numbers_come_back(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).normal(size=shape).astype(dtype)
    for version in ((1, 0), (2, 0)):
        for laid_out in (array, np.asfortranarray(array)):
            found = read_npy(npy(laid_out, version=version), "a.npy")
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, array.astype(np.float32))


WHOLE = npy(np.arange(8, dtype=np.float32))
NOT_ARRAYS = {
    "empty": b"",
    "text": b"[1.0, 2.0]",
    "cut short": WHOLE[:-1],
    "cut in the header": WHOLE[:20],
    "more than it says": WHOLE + b"\0",
    "promises too much": WHOLE.replace(b"(8,), }           ", b"(800000000000,), }"),
    "negative": WHOLE.replace(b"(8,), } ", b"(-8,), }"),
    "a call in the header": WHOLE.replace(b"(8,), }          ", b"print('was run')"),
    "objects": npy(np.array([{"a": 1}], dtype=object), allow_pickle=True),
    "whole numbers": npy(np.arange(8)),
    "double": npy(np.arange(8.0)),
    "version 3": npy(np.arange(8, dtype=np.float32), version=(3, 0)),
    "pickle": b"\x80\x04]\x94.",
}


@pytest.mark.parametrize("kind", NOT_ARRAYS)
def test_what_is_no_array_is_a_damaged_sample(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert NOT_ARRAYS[kind] != WHOLE
    with pytest.raises(UnreadableSample) as error:
        read_npy(NOT_ARRAYS[kind], "told.npy")
    assert (error.value.reason, "told.npy" in str(error.value)) == ("damaged array", True)
    assert "was run" not in capfd.readouterr().out


def test_large_ones_are_refused_unread() -> None:
    with pytest.raises(UnreadableSample) as error:
        read_npy(npy(np.zeros(MAX_NPY_BYTES // 4, np.float32)), "told.npy")
    assert error.value.reason == "too many bytes"


def told(number: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(number)
    return generator.normal(size=WIDTH).astype(np.float16), generator.normal(size=(2, WIDTH)).astype(np.float16)


def samples(count: int) -> Iterator[dict[str, Any]]:
    """With a teacher's embeddings as JSON and as npy, fp16 both; a few are damaged."""
    for number in range(count):
        image, text = told(number)
        meta = {"told": image.tolist(), "said": text.tolist(), "uid": f"{number:032x}"}
        stored = {"l14.told.npy": npy(image), "l14.said.npy": npy(text)}
        if number == 3:
            stored["l14.told.npy"] = stored["l14.told.npy"][:-2]
        if number == 5:
            stored["l14.said.npy"] = npy(text[:, :-1])
        if number == 7:
            del stored["l14.told.npy"]
        yield {
            "__key__": f"s{number:03d}",
            "jpg": encode(smooth(number)),
            "txt": f"caption one of {number}\nanother of {number}",
            "json": json.dumps(meta).encode(),
            **stored,
        }


MEMBERS = {"a": StoredTeacher("L14.told.npy", "L14.said.npy", WIDTH)}
FIELDS = {"a": StoredTeacher("told", "said", WIDTH)}


def batches(folder: Path, stored: dict[str, StoredTeacher], **options: Any) -> tuple[list[dict[str, Any]], Loader]:
    loader = Loader(
        [Source(Pool(folder))],
        batch_size=8,
        encode=PairEncoder(16, 16, stored=stored),
        finish=pad_text,
        max_unreadable=0.5,
        **options,
    )
    iterator = iter(loader)
    found = [next(iterator) for _ in range(5)]
    iterator.close()  # type: ignore[attr-defined]
    return found, loader


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(samples(40), folder, max_count=16)
    return folder


@pytest.mark.parametrize("options", [{}, {"cache_bytes": 1 << 20}, {"workers": "process"}])
def test_they_come_with_their_pairs_and_damage_is_counted(
    options: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    skip_log = tmp_path / "skipped.jsonl"
    found, loader = batches(shards, MEMBERS, skip_log=skip_log, **options)
    for batch in found:
        for key, image, text in zip(batch["__key__"], batch["teacher_image/a"], batch["teacher_text/a"], strict=True):
            expected = told(int(key[1:]))
            np.testing.assert_array_equal(image.numpy(), expected[0].astype(np.float32))
            assert any(np.array_equal(text.numpy(), each.astype(np.float32)) for each in expected[1])
    skipped = [json.loads(line) for line in skip_log.read_text().splitlines()]
    reasons = {(line["key"], line["reason"]) for line in skipped}
    assert reasons == {("s003", "damaged array"), ("s005", "stored embeddings"), ("s007", "stored embeddings")}
    assert loader.counters()["skipped"] == len(skipped) >= 3


def test_json_and_npy_give_the_same_batches(tmp_path: Path) -> None:
    whole = (sample for sample in samples(48) if int(sample["__key__"][1:]) > 7)
    write_shards(whole, tmp_path / "shards", max_count=16)
    one, other = (batches(tmp_path / "shards", stored)[0] for stored in (MEMBERS, FIELDS))
    for left, right in zip(one, other, strict=True):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left if isinstance(left[name], torch.Tensor))
        assert left["__key__"] == right["__key__"]


def test_new_shards_keep_them(shards: Path, tmp_path: Path) -> None:
    subset = tmp_path / "subset.npy"
    write_subset([f"{number:032x}" for number in range(10, 20)], subset)
    reshard(Pool(shards), subset, tmp_path / "out", SerialExecutor(), ReshardOptions())
    pool = Pool(tmp_path / "out")
    for place, number in enumerate(range(10, 20)):
        arrays = to_sample(pool.get(place)).arrays
        assert arrays.keys() == {"l14.told.npy", "l14.said.npy"}
        np.testing.assert_array_equal(read_npy(arrays["l14.told.npy"], ""), told(number)[0].astype(np.float32))
