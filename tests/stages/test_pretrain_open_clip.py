"""stages/pretrain.py, eval.py, release.py with models that open_clip's own module computes: CoCa, ConvNeXt, ResNet."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch.distributed import ProcessGroup

from mmfoundry.data.shards import write_shards
from mmfoundry.models.interop.any_clip import read_clip
from mmfoundry.models.open_clip_model import OpenClip, OpenClipConfig
from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.distributed import Runtime, init_runtime
from mmfoundry.pipeline.errors import ConfigError
from mmfoundry.pipeline.metrics import read_metrics
from mmfoundry.pipeline.stage import run_stage
from mmfoundry.stages.eval import STAGE as EVAL
from mmfoundry.stages.eval import EvalConfig
from mmfoundry.stages.filter_encoders import load_encoder
from mmfoundry.stages.pretrain import STAGE, PretrainConfig
from mmfoundry.stages.release import STAGE as RELEASE
from mmfoundry.stages.release import ReleaseConfig
from tests.models.tiny_open_clip import model_cfg
from tests.ranks import run_ranks

COLOURS = {"red": (220, 30, 30), "a square that is green": (30, 200, 30), "blue all over": (30, 30, 220)}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 squares of three colours, whose captions have unlike lengths."""
    folder = tmp_path_factory.mktemp("shards")

    def samples() -> Any:
        for number in range(48):
            caption = list(COLOURS)[number % 3]
            file = io.BytesIO()
            Image.fromarray(np.full((20, 20, 3), COLOURS[caption], np.uint8)).save(file, "png")
            tail, said = " indeed" * (number % 4), json.dumps({"name": caption}).encode()
            yield {"__key__": f"{number:04d}", "png": file.getvalue(), "txt": f"{caption}{tail}", "json": said}

    write_shards(samples(), folder, max_count=24)
    return folder


def tree(shards: Path, kind: str = "coca", **changes: Any) -> dict[str, Any]:
    trainer = {"train_batch_size": 12, "max_steps": 3, "optimizer": {"lr": 3e-3}, "scheduler": {"warmup_steps": 1}}
    config: dict[str, Any] = {
        "seed": 3,
        "data": [{"path": str(shards)}],
        "model": {"open_clip": model_cfg(kind, vocab_size=49_408, context_length=12)},
        "objectives": {"coca": 1.0} if kind == "coca" else {"info_nce": 1.0},
        "trainer": trainer | changes.pop("trainer", {}),
    }
    return config | changes


def logged(group: ProcessGroup | None, output: str, config: dict[str, Any]) -> list[dict[str, float]]:
    """Each step's numbers of a training here, on every rank."""
    done = run_stage(STAGE, parse(PretrainConfig, config), Path(output), init_runtime())
    return list(read_metrics(done.path / "metrics.jsonl"))


def curve(lines: list[dict[str, float]]) -> list[float]:
    return [line["loss"] for line in lines]


def test_both_losses_of_a_coca_fall_and_what_it_learnt_goes_on_its_way(shards: Path, tmp_path: Path) -> None:
    config = parse(PretrainConfig, tree(shards, trainer={"max_steps": 30, "ema": {"decay": 0.5}}))
    done = run_stage(STAGE, config, tmp_path / "pretrain", init_runtime())
    lines = list(read_metrics(done.path / "metrics.jsonl"))
    assert lines[-1]["caption_loss"] < lines[0]["caption_loss"] - 2
    assert lines[-1]["contrastive_loss"] < lines[0]["contrastive_loss"] - 0.3
    assert lines[-1]["loss"] == pytest.approx(lines[-1]["contrastive_loss"] + 2 * lines[-1]["caption_loss"])
    assert isinstance(read_clip(done.path / "ema"), OpenClip)

    task = {"task": "zero_shot", "pictures": {"data": "squares"}, "label": "name", "templates": ["{}"], "top": [1]}
    asked = {"clip": str(done.path), "data": {"squares": str(shards)}, "tasks": {"colours": task}}
    measured = run_stage(EVAL, parse(EvalConfig, asked), tmp_path / "eval", init_runtime())
    rows = {row["metric"]: row for row in json.loads((measured.path / "results.json").read_text())["rows"]}
    assert rows["colours"]["value"] == 1
    assert rows["colours"]["untrained"] < 1

    encoder = load_encoder(done.path, None, torch.device("cpu"), "fp32")
    pixels = np.full((20, 20, 3), COLOURS["red"], np.uint8)
    theirs = encoder.embed_images([encoder.prepare(pixels)]) @ encoder.embed_texts(list(COLOURS)).T
    assert theirs.argmax() == 0

    card = {"license": "apache-2.0"}
    asked = {"name": "coca", "clip": str(done.path), "card": card}
    with pytest.raises(ConfigError, match=r"clip_formats: transformers has no class for open_clip's CoCa; set \[open_"):
        run_stage(RELEASE, parse(ReleaseConfig, asked), tmp_path / "no", Runtime())
    released = run_stage(
        RELEASE, parse(ReleaseConfig, asked | {"clip_formats": ["open_clip"]}), tmp_path / "release", Runtime()
    )
    folder = released.path / "clip-open_clip"
    assert "open_clip's CoCa" in (folder / "README.md").read_text()
    model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).eval()
    assert type(model).__name__ == "CoCa"
    assert released.manifest.metrics["max_difference"] < 1e-5


