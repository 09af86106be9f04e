"""`index` and `data`: what is in shards, sample by sample, and what is damaged."""

import shutil
from pathlib import Path

import pytest

from mmfoundry.launch.catalog import OUR_STAGES, Stages
from mmfoundry.launch.cli import EXAMPLES
from mmfoundry.pipeline.recipe import load_recipe
from tests.launch.conftest import Command

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "data" / "samples"


@pytest.fixture
def shard(here: Path) -> Path:
    (here / "shards").mkdir()
    return Path(shutil.copy(SAMPLES / "pictures-noto-00000.tar", here / "shards" / "a.tar"))


def test_keys_are_listed_in_order(quick: Command, shard: Path) -> None:
    keys = quick("data", "keys", "shards").stdout.splitlines()
    assert len(keys) == len(set(keys)) > 100
    assert keys == quick("data", "keys", "shards/*.tar").stdout.splitlines()
    assert list(shard.parent.iterdir()) == [shard], "looking leaves nothing behind"


def test_a_sample_is_shown_by_number_and_by_key(quick: Command, shard: Path) -> None:
    keys = quick("data", "keys", "shards").stdout.splitlines()
    by_number = quick("data", "inspect", "shards", "--number", "3").stdout
    assert by_number == quick("data", "inspect", "shards", "--key", keys[3]).stdout
    assert by_number.splitlines()[0] == f"shards/a.tar: {keys[3]}"
    assert "image: 64 x 64 pixels" in by_number
    assert "caption: " in by_number
    assert '"concept": ' in by_number
    refused = quick("data", "inspect", "shards", "--number", "99999")
    assert refused.stderr.startswith("error: shards/a.tar: no sample 99999; there are ")
    assert "no sample with key 'nobody'" in quick("data", "inspect", "shards", "--key", "nobody").stderr


def test_verify_counts_what_cannot_be_used(quick: Command, shard: Path) -> None:
    whole = quick("data", "verify", "shards")
    assert whole.returncode == 0
    assert whole.stdout.endswith("0 problems\n")
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    cut = quick("data", "verify", "shards")
    assert cut.returncode == 1
    assert "0 problems" not in cut.stdout
    assert cut.stderr == ""


def test_index_is_kept_beside_the_shard_and_tells_damage(quick: Command, shard: Path) -> None:
    done = quick("index", "shards")
    assert done.returncode == 0
    assert (shard.parent / "a.tar.mmf.idx").is_file()
    assert done.stdout.splitlines()[-1].endswith("samples, 0 damaged places")
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    damaged = quick("index", "shards").stdout.splitlines()
    assert damaged[1].startswith("  byte ")
    assert not damaged[-1].endswith(" 0 damaged places")


def test_index_is_strict_when_told_to(quick: Command, shard: Path) -> None:
    assert quick("index", "shards", "--strict").returncode == 0
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    assert quick("index", "shards").returncode == 0
    strict = quick("index", "shards", "--strict")
    assert (strict.returncode, strict.stderr) == (3, "")
    assert "cut off" in strict.stdout


def test_indexes_go_to_the_folder_that_is_named(quick: Command, shard: Path) -> None:
    done = quick("index", "shards", "--index-dir", "indexes", "--digest")
    assert done.returncode == 0
    assert "could not be written" not in done.stdout
    assert list(shard.parent.iterdir()) == [shard]
    assert len(list((shard.parent.parent / "indexes").iterdir())) == 1
    assert "0 of 1 shards have a digest" in quick("data", "verify", "shards", "--no-decode").stdout
    content = bytearray(shard.read_bytes())
    content[600] ^= 1  # in a payload, where only the digest sees it
    shard.write_bytes(content)
    changed = quick("data", "verify", "shards", "--no-decode", "--index-dir", "indexes")
    assert changed.returncode == 1
    assert "1 of 1 shards have a digest; 1 problems\n  1 x content changed" in changed.stdout


def test_processes_index_as_one_does(quick: Command, shard: Path) -> None:
    for name in "bcdef":
        shutil.copy(SAMPLES / "pictures-noto-00000.tar", shard.with_name(f"{name}.tar"))
    cut = shard.with_name("d.tar")
    cut.write_bytes(cut.read_bytes()[:9000])
    alone = quick("index", "shards", "--digest", "--index-dir", "alone")
    shared = quick("index", "shards", "--digest", "--index-dir", "shared", "--num-workers", "3")
    assert shared.returncode == 0
    assert shared.stdout == alone.stdout
    assert [line[:13] for line in shared.stdout.splitlines() if line[0] == "s"] == [
        f"shards/{n}.tar:" for n in "abcdef"
    ]
    one, other = (
        {path.name: path.read_bytes() for path in (shard.parent.parent / name).iterdir()}
        for name in ("alone", "shared")
    )
    assert one == other
    assert len(one) == 6


def test_an_index_that_cannot_be_written_is_told(quick: Command, shard: Path) -> None:
    (shard.parent.parent / "taken").write_text("a file")
    done = quick("index", "shards", "--index-dir", "taken")
    assert done.returncode == 0
    assert "(the index could not be written)" in done.stdout


def test_convert_says_what_it_wrote_and_left_out(quick: Command, shard: Path) -> None:
    photos = shard.parent.parent / "photos"
    photos.mkdir()
    (photos / "broken.png").write_bytes(b"no picture")
    count = len(quick("data", "keys", "shards").stdout.splitlines())
    done = quick("data", "convert", "shards", "--output", "out", "--max-count", "100")
    assert done.stdout == f"{count} samples in {-(-count // 100)} shards; 0 left out\n"
    refused = quick("data", "convert", "photos", "--output", "out2", "--max-unreadable", "0")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "1 x unknown image format; they are listed in out2/left_out.jsonl" in refused.stderr


def test_reshard_says_what_it_took_and_lacks(quick: Command, shard: Path) -> None:
    from mmfoundry.data.decode import DecodeLimits
    from mmfoundry.data.filters.subset import write_subset
    from mmfoundry.data.table import Request, describe_shard

    uids = describe_shard(Request(frozenset(), DecodeLimits()), 0, shard)[0]["uid"].unique(maintain_order=True)
    write_subset([uids[3], uids[1], uids[1], "f" * 32], shard.parent.parent / "subset.npy")
    done = quick("data", "reshard", "shards", "--subset", "subset.npy", "--output", "out", "--num-workers", "1")
    assert done.stdout == ("3 samples in 1 shards, of 4 that the subset asks for\n  1 x uids are not in the pool\n"), (
        done.stderr
    )
    assert quick("data", "keys", "out").stdout.splitlines() == [uids[1], f"{uids[1]}-1", uids[3]]
    refused = quick("data", "reshard", "shards", "--subset", "subset.npy", "--output", "out", "--executor", "spark")
    assert (refused.returncode, refused.stderr) == (2, "error: --executor spark: local or ray\n")


def test_the_demo_recipe_and_the_examples_of_help_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    examples = [f"{stage}.{key}" for stage, keys in EXAMPLES.items() for key in keys.split()]
    recipe = load_recipe("configs/demo.yaml", Stages(), examples)
    assert {entry.stage.name for entry in recipe.entries} <= set(OUR_STAGES)
    assert recipe.output == Path("runs/demo")
