"""stages/pretrain.py: a tiny CLIP learns tiny shards, on one process and, through the launcher, on two."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.distributed import ProcessGroup

from mmfoundry.data.decode import UnreadableSample
from mmfoundry.data.loader import stack
from mmfoundry.data.pairs import pad_text
from mmfoundry.data.sample import Sample
from mmfoundry.data.shards import write_shards
from mmfoundry.models.clip import CLIP
from mmfoundry.models.io import load_clip, untrained_clip
from mmfoundry.pipeline.artifact import Artifact
from mmfoundry.pipeline.config import load_yaml, parse
from mmfoundry.pipeline.distributed import init_runtime
from mmfoundry.pipeline.errors import ConfigError, MmfoundryError
from mmfoundry.pipeline.metrics import read_metrics
from mmfoundry.pipeline.stage import run_stage
from mmfoundry.stages.pretrain import STAGE, AugmentationConfig, PretrainConfig, TeacherConfig, encoder_of
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (250, 250, 250)}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 squares of four colours, each with two captions."""
    folder = tmp_path_factory.mktemp("shards")
    generator = np.random.default_rng(0)

    def samples() -> Any:
        for number in range(64):
            name = list(COLOURS)[number % 4]
            noise = generator.integers(-20, 20, (20, 20, 3))
            pixels = np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "png")
            yield {"__key__": f"{number:04d}", "png": file.getvalue(), "txt": f"{name}\na square that is {name}"}

    write_shards(samples(), folder, max_count=32)
    return folder


def tree(shards: Path, **changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "seed": 3,
        "data": [{"path": str(shards)}],
        "model": {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
            "text_cfg": {"context_length": 12, "width": 16, "heads": 2, "layers": 2},
        },
        "trainer": {
            "train_batch_size": 16,
            "max_steps": 30,
            "optimizer": {"lr": 3e-3},
            "scheduler": {"warmup_steps": 3},
            "logging_steps": 1,
        },
    }
    return config | changes


def losses(artifact: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(artifact / "metrics.jsonl")]


def test_learns_and_leaves_a_whole_artifact(shards: Path, tmp_path: Path) -> None:
    config = parse(PretrainConfig, tree(shards))
    artifact = run_stage(STAGE, config, tmp_path / "pretrain", init_runtime())
    metrics, curve = artifact.manifest.metrics, losses(artifact.path)
    assert len(curve) == 30
    # Four of each colour in a batch cannot be told apart: nobody gets below log 4
    assert curve[0] > 2.5
    assert metrics["loss"] == pytest.approx(curve[-1])  # the mean over the last twentieth of the steps
    assert curve[-1] < 2.2
    assert metrics["samples_seen"] == 30 * 16
    assert metrics["samples_per_second"] > 0
    model, untrained = load_clip(artifact.path), untrained_clip(artifact.path)
    assert sum(weight.numel() for weight in model.parameters()) == metrics["parameters"]
    encoder = encoder_of(model.config, AugmentationConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0)))
    rows = [
        encoder(Sample("x", np.full((20, 20, 3), colour, np.uint8), [name]), np.random.default_rng(0))
        for name, colour in COLOURS.items()
    ]
    with torch.no_grad():
        trained, before = (each(pad_text(stack(rows))) for each in (model, untrained))
    assert torch.equal((trained.image_bD @ trained.text_bD.T).argmax(1), torch.arange(4))
    assert not torch.equal((before.image_bD @ before.text_bD.T).argmax(1), torch.arange(4))
    again = run_stage(STAGE, config, tmp_path / "pretrain", init_runtime())
    assert again.manifest.created == artifact.manifest.created


def test_worker_processes_change_nothing(shards: Path, tmp_path: Path) -> None:
    trainer = tree(shards)["trainer"] | {"max_steps": 3}
    curves = []
    for workers in ("thread", "process"):
        loader = {"num_workers": 2, "workers": workers}
        config = parse(PretrainConfig, tree(shards, trainer=trainer, loader=loader))
        artifact = run_stage(STAGE, config, tmp_path / workers, init_runtime())
        assert artifact.manifest.metrics["samples_skipped"] == 0
        curves.append(losses(artifact.path))
    assert curves[0] == curves[1]