def tiled(shards: Path, **trainer: Any) -> dict[str, Any]:
    return tree(shards, objectives={"coca": {"contrastive": {"tiled_info_nce": 1.0}}}, trainer=trainer)


@pytest.fixture(scope="module")
def joint(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """A CoCa's losses on one process."""
    return curve(logged(None, str(tmp_path_factory.mktemp("joint") / "out"), tiled(shards)))


def test_a_gradient_cache_gives_the_joint_losses(joint: list[float], shards: Path, tmp_path: Path) -> None:
    cached = curve(logged(None, str(tmp_path / "cached"), tiled(shards, grad_cache_chunk_size=3)))
    assert cached == pytest.approx(joint, rel=1e-5)


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2)), 1, 3])
def test_ranks_and_zero_stages_give_the_joint_losses(
    stage: int, joint: list[float], shards: Path, tmp_path: Path
) -> None:
    for found in run_ranks(logged, 2, str(tmp_path / "two"), tiled(shards, zero_optimization={"stage": stage})):
        assert curve(found) == pytest.approx(joint, rel=1e-5)


def test_micro_batches_weigh_tokens_and_pairs_each_in_its_way(shards: Path, tmp_path: Path) -> None:
    def config(objective: str, micro: int | None) -> dict[str, Any]:
        return tree(shards, objectives={objective: 1.0}, trainer={"train_micro_batch_size_per_gpu": micro})

    whole, halves = (logged(None, str(tmp_path / f"c{rows}"), config("captioning", rows)) for rows in (None, 6))
    assert curve(halves) == pytest.approx(curve(whole), rel=1e-5)
    assert [line["token_accuracy"] for line in halves] == pytest.approx([line["token_accuracy"] for line in whole])
    # with a contrastive part tokens are joined over micro-batches, pairs told apart within each
    whole, halves = (logged(None, str(tmp_path / f"both{rows}"), config("coca", rows)) for rows in (None, 6))
    assert halves[0]["caption_loss"] == pytest.approx(whole[0]["caption_loss"], rel=1e-5)
    assert halves[0]["contrastive_loss"] < whole[0]["contrastive_loss"] - 0.3
    for found in run_ranks(logged, 2, str(tmp_path / "two"), config("coca", 3)):
        assert curve(found) == pytest.approx(curve(halves), rel=1e-5)


def with_batch_norms(shards: Path, **trainer: Any) -> dict[str, Any]:
    # SGD-like steps: Adam's first ones are signs of gradients, which rounding decides where they are next to nothing
    optimizer = {"lr": 3e-3, "eps": 1e-2}
    return tree(shards, "resnet", trainer={"optimizer": optimizer, **trainer})


def statistics(group: ProcessGroup | None, output: str, config: dict[str, Any]) -> tuple[list[float], dict[str, Any]]:
    """Losses of a training here, and the statistics that its batch normalisations are left with."""
    losses = curve(logged(group, output, config))
    state = read_clip(output).state_dict()
    return losses, {name: value for name, value in state.items() if "running" in name or "tracked" in name}


@pytest.fixture(scope="module")
def normed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[str, Any]]:
    """A ResNet's losses and statistics on one process."""
    return statistics(None, str(tmp_path_factory.mktemp("normed") / "out"), with_batch_norms(shards))


@pytest.mark.parametrize(
    ("world", "stage"), [(2, 1), (2, 3), *(pytest.param(4, stage, marks=pytest.mark.slow) for stage in (0, 1, 2))]
)
def test_batch_norms_see_the_joint_batch(
    world: int, stage: int, normed: tuple[list[float], dict[str, Any]], shards: Path, tmp_path: Path
) -> None:
    config = with_batch_norms(shards, zero_optimization={"stage": stage})
    for losses, kept in run_ranks(statistics, world, str(tmp_path / "out"), config):
        assert losses == pytest.approx(normed[0], rel=1e-5)
        torch.testing.assert_close(kept, normed[1], rtol=1e-4, atol=1e-6)


