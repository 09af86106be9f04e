"""stages/adapt.py, the part about CLIPs: new names are learnt, measured against a probe, and load in peft."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmfoundry.data.reader import Pool
from mmfoundry.data.text import clip_tokenizer
from mmfoundry.evals.embed import embed_pictures
from mmfoundry.evals.samples import select
from mmfoundry.evals.task import Clip
from mmfoundry.evals.zero_shot import class_embeddings
from mmfoundry.models.interop.load import load_any_clip
from mmfoundry.models.interop.transformers_clip import to_transformers_config, to_transformers_state
from mmfoundry.models.io import save_clip
from mmfoundry.pipeline.artifact import Artifact
from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.distributed import Runtime, init_runtime
from mmfoundry.pipeline.errors import ConfigError
from mmfoundry.pipeline.stage import run_stage
from mmfoundry.stages.adapt import STAGE, AdaptConfig
from mmfoundry.stages.adapt_clip import ADAPTER, RESULTS, few_shot
from mmfoundry.stages.scenes import STAGE as SCENES
from mmfoundry.stages.scenes import ScenesConfig
from tests.data.drawn import write_pictures
from tests.models.tiny import tiny_clip
from tests.ranks import run_ranks
from tests.stages.vlm_parts import trainer

TEXT = {"context_length": 16, "vocab_size": 49_408, "width": 16, "heads": 2, "layers": 2}
SHOTS = 3


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`scenes/{shots,test}` of four held-out things, `scenes/{old,old_test}` of sixteen others, and `clip`."""
    folder = tmp_path_factory.mktemp("parts")
    write_pictures(folder / "pictures")
    layout = {"canvas_size": 32, "arrangement": "single"}
    sets = {
        name: {"count": 16, "concepts": "heldout" if name in ("shots", "test") else "train", "layout": layout}
        for name in ("shots", "test", "old", "old_test")
    }
    config = parse(ScenesConfig, {"pictures": str(folder / "pictures"), "sets": sets})
    run_stage(SCENES, config, folder / "scenes", Runtime())
    save_clip(tiny_clip(text_cfg=TEXT), folder / "clip", seed=0)
    return folder


def tree(parts: Path, **changes: Any) -> dict[str, Any]:
    clip: dict[str, Any] = {
        "model": str(parts / "clip"),
        "train": str(parts / "scenes/shots"),
        "test": str(parts / "scenes/test"),
        "shots": SHOTS,
        "old": {"train": str(parts / "scenes/old"), "test": str(parts / "scenes/old_test"), "share": 0.5},
        "lora": {"rank": 4, "alpha": 8, "first_layer": {"vision": 1, "text": 0}},
        "trainer": trainer(60, batch=16, lr=1e-2),
    }
    return {"seed": 4, "clip": clip | changes}


