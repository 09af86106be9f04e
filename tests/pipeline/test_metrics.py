import math
from pathlib import Path

import pytest
import torch
from torch.distributed import ProcessGroup

from mmfoundry.pipeline.distributed import rank_in
from mmfoundry.pipeline.metrics import Reading, StageLog, Tally, read_metrics
from tests.ranks import run_ranks


def test_lines_read_back_bit_for_bit(tmp_path: Path) -> None:
    log = StageLog(tmp_path / "new", tensorboard=False)
    loss = 0.1 + 0.2
    log.scalars(1, {"loss": loss, "bad": math.nan})
    assert list(read_metrics(tmp_path / "new" / "metrics.jsonl")) == [
        {"phase": "train", "step": 1, "loss": loss, "bad": None}
    ]


def test_rewind_drops_what_will_be_written_again(tmp_path: Path) -> None:
    log = StageLog(tmp_path, tensorboard=False)
    for step in (1, 2, 3):
        log.scalars(step, {"loss": step}, phase="align")
    for step in (1, 2, 3):
        log.scalars(step, {"loss": step}, phase="tune")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "tune", "step": 4, "lo')
    log = StageLog(tmp_path, tensorboard=False)
    log.rewind("tune", 2)
    log.scalars(3, {"loss": 30.0}, phase="tune")
    lines = [(line["phase"], line["step"], line["loss"]) for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert lines == [("align", 1, 1), ("align", 2, 2), ("align", 3, 3), ("tune", 1, 1), ("tune", 2, 2), ("tune", 3, 30)]


def test_a_torn_line_is_cut_before_the_next_one(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"phase": "train", "step": 1}\n{"pha')
    StageLog(tmp_path, tensorboard=False).scalars(2, {})
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_only_the_main_rank_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = StageLog(tmp_path, is_main=False)
    log.scalars(1, {"loss": 1.0})
    log.say("hello")
    log.rewind("train", 0)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_messages_are_shown_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    StageLog(tmp_path).say("begins")
    assert capsys.readouterr().err == "begins\n"
    assert (tmp_path / "messages.txt").read_text().endswith(" begins\n")


def test_tensorboard_hides_what_a_resumed_run_wrote_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = StageLog(tmp_path)
    for step in (1, 2, 3):
        log.scalars(step, {"loss": step})
    log.close()
    log = StageLog(tmp_path)
    log.rewind("train", 1)
    log.scalars(2, {"loss": 20.0})
    log.scalars(2, {"hidden": 20.0}, tensorboard=False)
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "train")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 20.0)]
    assert "hidden" not in events.Tags()["scalars"]


def tally(group: ProcessGroup | None, offset: int) -> dict[str, float]:
    mine = Tally()
    mine.add({"loss": torch.tensor(1.0 + rank_in(group) + offset), "other": torch.tensor(2.0)}, weight=0.5)
    mine.add({"other": torch.tensor(4.0), "loss": torch.tensor(10.0)}, weight=torch.tensor(1.5))
    return Reading(mine.means(group)).numbers()


def test_tally_is_the_weighted_mean_over_micro_batches_and_ranks() -> None:
    assert tally(None, 0) == {"loss": (0.5 * 1 + 1.5 * 10) / 2, "other": (0.5 * 2 + 1.5 * 4) / 2}
    for means in run_ranks(tally, 2, 0):
        assert means == {"loss": (0.5 * 1.5 + 1.5 * 10) / 2, "other": 3.5}