def test_batch_norms_of_a_gradient_cache_see_each_chunk_once(shards: Path, tmp_path: Path) -> None:
    """As micro-batches do; and the pass that is made for the loss alone leaves no trace."""
    none = {"max_steps": 1, "optimizer": {"lr": 1e-30}}
    chunks = with_batch_norms(shards, grad_cache_chunk_size=6, **none)
    micro = with_batch_norms(shards, train_micro_batch_size_per_gpu=6, **none)
    by_chunk, by_micro = (statistics(None, str(tmp_path / n), c)[1] for n, c in (("c", chunks), ("m", micro)))
    torch.testing.assert_close(by_chunk, by_micro, rtol=0, atol=0)
    assert {int(value) for name, value in by_chunk.items() if "tracked" in name} == {2}
    shared = with_batch_norms(shards, grad_cache_chunk_size=3, **none)  # of each of two ranks: 6 in all
    for _, kept in run_ranks(statistics, 2, str(tmp_path / "two"), shared):
        assert {int(value) for name, value in kept.items() if "tracked" in name} == {2}


@pytest.mark.parametrize("kind", ["convnext", "resnet"])
def test_other_towers_learn(kind: str, shards: Path, tmp_path: Path) -> None:
    trainer = {"max_steps": 8, "optimizer": {"lr": 1e-3}, "precision": "bf16", "gradient_checkpointing": True}
    losses = curve(logged(None, str(tmp_path / "out"), tree(shards, kind, trainer=trainer)))
    assert min(losses[-3:]) < losses[0] - 0.5
    again = tree(shards, kind, trainer={"max_steps": 1}, model=None, initial=str(tmp_path / "out"))
    assert curve(logged(None, str(tmp_path / "more"), again))[0] < losses[0] - 0.2


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 3)])
def test_a_locked_resnet_stays_whole_and_what_it_costs_is_logged(
    world: int, stage: int, shards: Path, tmp_path: Path
) -> None:
    trainer = {"logging_steps": 1, "zero_optimization": {"stage": stage}}
    locked = tree(shards, "resnet", trainer=trainer, lock_image=True, lock_image_freeze_bn_stats=True)
    args = (str(tmp_path / "out"), locked)
    lines = logged(None, *args) if world == 1 else run_ranks(logged, world, *args)[0]
    assert all(line["tflops_per_device"] > 0 and line["tokens_per_second"] > 0 for line in lines)
    made = read_clip(tmp_path / "out").state_dict()
    start = OpenClip.from_seed(parse(PretrainConfig, locked).model, 3).state_dict()  # type: ignore[arg-type]
    changed = {name.split(".")[1] for name, value in start.items() if not torch.equal(value, made[name])}
    assert "visual" not in changed
    assert changed >= {"transformer", "text_projection", "logit_scale"}
    ours = {"model": "ViT-B-32", "objectives": {"info_nce": 1.0}}
    with pytest.raises(ConfigError, match="lock_image_freeze_bn_stats: our own ViT towers have no batch normalisation"):
        parse(PretrainConfig, tree(shards, **ours, lock_image=True, lock_image_freeze_bn_stats=True))


def test_patches_are_left_out_and_seen_again(shards: Path, tmp_path: Path) -> None:
    """FLIP, then its last steps on whole pictures: with open_clip's own dropout, which a saved config tells of."""
    none = {"max_steps": 1, "optimizer": {"lr": 1e-30}}
    outputs = {share: tmp_path / str(share) for share in (None, 0.5, 0.0)}
    losses = {None: curve(logged(None, str(outputs[None]), tree(shards, trainer=none)))}
    losses[0.5] = curve(logged(None, str(outputs[0.5]), tree(shards, trainer=none, force_patch_dropout=0.5)))
    again = {"model": None, "initial": str(outputs[0.5])}
    losses[0.0] = curve(logged(None, str(outputs[0.0]), tree(shards, trainer=none, force_patch_dropout=0.0, **again)))
    assert losses[0.5] != pytest.approx(losses[None], rel=1e-3)
    assert losses[0.0] == pytest.approx(losses[None], rel=1e-6)
    for share, found in ((0.5, "PatchDropout"), (0.0, "Identity")):
        model = read_clip(outputs[share])
        assert isinstance(model, OpenClip)
        assert type(model.open_clip.visual.patch_dropout).__name__ == found
        assert model.config.open_clip["vision_cfg"]["patch_dropout"] == share
    with pytest.raises(ConfigError, match=r"force_patch_dropout: open_clip cannot build .*patch_drop_rate"):
        logged(None, str(tmp_path / "no"), tree(shards, "convnext", force_patch_dropout=0.5))


