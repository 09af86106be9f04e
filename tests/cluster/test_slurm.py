"""The sbatch recipe on a real Slurm: preempted or told to stop, put back into the queue, it ends as if nothing was."""

from pathlib import Path

import pytest

from tests.cluster.lab import Lab, missing
from tests.cluster.runs import STEPS, check_same, documented, steps_done, wait_until
from tests.cluster.slurm import PACKAGES, Slurm, log_of

pytestmark = pytest.mark.cluster


@pytest.fixture
def slurm(lab: Lab) -> Slurm:
    if reason := missing(PACKAGES):
        pytest.skip(reason)
    return Slurm(lab)


def submit(slurm: Slurm, config: Path, output: Path) -> str:
    """The documented command, for two nodes with a GPU and a core each."""
    (command,) = documented("sbatch", CONFIG=config)
    sbatch, *rest = smaller(command)
    return slurm.submit([sbatch, f"--output={slurm.folder}/%x-%j.log", *rest, f"output={output}"])


def smaller(command: list[str]) -> list[str]:
    """The same command for hosts with one GPU and two cores."""
    small = {"8": "1", "64": "1"}
    return [small.get(word, word) for word in command]


def ended(slurm: Slurm, job: str) -> bool:
    return slurm.state(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def finish(slurm: Slurm, job: str) -> str:
    """Wait for the job's end; what it printed, over all its starts."""
    wait_until(lambda: ended(slurm, job), f"the end of job {job}")
    text = log_of(job, slurm.folder)
    assert slurm.state(job)["JobState"] == "COMPLETED", text + slurm.troubles()
    return text


def test_preempted_it_goes_on_and_ends_alike(slurm: Slurm, config: Path, expected: Path, tmp_path: Path) -> None:
    output = tmp_path / "made"
    job = submit(slurm, config, output)
    wait_until(lambda: steps_done(output) > STEPS // 10, "a tenth of the steps")
    whole = ["--partition=first", "--nodes=2", "--exclusive"]
    urgent = slurm.submit(["sbatch", *whole, "--output=none", "--wrap=sleep 2"])
    wait_until(lambda: slurm.state(urgent)["JobState"] == "COMPLETED", "the job that took the nodes")
    preempted_at = steps_done(output)
    text = finish(slurm, job)
    print(f"preempted after step {preempted_at} of {STEPS}")
    assert STEPS // 10 < preempted_at < STEPS
    assert f"told to stop; saved at step {preempted_at}" in text
    assert f"job {job}, start 1, on node[1-2]" in text
    assert slurm.state(job)["Restarts"] == "1"
    check_same(output, expected)


def test_told_that_time_is_up_it_puts_itself_back(slurm: Slurm, config: Path, expected: Path, tmp_path: Path) -> None:
    output = tmp_path / "made"
    job = submit(slurm, config, output)
    wait_until(lambda: steps_done(output) > STEPS // 10, "a tenth of the steps")
    slurm.run("scancel", "--signal=USR1", job)  # what --signal=USR1@300 does when 300 s are left
    text = finish(slurm, job)
    assert f"job {job} ended with exit code 85" in text
    assert "told to stop; saved at step" in text
    assert slurm.state(job)["Restarts"] == "1"
    check_same(output, expected)


def test_an_error_is_not_tried_again(slurm: Slurm, config: Path, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path / "nothing.yaml", tmp_path / "made")
    wait_until(lambda: ended(slurm, job), f"the end of job {job}", 120)
    assert slurm.state(job)["JobState"] == "FAILED"
    assert slurm.state(job)["Restarts"] == "0"
    assert "nothing.yaml: no such file" in log_of(job, slurm.folder)


def test_srun_with_torchrun(slurm: Slurm, config: Path, expected: Path, tmp_path: Path) -> None:
    (command,) = documented("srun", CONFIG=config)
    started = slurm.start([*smaller(command), f"output={tmp_path / 'made'}"])
    assert started.wait() == 0, started.output + slurm.troubles()
    check_same(tmp_path / "made", expected)
