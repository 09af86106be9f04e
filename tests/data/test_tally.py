"""The rule by which skipped samples stop a run, and what is kept of them."""

import json
from pathlib import Path

import pytest
from torch.distributed import ProcessGroup

from mmfoundry.data.tally import Skip, SkipLog, Tally, joint_counts
from mmfoundry.pipeline.distributed import rank_in
from mmfoundry.pipeline.errors import ConfigError, TooManyUnreadable
from tests.ranks import run_ranks


def _skips(count: int, reason: str = "damaged image") -> list[Skip]:
    return [Skip("web", "a.tar", f"key {number}", reason, position=number) for number in range(count)]


@pytest.mark.parametrize(
    ("limit", "drawn", "most"), [(0.01, 50, 10), (0.01, 1000, 10), (0.01, 5000, 50), (0.0, 5000, 0), (1.0, 5000, 5000)]
)
def test_the_limit_is_a_fraction_of_at_least_a_thousand(limit: float, drawn: int, most: int) -> None:
    tally = Tally(limit)
    tally.add(drawn, _skips(most))
    assert (tally.drawn, tally.skipped) == (drawn, most)
    if limit < 1:
        with pytest.raises(TooManyUnreadable, match=rf"web: {most + 1} of {drawn + 1} samples"):
            tally.add(1, _skips(1))


def test_the_message_counts_by_reason_in_one_line(tmp_path: Path) -> None:
    tally = Tally(0.001, tmp_path / "runs" / "skipped.jsonl")
    tally.add(10, _skips(1, "no image"))
    with pytest.raises(TooManyUnreadable) as caught:
        tally.add(10, _skips(3))
    assert str(caught.value) == (
        "web: 4 of 20 samples could not be used, more than max_unreadable (0.001) allows: "
        f"3 x damaged image, 1 x no image; they are listed in {tally.log}"
    )
    assert tally.as_metrics() == {
        "drawn": 20.0,
        "skipped": 4.0,
        "skipped/web/damaged image": 3.0,
        "skipped/web/no image": 1.0,
    }
    assert tally.log is not None
    lines = [json.loads(line) for line in tally.log.read_text().splitlines()]
    assert [(line["key"], line["reason"], line["position"]) for line in lines] == [
        ("key 0", "no image", 0),
        *((f"key {number}", "damaged image", number) for number in range(3)),
    ]


def test_good_samples_never_stop_a_run() -> None:
    tally = Tally(0.0)
    tally.add(10_000)
    assert tally.as_metrics() == {"drawn": 10_000.0, "skipped": 0.0}


def _lines(path: Path) -> list[tuple[int | None, str]]:
    return [(line["position"], line["key"]) for line in map(json.loads, path.read_text().splitlines())]


def test_a_run_that_goes_on_lists_each_skip_once(tmp_path: Path) -> None:
    path = tmp_path / "skipped.jsonl"
    hidden = Skip("web", "a.tar", "", "damaged header", "at byte 512")
    again = Skip("web", "a.tar", "key 1", "damaged image", position=1)  # drawn for position 1 a second time
    Tally(1.0, path).add(9, [hidden, *_skips(4), again])
    whole = _lines(path)
    for start in (0, 2):  # killed before its first checkpoint, then after one
        tally = Tally(1.0, path)
        tally.add(1, [hidden])
        tally.restart(start)
        moved = [Skip("web", "b/a.tar", each.key, each.reason, position=each.position) for each in _skips(4)[start:]]
        tally.add(9, [*moved, *([again] if start == 0 else [])])
        assert _lines(path) == whole
    tally.add(1, [_skips(6)[5]])
    assert _lines(path) == [*whole, (5, "key 5")]


def test_a_line_that_a_kill_cut_in_two_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "skipped.jsonl"
    SkipLog(path).add(_skips(3))
    whole = path.read_bytes()
    for cut in (1, 30, len(whole) - 5):
        path.write_bytes(whole[:cut])
        SkipLog(path).add(_skips(3))
        assert path.read_bytes() == whole


@pytest.mark.parametrize("limit", [-0.1, 1.5, float("nan")])
def test_a_limit_is_a_fraction(limit: float) -> None:
    with pytest.raises(ConfigError, match="max_unreadable"):
        Tally(limit)


def _joint(group: ProcessGroup | None, shared: dict[str, float]) -> dict[str, float]:
    return joint_counts(shared | {f"skipped/rank {rank_in(group)}": 1.0 + rank_in(group)}, group)


def test_counts_are_summed_over_ranks_also_under_names_that_others_lack() -> None:
    expected = {"drawn": 10.0, "skipped/rank 0": 1.0, "skipped/rank 1": 2.0}
    assert run_ranks(_joint, 2, {"drawn": 5.0}) == [expected, expected]
    assert _joint(None, {"drawn": 5.0}) == {"drawn": 5.0, "skipped/rank 0": 1.0}
