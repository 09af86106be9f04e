"""The `filter` stage on pools that are damaged, and on captions that nobody expects: defined results, nothing fatal."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from mmfoundry.data.derived.language import languages_of
from mmfoundry.data.filters.subset import read_subset
from mmfoundry.data.reader import Pool
from mmfoundry.data.sample import to_sample
from mmfoundry.data.shards import write_shards
from mmfoundry.pipeline.artifact import Artifact
from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.distributed import Runtime
from mmfoundry.pipeline.errors import MissingInput, TooManyUnreadable
from mmfoundry.pipeline.stage import resolve_inputs, run_stage
from mmfoundry.stages.filter import STAGE, FilterConfig
from tests.data.conftest import encode, smooth

ODD = {
    "plain": "a dog on the beach",
    "empty": "",
    "white space": " \t  ",
    "NUL bytes": "a dog\0 on the\0beach",
    "only NUL": "\0\0\0\0\0\0\0 \0 \0",
    "1 MB of words": "the dog " * 131_072,
    "1 MB, one word": "x" * (1 << 20),
    "right to left": "كلب يركض على الشاطئ الجميل",
    "both ways": "a dog \u202eסוס רץ על החוף\u202c on the beach",
    "emoji": "😀 🐶 🏖️ 🏖️ 🏖️",
    "a family": "👨‍👩‍👧‍👦 👩🏽‍🚀 🇩🇪",
    "combining": "Z̷̢̛̗͔͇̈́̈a̶l̴g̶o̷ comes for the dog",
    "no word of a language": "12345 67890 !!! ???",
    "unknown language": "qwrtz pfghj xcvbn mnbvc lkjhg",
    "separators": "one\x1ctwo\x1dthree\x1efour\u2028five\u00a0six",
    "not a character": "a dog \uffff\ufffe on the beach",
    "byte order mark": "\ufeffa dog on the beach",
}
TREE = {"all": ["caption_words", "caption_characters", {"language": {"languages": ["en"]}}]}


def uid(number: int) -> str:
    return f"{number:032x}"


def run(pool: Path, output: Path, **changes: Any) -> Artifact:
    tree = {"pool": str(pool), "filters": TREE, "num_workers": 1, "max_unreadable": 0.5} | changes
    return run_stage(STAGE, parse(FilterConfig, tree), output, Runtime())


def funnel(artifact: Artifact) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((artifact.path / "funnel.json").read_text(encoding="utf-8"))
    return found


def passes(text: str) -> bool:
    """The three rules in plain Python."""
    return len(text.split()) >= 3 and len(text) >= 6 and languages_of([text])[0] == ["en"]


def metadata(folder: Path, texts: list[str | None], uids: list[str] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    table = {"uid": uids or [uid(number) for number in range(len(texts))], "text": texts}
    pl.DataFrame(table, schema={"uid": pl.String, "text": pl.String}).write_parquet(folder / "0.parquet")
    return folder


def tars(folder: Path, texts: list[str], damage: Callable[[dict[str, Any], int], None] | None = None) -> Path:
    made = []
    for number, text in enumerate(texts):
        said = {"uid": uid(number), "captions": [text]}
        made.append({"__key__": f"{number:04}", "png": encode(smooth(number)), "json": said})
        if damage:
            damage(made[-1], number)
    write_shards(made, folder, max_count=7)
    return folder


def test_odd_captions_of_metadata_have_the_results_of_plain_python(tmp_path: Path) -> None:
    texts = list(ODD.values())
    made = run(metadata(tmp_path / "pool", [*texts, None]), tmp_path / "out")
    expected = [uid(number) for number, text in enumerate(texts) if passes(text)]
    assert read_subset(made.path / "subset.npy") == expected
    assert uid(0) in expected
    kept = pl.read_parquet(made.path / "kept" / "*.parquet")
    assert kept["caption"].to_list() == [text for text in texts if passes(text)], "captions keep their bytes"
    counts = funnel(made)
    assert (counts["samples"], counts["captions"], counts["unreadable"]) == (len(texts) + 1, len(texts), {})


def test_odd_captions_of_tars_have_the_results_of_plain_python(tmp_path: Path) -> None:
    texts = list(ODD.values())
    made = run(tars(tmp_path / "pool", texts), tmp_path / "out")
    expected = {uid(number): text.strip() for number, text in enumerate(texts) if passes(text.strip())}
    assert read_subset(made.path / "subset.npy") == list(expected)
    curated = Pool(made.path / "shards")
    found = {sample.key: sample.text for sample in (to_sample(curated.get(n)) for n in range(len(curated)))}
    assert found == {key: [text] for key, text in expected.items()}


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path: Path) -> None:
    """JSON can say what UTF-8 cannot; the new shard's JSON says it again, the table says "?"."""

    def spoil(sample: dict[str, Any], number: int) -> None:
        if number == 2:
            captions = '["a dog on the beach \\ud83d", "dog"]'  # of which the second is cut
            sample["json"] = f'{{"uid": "{uid(2)}", "captions": {captions}}}'.encode()

    made = run(tars(tmp_path / "pool", ["a dog on the beach"] * 5, spoil), tmp_path / "out")
    assert read_subset(made.path / "subset.npy") == [uid(number) for number in range(5)]
    kept = pl.read_parquet(made.path / "kept" / "*.parquet")
    assert kept["caption"].to_list() == ["a dog on the beach" + " ?" * (number == 2) for number in range(5)]
    assert to_sample(Pool(made.path / "shards").get(2)).text == ["a dog on the beach \ud83d"]


