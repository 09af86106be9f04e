"""The arms of the study of learning: what each changes of the baseline's training, as on the command line."""

from __future__ import annotations

from dataclasses import dataclass

BASE, BASE_OPTIMIZER = "info_nce", "adamw"
CONTEXT = 77  # positions of a caption
SEARCH_STEPS = 150
RATES: dict[str, tuple[float, ...]] = {
    "adamw": (7.5e-4, 1.5e-3, 3e-3),
    "lion": (1e-4, 2e-4, 4e-4),
    "adan": (1.5e-3, 3e-3, 6e-3),
    "lamb": (3e-3, 1e-2, 3e-2),
    "muon": (7.5e-4, 1.5e-3, 3e-3, 6e-3),
    "sgd_sai": (1e-2, 3e-2, 1e-1),
}


@dataclass(frozen=True)
class Arm:
    """One row of the table.

    Attributes:
        name: in the table, and of folders.
        overrides: of the training, as on the command line; `BASELINE` stands for the baseline's folder, `HELD_OUT` for
            that of pairs to measure on.
        of: the arm whose training this one is a by-product of; its own where it is empty.
        model: folder in the training's with the model that is measured.
        width: to which the embeddings are cut before they are measured; 0: not cut.
        padded: whether captions go through the text tower at their full length.
        optimizer: in the registry.
        rate: learning rate; 0: the best of `RATES`.
        steps: of the training; 0: as the recipe says.
    """

    name: str
    overrides: tuple[str, ...] = ()
    of: str = ""
    model: str = ""
    width: int = 0
    padded: bool = False
    optimizer: str = BASE_OPTIMIZER
    rate: float = 0.0
    steps: int = 0

    @property
    def place(self) -> str:
        """The name as a folder's."""
        return self.name.replace(",", "").replace(" ", "-")


SOUP = ("trainer.save_steps=20", "trainer.keep_checkpoints=4", "soup.checkpoints=4")
GREEDY = (*SOUP, "soup.type=greedy", "soup.data=HELD_OUT", "soup.samples=512")
TEACHER = "teachers.base.clip=BASELINE"
ARMS = [
    Arm(BASE, SOUP),
    Arm("tiled_info_nce", ("objectives={tiled_info_nce: 1.0}",)),
    Arm("siglip", ("objectives={siglip: 1.0}", "model.init_logit_bias=-10", "model.init_logit_scale=2.3026")),
    # -10 is the log odds of a pair in batches of about 22,000; of 128 there are 127 to 1
    Arm(
        "siglip, bias -4.8",
        ("objectives={siglip: 1.0}", "model.init_logit_bias=-4.844", "model.init_logit_scale=2.3026"),
    ),
    Arm("info_nce and siglip", ("objectives={info_nce: 0.5, siglip: 0.5}", "model.init_logit_bias=-10")),
    Arm("distillation", ("objectives={info_nce: 0.5, distillation: 0.5}", TEACHER)),
    Arm("matryoshka", ("objectives={matryoshka: {dims: [128, 64, 32, 16]}}",)),
    Arm("matryoshka, 16 numbers", of="matryoshka", width=16),
    Arm("info_nce, 16 numbers", of=BASE, width=16),
    Arm("patch_dropout 0.5", ("model.vision_cfg.patch_dropout=0.5",)),
    Arm("ema 0.98", ("trainer.ema.decay=0.98", *GREEDY), model="ema"),
    Arm("uniform soup", of=BASE, model="soup"),
    Arm("greedy soup", of="ema 0.98", model="soup"),
    Arm("text_groups 4", ("text_groups=4",)),
    Arm("captions padded to 77", padded=True),
    Arm("lock_image", ("initial=BASELINE", "initial_towers=image", "lock_image=true", "model=null")),
    *(Arm(name, optimizer=name) for name in RATES if name != BASE_OPTIMIZER),
]
ARMS_BY_NAME = {arm.name: arm for arm in ARMS}


def search_arm(optimizer: str, rate: float) -> Arm:
    """A training of the search for learning rates."""
    return Arm(f"search {optimizer} {rate:g}", optimizer=optimizer, rate=rate, steps=SEARCH_STEPS)
