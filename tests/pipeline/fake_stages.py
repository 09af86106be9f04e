"""Small real stages for the tests of the spine: they read files, write files, and can be killed between two.

python fake_stages.py RECIPE.yaml OUTPUT     # runs a recipe of them, as the command would
"""

import os
import sys
import time
from pathlib import Path

from pydantic import Field

from mmfoundry.pipeline.artifact import Artifact, local_files, write_atomic
from mmfoundry.pipeline.config import ArtifactRef, StageConfig
from mmfoundry.pipeline.errors import MissingInput
from mmfoundry.pipeline.stage import RunContext, Stage


class CountConfig(StageConfig):
    """Counts to a number, one file a step."""

    source: ArtifactRef = Field(description="text files, joined into every step's file")
    steps: int = Field(3, ge=1, description="files to write")
    pause_s: float = Field(0.0, ge=0, description="seconds to wait before each step")
    fail_at: int = Field(-1, description="step at which to fail; -1 for never")
    full_disk: bool = Field(False, description="whether the disk is full at that step")


def count(config: CountConfig, context: RunContext) -> Artifact:
    """Write `step-N.txt` for N in range(steps); steps that an earlier run wrote are not written again."""
    text = "".join(file.read_text() for file in local_files(context.inputs["source"]) if file.suffix == ".txt")
    done = 0
    with context.progress(config.steps, "counting", "steps") as progress:
        for step in range(config.steps):
            file = context.work / f"step-{step}.txt"
            if not file.exists():
                time.sleep(config.pause_s)
                if step == config.fail_at:
                    if config.full_disk:
                        raise OSError(28, "No space left on device", str(file))
                    raise MissingInput(f"step {step} is told to fail")
                write_atomic(file, f"{text}{step} {os.getpid()}\n" if config.pause_s else f"{text}{step}\n")
                context.log.scalars(step + 1, {"step": step})
                done += 1
            progress.advance()
    return context.finish({"steps": config.steps, "written_now": done})


class JoinConfig(StageConfig):
    """Joins what other stages wrote."""

    parts: list[ArtifactRef] = Field(description="artifacts of count")
    shout: bool = Field(False, description="whether in capitals")


def join(config: JoinConfig, context: RunContext) -> Artifact:
    """Write `joined.txt` from the step files of every part."""
    files = [file for part in context.inputs.values() for file in sorted(part.glob("step-*.txt"))]
    text = "".join(file.read_text() for file in files)
    write_atomic(context.work / "joined.txt", text.upper() if config.shout else text)
    return context.finish({"files": len(files)})


STAGES = {
    "count": Stage("count", CountConfig, count, "counts to a number"),
    "join": Stage("join", JoinConfig, join, "joins what was counted"),
}


def main() -> None:
    """Run a recipe of these stages."""
    from mmfoundry.pipeline.recipe import load_recipe, run_recipe

    run_recipe(load_recipe(sys.argv[1], STAGES, output=Path(sys.argv[2])), say=lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