def test_too_much_text_is_counted(tmp_path: Path) -> None:
    def spoil(sample: dict[str, Any], number: int) -> None:
        if number == 1:
            sample["json"]["captions"] = ["a dog on the beach " * 300_000]  # 5.7 MB

    made = run(tars(tmp_path / "pool", ["a dog on the beach"] * 5, spoil), tmp_path / "out")
    assert funnel(made)["unreadable"] == {"too much text": 1}
    assert read_subset(made.path / "subset.npy") == [uid(n) for n in (0, 2, 3, 4)]


def test_damaged_shards_cost_what_is_damaged(tmp_path: Path) -> None:
    pool = tars(tmp_path / "pool", ["a dog on the beach"] * 21)
    whole = run(pool, tmp_path / "whole")
    assert len(read_subset(whole.path / "subset.npy")) == 21
    cut, zeroed = pool / "shard-00001.tar", pool / "shard-00002.tar"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 2 // 3])
    data = bytearray(zeroed.read_bytes())
    data[1024:1536] = b"\xff" * 512
    zeroed.write_bytes(data)
    made = run(pool, tmp_path / "out")
    counts = funnel(made)
    left = read_subset(made.path / "subset.npy")
    lost = counts["samples"] + sum(counts["damaged"].values()) - counts["kept"]
    assert set(left) < {uid(number) for number in range(21)}
    assert {uid(number) for number in range(7)} < set(left), "the whole shard is whole"
    assert sum(counts["damaged"].values()) + sum(counts["unreadable"].values()) >= 2
    assert len(left) + lost >= 21, "every sample is kept or counted"
    with pytest.raises(TooManyUnreadable, match="cannot be read"):
        run(pool, tmp_path / "strict", max_unreadable=0.01)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet at all", "cut"])
def test_damaged_metadata_files_are_counted(tmp_path: Path, content: bytes | str) -> None:
    pool = metadata(tmp_path / "pool", ["a dog on the beach"] * 5)
    data = (pool / "0.parquet").read_bytes()
    (pool / "1.parquet").write_bytes(data[:-20] if content == "cut" else content)  # type: ignore[arg-type]
    made = run(pool, tmp_path / "out")
    assert read_subset(made.path / "subset.npy") == [uid(number) for number in range(5)]
    assert list(funnel(made)["damaged"]) == ["metadata file cannot be read"]
    with pytest.raises(TooManyUnreadable, match=r"1\.parquet"):
        run(pool, tmp_path / "strict", max_unreadable=0.01)
    (pool / "0.parquet").unlink()
    with pytest.raises(MissingInput, match="no row"):
        run(pool, tmp_path / "none")


def test_rows_without_a_uid_are_counted_and_duplicates_in_conflict_reported(tmp_path: Path) -> None:
    texts: list[str | None] = ["a dog on the beach", "the cat in the house", "a dog on the beach", "a dog in the house"]
    pool = metadata(tmp_path / "pool", [*texts, "my dog on the beach"], [uid(1), uid(1), uid(2), uid(2), "none"])
    made = run(pool, tmp_path / "out")
    assert read_subset(made.path / "subset.npy") == [uid(1), uid(2)]
    counts = funnel(made)
    assert counts["unreadable"] == {"uid is not 32 hex digits": 1}
    assert (counts["repeated_uids"]["uids"], counts["repeated_uids"]["conflicting"]) == (2, 2)
    kept = pl.read_parquet(made.path / "kept" / "*.parquet")
    assert kept["caption"].to_list() == ["a dog on the beach", "a dog on the beach"], "the first in the pool counts"


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    """An npz may hold pickled objects; nothing of them is loaded."""
    pool = metadata(tmp_path / "pool", ["a dog on the beach"] * 3)
    buffer = io.BytesIO()
    np.savez(buffer, l14_img=np.array([[{}], [{}], [{}]], dtype=object))
    (pool / "0.npz").write_bytes(buffer.getvalue())
    tree = {"image_based": {"reference": str(tmp_path / "t.npy"), "centroids": str(tmp_path / "c.npy")}}
    np.save(tmp_path / "t.npy", np.eye(2, dtype=np.float32))
    np.save(tmp_path / "c.npy", np.eye(2, dtype=np.float32))
    with pytest.raises(Exception, match="l14_img is object"):
        run(pool, tmp_path / "out", filters=tree)


def test_a_missing_file_is_told_with_the_filter_that_reads_it(tmp_path: Path) -> None:
    made = np.zeros((2, 4), np.float32)
    np.save(tmp_path / "centroids.npy", made)
    reference = {"image_based": {"reference": "nowhere.npy", "centroids": str(tmp_path / "centroids.npy")}}
    tree = {"pool": str(tmp_path), "filters": {"all": ["basic", {"any": [{"not": reference}, "not_blank"]}]}}
    with pytest.raises(MissingInput, match=r"^filter\.filters: image_based: nowhere\.npy: no such file"):
        resolve_inputs(STAGE, parse(FilterConfig, tree))