@pytest.fixture(scope="module")
def adapted(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return run_stage(STAGE, parse(AdaptConfig, tree(parts)), tmp_path_factory.mktemp("adapt") / "adapt", init_runtime())


def test_learns_and_reports(adapted: Artifact) -> None:
    metrics = adapted.manifest.metrics
    assert metrics["clip_after"] > metrics["clip_before"]
    assert metrics["clip_gain"] == pytest.approx(metrics["clip_after"] - metrics["clip_before"])
    assert metrics["clip_constant"] == 0.25
    names = ["before", "after", "linear_probe", "among_all", "gain", "gain_over_linear_probe"]
    for name in [*names, "old_before", "old_after", "old_change"]:
        assert metrics[f"clip_{name}_low"] <= metrics[f"clip_{name}"] <= metrics[f"clip_{name}_high"]
    rows = json.loads((adapted.path / RESULTS).read_text())["rows"]
    metrics_of_rows = ["clip_before", "clip_linear_probe", "clip_after", "clip_among_all"]
    assert [row["metric"] for row in rows] == [*metrics_of_rows, "clip_old_before", "clip_old_after"]
    assert [row["chance"] for row in rows] == [1 / 4, 1 / 4, 1 / 4, 1 / 20, 1 / 16, 1 / 16]
    assert len(json.loads((adapted.path / "examples/adapt_clip/examples.json").read_text())) == 16


def test_learns_from_the_shots_and_nothing_else(parts: Path, adapted: Artifact) -> None:
    shots = select(Pool(adapted.path / "shots"), {})
    given = select(Pool(parts / "scenes/shots"), {})
    assert len(shots) == 4 * SHOTS
    assert {name: shots.field("concept").count(name) for name in shots.field("concept")} == dict.fromkeys(
        given.field("concept"), SHOTS
    )
    first = given.meta[: 4 * SHOTS]  # the concepts take turns
    assert shots.meta == first


def test_the_adapter_loads_on_the_released_model(parts: Path, adapted: Artifact, tmp_path: Path) -> None:
    from peft import PeftModel

    ours = load_any_clip(parts / "clip")
    released = released_clip(ours)
    pixels = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    before = released.get_image_features(ours.pixels(pixels)).pooler_output.detach()
    peft = PeftModel.from_pretrained(released, str(adapted.path / ADAPTER))
    after = peft.get_image_features(ours.pixels(pixels)).pooler_output
    assert (after - before).abs().max() > 1e-2
    # What was measured is what was saved: through peft's model as many of the test pictures are right.
    test = select(Pool(parts / "scenes/test"), {})
    tokenize = clip_tokenizer(TEXT["context_length"])

    def encode_text(texts: list[str]) -> torch.Tensor:
        ids = torch.from_numpy(tokenize(texts)).long()
        # transformers' attention mask only hides padding behind the end, which a causal model does not see
        return torch.nn.functional.normalize(peft.get_text_features(input_ids=ids).pooler_output, dim=1)

    def encode_image(pictures: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(peft.get_image_features(ours.pixels(pictures)).pooler_output, dim=1)

    theirs = Clip(encode_image, encode_text, 16)
    names = sorted(set(test.field("concept")))
    words = [test.captions[test.field("concept").index(name)][0] for name in names]
    with torch.no_grad():
        head = class_embeddings(theirs, words, ["{}"])
    guesses = (embed_pictures(theirs, test, Runtime()) @ head.T).argmax(1)
    right = [names[guess] == label for guess, label in zip(guesses, test.field("concept"), strict=True)]
    assert sum(right) / len(right) == pytest.approx(adapted.manifest.metrics["clip_after"])


def released_clip(ours: Any) -> Any:
    """transformers' CLIPModel with our weights."""
    from transformers import CLIPConfig, CLIPModel

    model = CLIPModel(CLIPConfig(**to_transformers_config(ours.config))).eval()
    model.load_state_dict(to_transformers_state(ours), strict=False)
    return model


def test_two_ranks_learn_what_one_does(parts: Path, tmp_path: Path) -> None:
    alone = run_stage(STAGE, parse(AdaptConfig, tree(parts, trainer=SHORT)), tmp_path / "one", init_runtime())
    first, second = run_ranks(adapt_on_rank, 2, str(parts), str(tmp_path / "two"))
    assert first == second
    expected = {name: value for name, value in alone.manifest.metrics.items() if name.startswith("clip_")}
    # float32 sums in another order: the loss may differ in its last digits, a picture at the edge may tip over
    assert first["clip_loss"] == pytest.approx(expected["clip_loss"], rel=1e-4)
    assert first["clip_before"] == expected["clip_before"]
    assert first["clip_after"] == pytest.approx(expected["clip_after"], abs=1 / 16 + 1e-9)


SHORT = trainer(4, batch=8, lr=1e-2)


def adapt_on_rank(group: Any, parts: str, output: str) -> dict[str, float]:
    rank, world = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    runtime = Runtime(rank, world, rank, torch.device("cpu"), group)
    return run_stage(STAGE, parse(AdaptConfig, tree(Path(parts), trainer=SHORT)), output, runtime).manifest.metrics


def test_too_few_pictures_and_other_classes_are_refused(parts: Path, tmp_path: Path) -> None:
    samples = select(Pool(parts / "scenes/shots"), {})
    with pytest.raises(ConfigError, match="has 4 pictures; lower `shots`"):
        few_shot(samples, "concept", 5)
    config = parse(AdaptConfig, tree(parts, test=str(parts / "pictures")))
    with pytest.raises(ConfigError, match="different classes"):
        run_stage(STAGE, config, tmp_path / "adapt", Runtime())
