"""configs/datacomp/: every number is the published one."""

import math
from pathlib import Path
from typing import NamedTuple

import pytest

from mmfoundry.pipeline.config import load_yaml, parse
from mmfoundry.stages.pretrain import PretrainConfig

FOLDER = Path(__file__).parents[2] / "configs" / "datacomp"


class Scale(NamedTuple):
    batch_size: int
    learning_rate: float
    train_num_samples: int
    warmup: int
    patch: int
    width: int
    layers: int
    text_width: int
    embed_dim: int
    beta2: float


VIT_B, VIT_L = (768, 12, 512, 512), (1024, 24, 768, 768)
# github.com/mlfoundations/datacomp, scale_configs.py at 4a8df19, models written out; beta2 None is open_clip's 0.98
PUBLISHED = {
    "debug": Scale(1024, 1e-4, 128_000, 500, 32, *VIT_B, 0.98),
    "small": Scale(4096, 5e-4, 12_800_000, 500, 32, *VIT_B, 0.98),
    "medium": Scale(4096, 5e-4, 128_000_000, 500, 32, *VIT_B, 0.98),
    "large": Scale(8192, 5e-4, 1_280_000_000, 500, 16, *VIT_B, 0.98),
    "xlarge": Scale(90112, 1e-3, 12_800_000_000, 10_000, 14, *VIT_L, 0.95),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_scale_is_datacomps(name: str) -> None:
    config, published = parse(PretrainConfig, load_yaml(FOLDER / f"{name}.yaml")), PUBLISHED[name]
    trainer, model = config.trainer, config.model
    assert model is not None
    assert trainer.train_batch_size == published.batch_size
    assert trainer.max_steps == math.ceil(published.train_num_samples / published.batch_size)
    assert trainer.optimizer.lr == published.learning_rate
    assert trainer.scheduler.warmup_steps == published.warmup
    assert trainer.optimizer.betas == (0.9, published.beta2)
    vision, text = model.vision_cfg, model.text_cfg
    assert (vision.image_size, vision.patch_size, vision.width, vision.layers) == (
        224,
        published.patch,
        published.width,
        published.layers,
    )
    assert (text.context_length, text.vocab_size, text.width, text.layers) == (77, 49408, published.text_width, 12)
    assert model.embed_dim == published.embed_dim
    # what their train.py leaves to open_clip
    assert (trainer.optimizer.type, trainer.optimizer.eps, trainer.optimizer.weight_decay) == ("adamw", 1e-6, 0.2)
    assert (trainer.scheduler.type, trainer.scheduler.min_lr_ratio) == ("cosine", 0.0)
    assert trainer.gradient_clipping == 0
    assert (config.augmentation.scale, config.augmentation.ratio) == ((0.9, 1.0), (3 / 4, 4 / 3))
    assert config.augmentation.horizontal_flip == 0
    assert config.objectives == {"info_nce": 1.0}
    assert (model.init_logit_scale, model.max_logit_scale) == (math.log(1 / 0.07), 100.0)


def test_every_file_is_checked_here_or_small() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {*PUBLISHED, "cpu-tiny"}
    tiny = parse(PretrainConfig, load_yaml(FOLDER / "cpu-tiny.yaml"))
    assert tiny.trainer.max_steps * tiny.trainer.train_batch_size == 12_800_000 // 1000