def test_cut_off_and_started_again_it_ends_alike(shards: Path, tmp_path: Path) -> None:
    config = parse(PretrainConfig, tree(shards))
    whole = run_stage(STAGE, config, tmp_path / "whole", init_runtime())
    stopped = threading.Event()

    def stop_in_the_middle() -> None:
        log = tmp_path / "cut.work" / "metrics.jsonl"
        while not stopped.is_set() and not (log.exists() and len(log.read_text().splitlines()) > 5):
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=stop_in_the_middle)
    watcher.start()
    try:
        with pytest.raises(SystemExit, match="85"):
            run_stage(STAGE, config, tmp_path / "cut", init_runtime())
    finally:
        stopped.set()
        watcher.join()
    assert 5 < len(losses(tmp_path / "cut.work")) < 30
    resumed = run_stage(STAGE, config, tmp_path / "cut", init_runtime())
    assert losses(resumed.path) == losses(whole.path)
    assert (resumed.path / "model.safetensors").read_bytes() == (whole.path / "model.safetensors").read_bytes()


def test_goes_on_from_a_trained_model(shards: Path, tmp_path: Path) -> None:
    trainer = tree(shards)["trainer"] | {"max_steps": 2}
    first = run_stage(STAGE, parse(PretrainConfig, tree(shards, trainer=trainer)), tmp_path / "a", init_runtime())
    changes = {"model": None, "initial": str(first.path), "trainer": trainer | {"optimizer": {"lr": 1e-9}}}
    second = run_stage(STAGE, parse(PretrainConfig, tree(shards, **changes)), tmp_path / "b", init_runtime())
    before, after = load_clip(first.path).state_dict(), load_clip(second.path).state_dict()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-6, rtol=0)
    assert json.loads((second.path / "config.json").read_text())["init_seed"] is None
    config = parse(PretrainConfig, tree(shards, **changes, objectives={"siglip": 1.0}))
    with pytest.raises(ConfigError, match="has no logit bias, which the siglip objective needs"):
        run_stage(STAGE, config, tmp_path / "c", init_runtime())


def test_a_locked_tower_stays_and_a_fresh_one_learns(shards: Path, tmp_path: Path) -> None:
    trainer = tree(shards)["trainer"] | {"max_steps": 2}
    first = run_stage(STAGE, parse(PretrainConfig, tree(shards, trainer=trainer)), tmp_path / "a", init_runtime())
    changes = {
        "model": None,
        "initial": str(first.path),
        "initial_towers": "image",
        "lock_image": True,
        "lock_image_unlocked_groups": 1,
        "force_patch_dropout": 0.5,
        "objectives": {"matryoshka": {"weight": 0.5, "over": {"tiled_info_nce": 1.0}}},
        "trainer": trainer,
        "seed": 1,
    }
    second = run_stage(STAGE, parse(PretrainConfig, tree(shards, **changes)), tmp_path / "b", init_runtime())
    before, after = load_clip(first.path), load_clip(second.path)
    assert after.config.vision_cfg.patch_dropout == 0.5
    weights, fresh = after.state_dict(), CLIP.from_seed(before.config, 1).state_dict()
    for name, value in before.state_dict().items():
        assert torch.equal(weights[name], value) == name.startswith("vision_model."), name
        if name.startswith("text_model.encoder") and value.ndim == 2:  # two steps from the seed, not from the first run
            assert (weights[name] - fresh[name]).abs().max() < (weights[name] - value).abs().max()


def test_a_student_learns_from_a_model_and_from_stored_embeddings(shards: Path, tmp_path: Path) -> None:
    trainer = tree(shards)["trainer"] | {"max_steps": 2}
    teaching = run_stage(STAGE, parse(PretrainConfig, tree(shards, trainer=trainer)), tmp_path / "a", init_runtime())
    stored = tmp_path / "stored"
    told = {"image": [1.0, 2.0, 3.0], "text": [[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]}
    samples = (
        {
            "__key__": f"{number}",
            "png": picture(number),
            "txt": "one\ntwo",
            "json": json.dumps({"told": told["image"], "said": told["text"]}).encode(),
            "told.npy": npy(told["image"]),
            "said.npy": npy(told["text"]),
        }
        for number in range(16)
    )
    write_shards(samples, stored, max_count=16)
    changes = {
        "data": [{"path": str(stored)}],
        "trainer": trainer,
        "seed": 1,
        "objectives": {"info_nce": 1.0, "distillation": {"weight": 0.5, "similarity": 1.0}},
        "teachers": {
            "big": {"clip": str(teaching.path)},
            "kept": {"image": "told", "text": "said", "scale": 50.0},
            "arrays": {"image": "told.npy", "text": "said.npy", "embed_dim": 3},
        },
    }
    found = run_stage(STAGE, parse(PretrainConfig, tree(shards, **changes)), tmp_path / "b", init_runtime())
    lines = read_metrics(found.path / "metrics.jsonl")
    assert all(line["distillation/similarity"] > 0 for line in lines if "loss" in line)
    missing = changes | {"teachers": {"kept": {"image": "nothing", "text": "said"}}}
    with pytest.raises(MmfoundryError, match="stored embeddings"):
        run_stage(STAGE, parse(PretrainConfig, tree(shards, **missing)), tmp_path / "c", init_runtime())


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((20, 20, 3), number * 10, np.uint8)).save(file, "png")
    return file.getvalue()


