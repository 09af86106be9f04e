"""The `adapt` stage: small adapters on finished models, for what they cannot do yet.

    mmfoundry adapt CONFIG [key=value ...]

Two parts, either or both: `clip` teaches a CLIP new names from a few pictures each, `vlm` teaches a vision-language
model a new kind of question. The artifact holds `clip-lora/` and `vlm-lora/` in peft's format, results and examples.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from mmfoundry.pipeline.artifact import Artifact
from mmfoundry.pipeline.config import StageConfig
from mmfoundry.pipeline.stage import RunContext, Stage
from mmfoundry.stages.adapt_clip import AdaptClipConfig, adapt_clip
from mmfoundry.stages.adapt_vlm import AdaptVlmConfig, adapt_vlm


class AdaptConfig(StageConfig):
    """What to adapt."""

    clip: AdaptClipConfig | None = Field(None, description="a CLIP, to new names from a few pictures; null: not")
    vlm: AdaptVlmConfig | None = Field(None, description="a vision-language model, to new questions; null: not")

    @model_validator(mode="after")
    def _something(self) -> AdaptConfig:
        if self.clip is None and self.vlm is None:
            raise ValueError("nothing to adapt: give clip, vlm, or both")
        return self


def run(config: AdaptConfig, context: RunContext) -> Artifact:
    """Adapt what the config names, measure before and after, and write the adapters.

    Raises:
        MissingInput: a model or data set is not there.
        DamagedInput: a sample of the test data cannot be read.
        ConfigError: model, data and adapters do not fit together.
    """
    metrics: dict[str, float] = {}
    if config.clip is not None:
        metrics |= adapt_clip(config.clip, context)
    if config.vlm is not None:
        metrics |= adapt_vlm(config.vlm, context)
    return context.finish(metrics)


STAGE = Stage("adapt", AdaptConfig, run, "teach finished models something new through small adapters")
