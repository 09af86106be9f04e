"""Low-rank adapters on both towers of a CLIP and on its projections.

Module names are those of transformers' CLIPModel and SiglipModel, so the saved adapter loads there:
`PeftModel.from_pretrained(CLIPModel.from_pretrained("clip-transformers"), "clip-lora")`.
"""

from __future__ import annotations

from typing import Literal

from peft import LoraConfig
from pydantic import Field

from mmfoundry.models.adapters.lora import LoraSize, inject_lora
from mmfoundry.models.clip import CLIP

Layer = Literal["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
Tower = Literal["vision", "text"]


class ClipLoraConfig(LoraSize):
    """Size of the adapters, and where they go."""

    modules: list[Layer] = Field(
        ["q_proj", "v_proj", "out_proj", "fc1", "fc2"], min_length=1, description="linear layers of a block"
    )
    first_layer: dict[Tower, int] = Field(
        {"vision": 0, "text": 0}, description="first block that gets adapters; a tower that is left out gets none"
    )
    projections: bool = Field(
        True,
        description="also the projections of these towers into the joint embedding; SigLIP's vision tower has none",
    )

    def pattern(self, model: CLIP) -> str:
        """The regular expression over full module names that peft takes.

        Raises:
            ValueError: no layer is left to adapt.
        """
        names = "|".join(sorted(set(self.modules)))
        parts = []
        for tower in sorted(self.first_layer):
            count = len(model.get_submodule(f"{tower}_model.encoder.layers"))  # type: ignore[arg-type]  # a ModuleList
            numbers = "|".join(str(number) for number in range(self.first_layer[tower], count))
            if numbers:
                parts.append(rf"{tower}_model\.encoder\.layers\.({numbers})\.(self_attn|mlp)\.({names})")
            if self.projections:
                parts += _projection(model, tower)
        if not parts:
            raise ValueError("first_layer and projections leave no layer to adapt")
        return "|".join(parts)


def _projection(model: CLIP, tower: Tower) -> list[str]:
    """The name of a tower's projection, as a pattern."""
    if tower == "vision":
        return ["visual_projection"] if model.visual_projection is not None else []
    if model.text_projection is not None:
        return ["text_projection"]
    return [] if model.text_model.head is None else [r"text_model\.head"]


def add_clip_lora(model: CLIP, config: ClipLoraConfig, seed: int) -> LoraConfig:
    """Put adapters into a CLIP, in place; what is trainable afterwards is the adapters alone.

    The embeddings stay what they were until the first step. `lora.save_lora` writes the adapters.

    Args:
        model: changed in place.
        config: size and places.
        seed: of the adapters' first factors (the second start at zero); the caller's random state is left alone.

    Returns:
        The adapter's config in peft's terms.
    """
    return inject_lora(model, config, config.pattern(model), seed)