def npy(numbers: list[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(numbers, np.float16), allow_pickle=False)
    return file.getvalue()


def test_stored_embeddings_follow_their_caption(shards: Path) -> None:
    config = parse(PretrainConfig, tree(shards))
    pixels = np.zeros((24, 20, 3), np.uint8)
    said = {"v": [1.0, 2.0], "t": [[1.0, 0.0], [0.0, 1.0]]}
    encoder = encoder_of(config.model, config.augmentation, {"a": TeacherConfig(image="v", text="t")})
    for seed in range(8):
        pair = encoder(Sample("key", pixels, ["one", "two words"], meta=said), np.random.default_rng(seed))
        first = pair["teacher_text/a"][0] == 1.0
        assert len(pair["text"].values) == (3 if first else 4)
        assert pair["teacher_image/a"].dtype == np.float32
    lacking = [{}, said | {"v": "x"}, said | {"t": [[1.0, 0.0]]}, said | {"v": [float("nan"), 0.0]}]
    for wrong in [*lacking, said | {"v": [1.0, 2.0, 3.0]}]:
        with pytest.raises(UnreadableSample, match="stored embeddings"):
            encoder(Sample("key", pixels, ["one", "two"], meta=wrong), np.random.default_rng(0))


def test_sixteen_bits_learn_as_well(shards: Path, tmp_path: Path) -> None:
    trainer = tree(shards)["trainer"] | {"max_steps": 8}
    full, half = (
        losses(
            run_stage(
                STAGE, parse(PretrainConfig, config), tmp_path / config["trainer"]["precision"], init_runtime()
            ).path
        )
        for config in (tree(shards, trainer=trainer | {"precision": name}) for name in ("fp32", "bf16"))
    )
    assert half != full
    assert half == pytest.approx(full, rel=0.03)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"initial": "x"}, "give either model"),
        ({"model": None}, "give either model"),
        ({"objectives": {"info_nec": 1.0}}, "unknown objective 'info_nec'; did you mean info_nce"),
        ({"objectives": {"siglip": 1.0}}, "needs model.init_logit_bias"),
        ({"objectives": {"info_nce": {"weight": 1.0, "tile": 3}}}, "objectives.info_nce has no options"),
        ({"objectives": {"matryoshka": {"over": {"siglip": 1.0}}}}, "needs model.init_logit_bias"),
        ({"objectives": {"distillation": 1.0}}, "distillation objective and teachers go together"),
        ({"teachers": {"a": {"clip": "x"}}}, "distillation objective and teachers go together"),
        ({"teachers": {"a": {"clip": "x", "image": "y"}}}, "teachers.a: a teacher has either clip"),
        ({"teachers": {"a": {"clip": "x", "embed_dim": 3}}}, "embed_dim is for stored embeddings"),
        ({"lock_image_unlocked_groups": 1}, "is for a locked tower: set lock_image"),
        ({"initial_towers": "image"}, "initial_towers says which towers of initial are taken"),
        ({"data": []}, "data"),
        ({"trainer": {"train_batch_size": 16}}, "give one of max_steps, max_samples and max_epochs; given: none"),
        ({"trainer": {"train_batch_size": 16, "max_steps": 2, "max_epochs": 1}}, "given: max_steps, max_epochs"),
    ],
)
def test_config_errors(changes: dict[str, Any], message: str, shards: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(PretrainConfig, tree(shards, **changes))


def test_budgets_in_samples_and_epochs_and_what_was_seen(shards: Path, tmp_path: Path) -> None:
    for index in shards.glob("*.idx"):
        index.unlink()
    count, name = 64, str(shards)
    source = {"path": name, "upsampling": 2}
    trainer = {key: value for key, value in tree(shards)["trainer"].items() if key != "max_steps"}
    for budget, steps in ({"max_samples": 50}, 3), ({"max_epochs": 1.5}, round(1.5 * 2 * count) // 16):
        config = tree(shards, data=[source], trainer=trainer | budget, loader={"index_dir": str(tmp_path / "indexes")})
        artifact = run_stage(STAGE, parse(PretrainConfig, config), tmp_path / "-".join(budget), init_runtime())
        *_, last = read_metrics(artifact.path / "metrics.jsonl")
        seen, repeats = 16 * steps, max(0, 16 * steps - count)
        assert last["step"] == steps
        assert [last[f"{what}/{name}"] for what in ("seen", "unique", "repeats")] == [seen, seen - repeats, repeats]
        metrics = artifact.manifest.metrics
        assert (metrics["samples_seen"], metrics["samples_repeated"]) == (seen, repeats)
    assert [*shards.glob("*.idx")] == []
    assert [*(tmp_path / "indexes").iterdir()] != []
    small = tree(shards, trainer=trainer | {"max_samples": 15})
    with pytest.raises(ConfigError, match="15 samples are less than one step of train_batch_size 16"):
        run_stage(STAGE, parse(PretrainConfig, small), tmp_path / "small", init_runtime())


def test_vocabulary_must_be_the_tokenizers(shards: Path) -> None:
    model = tree(shards)["model"]
    model["text_cfg"]["vocab_size"] = 100
    config = parse(PretrainConfig, tree(shards, model=model))
    with pytest.raises(ConfigError, match="vocab_size is 100, but CLIP's tokenizer has 49408 ids"):
        encoder_of(config.model, config.augmentation)


def test_pairs_are_functions_of_their_generator(shards: Path) -> None:
    model = parse(PretrainConfig, tree(shards)).model
    pixels = np.random.default_rng(1).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    sample = Sample("key", pixels, ["one", "two words", "three words here"])
    encoder = encoder_of(model, AugmentationConfig())
    first, second, other = (encoder(sample, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert np.array_equal(first["image"], second["image"])
    assert not np.array_equal(first["image"], other["image"])
    assert first["image"].shape == (3, 16, 16)
    assert first["__key__"] == "key"
    texts = {encoder(sample, np.random.default_rng(seed))["text"].values.tobytes() for seed in range(30)}
    assert len(texts) == 3
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    square = Sample("key", pixels[:20], ["one"])
    plain, mirrored = (
        encoder_of(model, AugmentationConfig(horizontal_flip=chance, **whole))(square, np.random.default_rng(0))
        for chance in (0.0, 1.0)
    )
    assert np.array_equal(plain["image"][:, :, ::-1], mirrored["image"])
    batch = pad_text(stack([first, other]))
    assert batch["image"].dtype == torch.uint8
    assert batch["text"].shape[1] <= 5
    assert batch["__key__"] == ["key", "key"]


def train_here(group: ProcessGroup | None, output: str, config: dict[str, Any]) -> list[float]:
    return losses(run_stage(STAGE, parse(PretrainConfig, config), output, init_runtime()).path)


def test_ranks_and_zero_stages_give_the_joint_losses(shards: Path, tmp_path: Path) -> None:
    trainer = tree(shards)["trainer"] | {"max_steps": 4}
    model = tree(shards)["model"] | {"init_logit_bias": -10.0}
    changes = {"trainer": trainer, "model": model, "objectives": {"info_nce": 1.0, "siglip": 0.5}}
    expected = train_here(None, str(tmp_path / "one"), tree(shards, **changes))
    for stage in (0, 2, 3):  # 1: below, through the launcher
        changes["trainer"] = trainer | {"zero_optimization": {"stage": stage}}
        for found in run_ranks(train_here, 2, str(tmp_path / f"two-{stage}"), tree(shards, **changes)):
            assert found == pytest.approx(expected, rel=1e-5)
    one, two = (load_clip(tmp_path / name).state_dict() for name in ("one", "two-3"))
    for name, value in one.items():
        # Adam turns what rounding leaves of a gradient near zero into a step of up to the learning rate
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=3e-4)


def test_two_ranks_from_the_launcher_and_one_process_give_the_same_losses(shards: Path, tmp_path: Path) -> None:
    trainer = tree(shards)["trainer"] | {"max_steps": 6, "zero_optimization": {"stage": 1}}
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump({**tree(shards), "trainer": trainer}))
    one = run_stage(STAGE, parse(PretrainConfig, load_yaml(config)), tmp_path / "one", init_runtime())
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", str(free_port())]
    command = [*launcher, "launch/pretrain.py", str(config), f"output={tmp_path / 'two'}"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    two = Artifact.open(tmp_path / "two")
    assert (one.manifest.environment["ranks"], two.manifest.environment["ranks"]) == ("1", "2")
    assert len(losses(one.path)) == 6
    assert losses(two.path) == pytest.approx(losses(one.path), rel=1e-5)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
