"""The report of a run: which kinds of stage show what, and the page made of it."""

from __future__ import annotations

import importlib
from pathlib import Path

from mmfoundry.pipeline.artifact import Artifact
from mmfoundry.pipeline.report import Maker, StageReport, write_report

# kind of stage -> module with `report(artifact, name) -> StageReport`; imported when a run has such an artifact
MAKERS = {
    "filter": "mmfoundry.stages.report_filter",
    "scenes": "mmfoundry.stages.report_scenes",
    "pretrain": "mmfoundry.stages.report_training",
    "instruct": "mmfoundry.stages.report_training",
    "eval": "mmfoundry.stages.report_eval",
    "adapt": "mmfoundry.stages.report_adapt",
    "release": "mmfoundry.stages.report_release",
}


def build_report(run_folder: str | Path) -> Path:
    """Write `report.html` of a run from its finished artifacts; returns its path.

    Raises:
        MissingInput: there is no finished artifact.
    """
    return write_report(run_folder, {kind: _maker(module) for kind, module in MAKERS.items()})


def _maker(module: str) -> Maker:
    def make(artifact: Artifact, name: str) -> StageReport:
        return importlib.import_module(module).report(artifact, name)

    return make