@pytest.mark.parametrize("kind", ["resnet", "coca"])
def test_one_tower_is_taken_the_rest_starts_anew(kind: str, shards: Path, tmp_path: Path) -> None:
    none = {"max_steps": 1, "optimizer": {"lr": 1e-30}}
    logged(None, str(tmp_path / "start"), tree(shards, kind, trainer={"max_steps": 2}))
    start = read_clip(tmp_path / "start").state_dict()
    fresh = OpenClip.from_seed(parse(PretrainConfig, tree(shards, kind)).model, 4).state_dict()  # type: ignore[arg-type]
    for tower in ("image", "text"):
        again = {"model": None, "initial": str(tmp_path / "start"), "initial_towers": tower, "seed": 4}
        logged(None, str(tmp_path / tower), tree(shards, kind, trainer=none, **again))
        made = {n: v for n, v in read_clip(tmp_path / tower).state_dict().items() if v.is_floating_point()}
        weights = {name: value for name, value in made.items() if "running" not in name}
        tiny = {"rtol": 0, "atol": 1e-20}  # the step's; what is 0 at the start is not afterwards
        taken = {name for name, value in weights.items() if torch.allclose(value, start[name], **tiny)}
        new = {name for name, value in weights.items() if torch.allclose(value, fresh[name], **tiny)}
        alike = {name for name in weights if torch.allclose(start[name], fresh[name], **tiny)}  # nothing was learnt
        assert taken | new == weights.keys()
        pictures = {name for name in weights if name.startswith("open_clip.visual.")}
        words = {"open_clip.logit_scale"} | {name for name in weights if "text_decoder" in name}
        texts = weights.keys() - pictures - words
        own = pictures if tower == "image" else texts
        assert own <= taken
        assert taken - own <= alike
        assert len(own - alike) > 8


def test_groups_of_captions_of_like_length_change_nothing_but_the_cost(shards: Path, tmp_path: Path) -> None:
    plain, grouped = (
        logged(None, str(tmp_path / f"g{n}"), tree(shards, "convnext", text_groups=n, trainer={"logging_steps": 1}))
        for n in (1, 3)
    )
    assert curve(grouped) == pytest.approx(curve(plain), rel=1e-5)
    assert all(b["tokens_per_second"] > 0 for b in grouped)
    with pytest.raises(ConfigError, match="text_groups: the model reads its captions' padding"):
        logged(None, str(tmp_path / "no"), tree(shards, text_groups=2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "coca_roberta-ViT-B-32"}, "this CoCa's text tower and its decoder differ in vocabulary"),
        ({"text_packing": True}, "text_packing: only our own text towers have it"),
        ({"lock_image_freeze_bn_stats": True}, "lock_image_freeze_bn_stats is for a locked tower: set lock_image"),
        (
            {"force_patch_dropout": 0.5, "model": "RN50", "objectives": {"info_nce": 1.0}},
            "force_patch_dropout: this model's image tower is a ResNet, which has no patches",
        ),
        ({"model": "ViT-B-32"}, "captioning needs a model with a text decoder, such as open_clip's coca_ViT-B-32"),
        ({"objectives": {"siglip": 1.0}}, r"needs model\.init_logit_bias"),
        ({"model": {"open_clip": "RN50", "embed_dim": 3}}, r"model\.embed_dim is not a known key"),
        ({"model": {"open_clop": "RN50"}}, r"model\.open_clop is not a known key"),
    ],
)
def test_what_is_refused_before_anything_runs(changes: dict[str, Any], message: str, shards: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse(PretrainConfig, tree(shards, **changes))
    assert "\n" not in str(caught.value)


def test_names_become_the_class_that_can_express_them(shards: Path) -> None:
    for name, theirs in (("RN50", True), ("coca_ViT-B-32", True), ("ViT-B-32", False)):
        config = parse(PretrainConfig, tree(shards, model=name, objectives={"info_nce": 1.0}))
        assert isinstance(config.model, OpenClipConfig) == theirs
        assert parse(PretrainConfig, config.model_dump(mode="json")) == config  # as a manifest holds it
