"""stages/report_*.py: a run with every kind of artifact becomes one page that shows what each found."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mmfoundry.data.shards import write_shards
from mmfoundry.launch.catalog import OUR_STAGES
from mmfoundry.launch.report import MAKERS, build_report
from mmfoundry.models.io import save_clip
from mmfoundry.pipeline.artifact import Artifact, write_atomic
from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.distributed import Runtime
from mmfoundry.pipeline.stage import RunContext, Stage, StageConfig, run_stage
from mmfoundry.stages.eval import STAGE as EVAL
from mmfoundry.stages.eval import EvalConfig
from mmfoundry.stages.filter import STAGE as FILTER
from mmfoundry.stages.filter import FilterConfig
from mmfoundry.stages.report_tables import above_baselines, results_table
from mmfoundry.stages.scenes import STAGE as SCENES
from mmfoundry.stages.scenes import ScenesConfig
from tests.data.drawn import write_pictures
from tests.models.tiny import tiny_clip

TEXT = {"context_length": 16, "vocab_size": 49_408, "width": 16, "heads": 2, "layers": 2}
HOSTILE = "<script>alert(1)</script> <img src=x onerror=alert(2)>"
ROW = {"task": "adapt_clip", "value": 0.5, "low": 0.4, "high": 0.6, "n": 9, "chance": 0.1, "untrained": None}


def png(shade: int, side: int = 40) -> bytes:
    out = io.BytesIO()
    Image.linear_gradient("L").resize((side, side)).point(lambda value: (value + shade) % 256).convert("RGB").save(
        out, "PNG"
    )
    return out.getvalue()


def made(stage: str, output: Path, fill: Callable[[RunContext], None], **metrics: float) -> Artifact:
    """An artifact of a stage that takes long; what it writes is what the real one writes."""

    def run(_: StageConfig, context: RunContext) -> Artifact:
        fill(context)
        return context.finish(metrics)

    return run_stage(Stage(stage, StageConfig, run, ""), StageConfig(), output, Runtime())


def train(context: RunContext) -> None:
    for step in range(1, 41):
        context.log.scalars(step, {"loss": 5 / step, "lr": 1e-3}, phase="align")
        context.log.scalars(step, {"param_norm/text_model": step, "eval/recall": 1 / step}, phase="align")
        context.log.scalars(step, {"loss": 4 / step, "odd_one": step}, phase="tune")


def adapt(context: RunContext) -> None:
    train(context)
    rows = [ROW | {"metric": f"clip_{name}", "constant": 0.2} for name in ("before", "after")]
    write_atomic(context.work / "clip_results.json", json.dumps({"rows": rows}))
    example = {"pictures": ["000-0.png"], "right": True, "fields": {"is": HOSTILE, "after": ""}, "marked": []}
    write_atomic(context.work / "examples/adapt_clip/examples.json", json.dumps([example]))
    write_atomic(context.work / "examples/adapt_clip/000-0.png", png(0))


def release(context: RunContext) -> None:
    card = "# demo: CLIP for open_clip\n\n```python\nimport open_clip  # <here>\n```\n"
    write_atomic(context.work / "clip-open_clip/README.md", card)
    write_atomic(context.work / "checks/clip-open_clip.json", '{"difference": 4.8e-07}')


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    data = tmp_path_factory.mktemp("data")
    pairs = [
        {"__key__": f"{i:03}", "png": png(8 * i), "json": {"uid": f"{i:032x}", "captions": [f"{HOSTILE} number {i}"]}}
        for i in range(12)
    ]
    pairs[3]["png"] = pairs[2]["png"]
    pairs[4]["png"] = b"not a picture"
    for i, pair in enumerate(pairs):
        pair["json"]["truth"] = {"bad": {3: "exact_duplicate", 4: "truncated"}.get(i), "concept": "x", "of": None}
    write_shards(pairs, data / "pool")
    filters = {"all": ["readable", "exact_duplicate"]}
    config = {"pool": str(data / "pool"), "filters": filters, "max_unreadable": 0.2, "num_workers": 1}
    run_stage(FILTER, parse(FilterConfig, config), folder / "filter", Runtime())
    write_pictures(data / "pictures")
    sets = {"test": {"count": 8, "layout": {"canvas_size": 32}, "questions": {"count": 1}}}
    scenes = parse(ScenesConfig, {"pictures": str(data / "pictures"), "sets": sets})
    run_stage(SCENES, scenes, folder / "scenes", Runtime())
    for stage in ("pretrain", "instruct"):
        made(stage, folder / stage, train, loss=0.1)
    save_clip(tiny_clip(text_cfg=TEXT), data / "clip", seed=0)
    tree = {
        "clip": str(data / "clip"),
        "data": {"pictures": str(data / "pictures"), "scenes": str(folder / "scenes/test"), "questions": "unused"},
        "suite": "emoji",
        "only": ["zeroshot_names", "retrieval", "hard_negatives"],
    }
    tree["data"].pop("questions")
    run_stage(EVAL, parse(EvalConfig, tree), folder / "eval", Runtime())
    gains = {"clip_before": 0.5, "clip_after": 0.5, "clip_gain": 0.1, "clip_gain_low": 0.02, "clip_gain_high": 0.2}
    made("adapt", folder / "adapt", adapt, **gains)
    made("release", folder / "release", release, folders=1)
    return folder


def test_a_loss_is_no_share() -> None:
    rows = [
        ROW | {"metric": "held_accuracy"},
        ROW | {"metric": "held_loss", "value": 2.5, "high": 2.75, "unit": "nats"},
    ]
    text = str(results_table(rows, {}))
    assert text.count("<circle") == str(results_table(rows[:1], {})).count("<circle")  # no chart
    assert "<b>2.5000</b>" in text
    assert "0.4000–2.7500" in text
    assert "250" not in text  # percent


def test_every_stage_has_its_part(run_folder: Path) -> None:
    assert set(MAKERS) == set(OUR_STAGES)
    text = build_report(run_folder).read_text()
    for heading in (
        "Filtering",
        "Scenes",
        "Training: pretrain",
        "Adaptation",
        "Evaluation",
        "Retrieval",
        "Release",
        "Time",
    ):
        assert f">{heading}</h2>" in text, heading
    assert re.search(r"exact_duplicate: drops 1", text)
    assert "damaged image" in text or "unknown image format" in text
    assert text.count('class="chart"') >= 8  # two phases of two curves, in two stages, and those of adapt
    assert "odd one" in text
    folded = text.index("by part of the model, and by source")
    assert text.index("eval/recall") < folded < text.index("param norm/text model"), "evaluations are not folded away"
    assert "image_to_text_r5" in text
    assert "+10.0 points [+2.0, +20.0]" in text
    assert "import open_clip  # &lt;here&gt;" in text
    assert "5e-07" in text


def test_captions_and_answers_stay_text(run_folder: Path) -> None:
    text = build_report(run_folder).read_text()
    assert text.count("<script>") == 1  # ours
    assert "<img src=x" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert all(source.startswith(("data:image/webp;base64,", "#")) for source in sources)


def test_a_run_that_is_not_finished_is_shown_as_far_as_it_is(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    for name in ("filter", "scenes"):
        (tmp_path / "half" / name).symlink_to(run_folder / name)
    text = build_report(tmp_path / "half").read_text()
    assert "2 stages in" in text
    assert "Evaluation" not in text


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"low": 0.3, "chance": 0.1, "untrained": 0.2, "constant": 0.25}, True),
        ({"low": 0.3, "chance": 0.1, "untrained": 0.35, "constant": 0.25}, False),
        ({"low": 0.3, "chance": 0.3, "untrained": None, "constant": None}, False),
        ({"low": 0.3, "chance": None, "untrained": 0.9, "constant": None}, None),
    ],
)
def test_above_every_baseline(row: dict[str, float | None], expected: bool | None) -> None:
    assert above_baselines(row) is expected
