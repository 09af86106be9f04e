"""Contrastive pretraining: a CLIP from picture-caption shards.

    mmfoundry pretrain CONFIG [key=value ...]
    deepspeed --num_gpus 8 launch/pretrain.py CONFIG [key=value ...]

The artifact: `config.json` and `model.safetensors` (read by `mmfoundry.models.io.load_clip`), `metrics.jsonl`,
TensorBoard's files, and `skipped.jsonl` if samples could not be read. `ema/` and `soup/` hold a model each where the
config asks for a moving average or a soup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from mmfoundry.data.loader import Loader, Source
from mmfoundry.data.pairs import PairEncoder, StoredTeacher, pad_text
from mmfoundry.data.reader import Pool
from mmfoundry.models.clip import CLIP, ClipConfig
from mmfoundry.models.flops import clip_work, open_clip_work
from mmfoundry.models.interop.any_clip import AnyClip, AnyClipConfig, config_of_name, read_clip, save_any_clip
from mmfoundry.models.lock import lock_image_tower, lock_text_tower, take_towers
from mmfoundry.models.objectives import Objective, needs, weighted_sum
from mmfoundry.models.open_clip_groups import lock_open_clip_tower, take_open_clip_towers
from mmfoundry.models.open_clip_model import OpenClip, OpenClipConfig
from mmfoundry.models.param_groups import TowerRates, clip_param_groups
from mmfoundry.models.teachers import Taught, check_teacher
from mmfoundry.pipeline.artifact import Artifact
from mmfoundry.pipeline.config import ArtifactRef, Config, Neutral, ShardsRef, StageConfig
from mmfoundry.pipeline.errors import ConfigError
from mmfoundry.pipeline.host_memory import keep_freed_memory
from mmfoundry.pipeline.stage import RunContext, Stage
from mmfoundry.pipeline.trainer import train
from mmfoundry.pipeline.trainer_config import TrainerConfig
from mmfoundry.stages.averages import SoupConfig, write_ema, write_soup
from mmfoundry.stages.captions import tokenizer_of
from mmfoundry.stages.evaluations import EvaluationConfig, as_clip, check_eval_steps, while_training

SKIP_LOG = "skipped.jsonl"
PHASE = "train"


class DataSource(Config):
    """Shards to draw from, and how often."""

    path: ShardsRef = Field(description="shards: artifact folder, folder, tar, glob of tars, or a URL of these")
    weight: float = Field(1.0, gt=0, description="share of the samples drawn from here, in any unit")
    upsampling: float | None = Field(
        None,
        gt=0,
        description="how often each sample comes in an epoch, in place of weights; all sources have it or none",
    )


class AugmentationConfig(Config):
    """What is done to a picture before it is learnt from, in the keys of open_clip's aug_cfg where it has them."""

    scale: tuple[float, float] = Field((0.9, 1.0), description="least and greatest share of the area that a crop has")
    ratio: tuple[float, float] = Field((3 / 4, 4 / 3), description="least and greatest width / height of a crop")
    horizontal_flip: float = Field(
        0.0, ge=0, le=1, description="probability of mirroring; captions that say left or right are wrong then"
    )


class LoaderConfig(Config):
    """How samples are read."""

    num_workers: Annotated[int, Neutral()] = Field(1, ge=0, description="threads or processes a rank that make batches")
    workers: Annotated[Literal["thread", "process"], Neutral()] = Field(
        "thread",
        description="what makes batches; processes do not share Python's lock, but nor do they share a cache",
    )
    prefetch: Annotated[int, Neutral()] = Field(4, ge=1, description="batches that a worker may be ahead")
    cache_bytes: Annotated[int, Neutral()] = Field(
        0, ge=0, description="decoded pictures are kept in memory up to this much, on each rank; 0: none"
    )
    max_unreadable: float = Field(0.01, ge=0, le=1, description="fraction of samples skipped; past it the stage stops")
    index_dir: Annotated[str | None, Neutral()] = Field(
        None, description="folder of the shards' indexes, where theirs is read-only or remote; null: beside each shard"
    )

    def options(self) -> dict[str, Any]:
        """As arguments of `Loader`; the indexes are the pools' affair."""
        return self.model_dump(exclude={"index_dir"})


class TeacherConfig(Config):
    """A teacher: a model that looks at each batch, or what it said of each sample, stored in the shards."""

    clip: ArtifactRef | None = Field(
        None, description="a trained CLIP that reads the student's batches: a folder, as for `initial`"
    )
    image: str | None = Field(
        None,
        description="field of a sample's JSON with its embedding of the picture, a list; or, ending in .npy, a member "
        "of the sample: <key>.<image>, fp16 or fp32",
    )
    text: str | None = Field(
        None,
        description="the same with its embeddings of the captions: a list of lists, one a caption; or a member of "
        "shape (captions, embed_dim)",
    )
    embed_dim: int | None = Field(
        None, gt=0, description="numbers of a stored embedding; samples with others are skipped; None: not checked"
    )
    scale: float = Field(100.0, gt=0, description="inverse temperature of stored embeddings; a model has its own")

    @model_validator(mode="after")
    def _one_source(self) -> TeacherConfig:
        if (self.clip is None) == (self.image is None) or (self.image is None) != (self.text is None):
            raise ValueError("a teacher has either clip (a model) or image and text (fields of the samples' JSON)")
        if self.embed_dim is not None and self.clip is not None:
            raise ValueError("embed_dim is for stored embeddings; a model has its own")
        return self


def _kind(model: Any) -> str:
    """Which class a model's tree is of: `open_clip` in it says that open_clip computes."""
    theirs = "open_clip" in model if isinstance(model, Mapping) else isinstance(model, OpenClipConfig)
    return (OpenClipConfig if theirs else ClipConfig).__name__


ModelConfig = Annotated[
    Annotated[ClipConfig, Tag("ClipConfig")] | Annotated[OpenClipConfig, Tag("OpenClipConfig")], Discriminator(_kind)
]


class PretrainConfig(StageConfig):
    """Contrastive pretraining of a CLIP."""

    data: list[DataSource] = Field(min_length=1, description="what to draw samples from")
    model: ModelConfig | None = Field(
        None,
        description="a CLIP to start from random weights: its keys, open_clip's name of one, or a .json file of "
        "open_clip's keys; {open_clip: ...} is computed by open_clip's own module; this or `initial`",
    )
    initial: ArtifactRef | None = Field(
        None, description="a trained CLIP or SigLIP to go on from: a folder of ours, of transformers or of open_clip"
    )
    initial_towers: Literal["both", "image", "text"] = Field(
        "both", description="which towers of `initial` are taken; the other starts from random weights, as in LiT"
    )
    objectives: dict[str, float | dict[str, Any]] = Field(
        {"info_nce": 1.0},
        min_length=1,
        description="what to minimise: name: weight, or name: {weight: 1.0, ...} with the objective's options",
    )
    teachers: dict[str, TeacherConfig] = Field({}, description="what the distillation objective learns from, by name")
    lock_image: bool = Field(False, description="the image tower and its projection stay as they are (LiT)")
    lock_image_unlocked_groups: int = Field(
        0, ge=0, description="last groups of a locked image tower that learn after all: 1 projection, 2 last block, ..."
    )
    lock_image_freeze_bn_stats: bool = Field(
        False, description="batch normalisations of a locked image tower of open_clip keep their statistics, too"
    )
    lock_text: bool = Field(False, description="the text tower and its projection stay as they are")
    lock_text_unlocked_layers: int = Field(
        0, ge=0, description="last groups of a locked text tower that learn after all: 1 projection, 2 last block, ..."
    )
    force_patch_dropout: float | None = Field(
        None, ge=0, lt=1, description="in place of the model's own patch_dropout; 0: the whole pictures after FLIP"
    )
    augmentation: AugmentationConfig = Field(AugmentationConfig(), description="what is done to the pictures")
    loader: LoaderConfig = Field(LoaderConfig(), description="how samples are read")
    towers: TowerRates = Field(TowerRates(), description="how fast each tower learns, and the layers in it")
    text_groups: int = Field(
        1, ge=1, description="groups of captions of like length, which go through the text tower one by one; 4 is good"
    )
    text_packing: bool = Field(
        False, description="captions go through the text tower one after another without padding; in place of groups"
    )
    soup: SoupConfig | None = Field(None, description="a mean of checkpoints, left in soup/; None: none")
    eval: EvaluationConfig | None = Field(
        None, description="what is measured every trainer.eval_steps steps, on all ranks; `eval/...` in the log"
    )
    trainer: TrainerConfig = Field(description="batch size, steps, optimizer, schedule, checkpoints")

    @field_validator("model", mode="before")
    @classmethod
    def _by_name(cls, model: Any) -> Any:
        return config_of_name(model) if isinstance(model, str) else model

    @model_validator(mode="after")
    def _consistent(self) -> PretrainConfig:
        if (self.model is None) == (self.initial is None):
            raise ValueError(
                "give either model (to start from random weights) or initial (to go on from a trained CLIP)"
            )
        check_eval_steps(self.eval, self.trainer)
        if self.soup is not None and self.soup.checkpoints > self.trainer.keep_checkpoints:
            raise ValueError(f"soup.checkpoints wants trainer.keep_checkpoints to be {self.soup.checkpoints} or more")
        self._consistent_objectives()
        if self.text_packing and self.text_groups > 1:
            raise ValueError("text_packing leaves no padding for text_groups to spare: give one of them")
        if isinstance(self.model, ClipConfig):
            check_ours(self)
        if self.initial_towers != "both" and self.initial is None:
            raise ValueError("initial_towers says which towers of initial are taken, which is not given")
        for tower, key in (
            ("image", "lock_image_unlocked_groups"),
            ("image", "lock_image_freeze_bn_stats"),
            ("text", "lock_text_unlocked_layers"),
        ):
            if getattr(self, key) and not getattr(self, f"lock_{tower}"):
                raise ValueError(f"{key} is for a locked tower: set lock_{tower}")
        return self

    def _consistent_objectives(self) -> None:
        needed = needs(weighted_sum(self.objectives))  # raises UnknownName, which lists the known ones
        if isinstance(self.model, OpenClipConfig):
            check_open_clip(self, self.model)
        if "captions" in needed and self.model is not None and not writes_captions(self.model):
            raise ValueError("captioning needs a model with a text decoder, such as open_clip's coca_ViT-B-32")
        if "bias" in needed and self.model is not None and self.model.init_logit_bias is None:
            raise ValueError("the siglip objective needs model.init_logit_bias, -10 in the paper")
        if ("teachers" in needed) != bool(self.teachers):
            raise ValueError("the distillation objective and teachers go together; only one of them is given")


def writes_captions(model: AnyClipConfig) -> bool:
    """Whether a model has a text decoder."""
    return isinstance(model, OpenClipConfig) and model.writes_captions


def check_ours(config: PretrainConfig) -> None:
    """Refuse what only models of open_clip have for one of our own towers.

    Raises:
        ConfigError: the key is named.
    """
    if config.lock_image_freeze_bn_stats:
        raise ConfigError("lock_image_freeze_bn_stats: our own ViT towers have no batch normalisation")


def check_open_clip(config: PretrainConfig, model: OpenClipConfig) -> None:
    """Refuse what only our own towers have for a model that open_clip computes.

    Raises:
        ConfigError: the key is named.
    """
    if config.text_packing:
        raise ConfigError(
            "text_packing: only our own text towers have it, and this model is computed by open_clip's module; "
            "text_groups spares most of the padding"
        )
    if config.force_patch_dropout is not None:
        model.with_patch_dropout(config.force_patch_dropout)


def encoder_of(
    model: AnyClipConfig, augmentation: AugmentationConfig, teachers: Mapping[str, TeacherConfig] | None = None
) -> PairEncoder:
    """How samples become pairs for a model, with what stored teachers say of them.

    Raises:
        ConfigError: the model has another vocabulary than its tokenizer.
        MissingInput: its tokenizer is not to be had.
    """
    own = model.text_cfg.hf_tokenizer_name is not None
    return PairEncoder(
        model.vision_cfg.image_size,
        model.text_cfg.context_length,
        vocab_size=model.text_cfg.vocab_size,
        tokenizer=tokenizer_of(model.text_cfg) if own else None,
        **augmentation.model_dump(),
        stored={
            name: StoredTeacher(each.image, each.text, each.embed_dim)
            for name, each in (teachers or {}).items()
            if each.image and each.text
        },
    )


def run(config: PretrainConfig, context: RunContext) -> Artifact:
    """Train, write the model, and report the loss and the speed.

    Raises:
        ConfigError: the batch does not divide over the ranks, or the model does not fit the tokenizer.
        MissingInput: a source has no shards.
        TooManyUnreadable: past `loader.max_unreadable`.
    """
    runtime = context.runtime
    if runtime.device.type == "cpu":
        keep_freed_memory()
    model, seed = _model(config, context)
    _cut_captions(config, model)
    loader = Loader(
        sources_of(config.data, open_pools(config.data, config.loader, context)),
        batch_size=config.trainer.samples_per_fetch(runtime.world_size),
        encode=encoder_of(model.config, config.augmentation, config.teachers),
        finish=pad_text,
        seed=config.seed,
        rank=runtime.rank,
        world_size=runtime.world_size,
        skip_log=context.work / SKIP_LOG,
        device=runtime.device,
        group=runtime.group,
        **config.loader.options(),
    )
    parameters = sum(weight.numel() for weight in model.parameters())
    pools = ", ".join(f"{len(pool)} samples of {pool.name}" for pool in loader.pools)
    context.log.say(f"{parameters / 1e6:.1f}M parameters; drawing from {pools}")
    result = train(
        config.trainer,
        model=model,
        objective=_objective(config, context, model.config),
        loader=loader,
        context=context,
        phase=PHASE,
        metrics=lambda: data_metrics(loader),
        evaluate=None
        if config.eval is None
        else while_training(config.eval, context, "eval.", config.trainer, as_clip),
        work=clip_work(model) if isinstance(model, CLIP) else open_clip_work(model),
        param_groups=clip_param_groups(
            model,
            config.trainer.optimizer.weight_decay,
            config.towers,
            hidden_apart=config.trainer.optimizer.type == "muon",
        ),
    )
    skipped, seen = loader.counters()["skipped"], loader.seen()
    if runtime.is_main:
        save_any_clip(model, context.work, seed=seed)
    if config.trainer.ema is not None:
        write_ema(model, context, PHASE, seed)
    soup = {} if config.soup is None else write_soup(config.soup, model, context, PHASE, seed)
    return context.finish(
        metrics={
            "loss": result.mean_loss,
            "samples_per_second": result.samples_per_second,
            "samples_seen": result.samples,
            "samples_repeated": sum(count for name, count in seen.items() if name.startswith("repeats/")),
            "samples_skipped": skipped,
            "parameters": parameters,
        }
        | soup
    )


def open_pools(data: Sequence[DataSource], loader: LoaderConfig, context: RunContext, prefix: str = "") -> list[Pool]:
    """The sources' shards.

    Args:
        data: of the phase.
        loader: how samples are read.
        context: of the running stage.
        prefix: dotted field that `data` lies in, with a dot behind, e.g. `tune.`.
    """
    return [
        Pool(context.shards(f"{prefix}data.{i}.path"), name=each.path, index_dir=loader.index_dir)
        for i, each in enumerate(data)
    ]


def sources_of(data: Sequence[DataSource], pools: Sequence[Pool]) -> list[Source]:
    """What a loader draws from, and how often."""
    return [Source(pool, each.weight, each.upsampling) for pool, each in zip(pools, data, strict=True)]


def data_metrics(loader: Loader) -> dict[str, float]:
    """For the log, over all ranks so far: what was skipped, by source and reason, and what was seen, by source."""
    skipped = {name: count for name, count in loader.counters().items() if name.startswith("skipped")}
    return skipped | loader.seen()


def _model(config: PretrainConfig, context: RunContext) -> tuple[AnyClip, int | None]:
    """The model to train, and the seed of its random weights; no seed where it goes on from a trained one."""
    seed: int | None = None
    needed = needs(weighted_sum(config.objectives))
    model: AnyClip
    if config.model is not None:
        seed = config.seed
        model = _fresh(config, config.model)
    else:
        model = read_clip(context.inputs["initial"])
        if "bias" in needed and model.logit_bias is None:
            raise ConfigError(f"initial: {config.initial} has no logit bias, which the siglip objective needs")
        if "captions" in needed and not writes_captions(model.config):
            raise ConfigError(f"initial: {config.initial} has no text decoder, which captioning needs")
    if isinstance(model, OpenClip):
        return _open_clip_model(config, model), seed
    check_ours(config)
    if config.initial is not None:
        if config.initial_towers != "both":
            model = take_towers(model, CLIP.from_seed(model.config, config.seed), config.initial_towers)
        model.config = _forced(config, model.config)
        model.vision_model.config = model.config.vision_cfg
    if config.lock_image:
        lock_image_tower(model, config.lock_image_unlocked_groups)
    if config.lock_text:
        lock_text_tower(model, config.lock_text_unlocked_layers)
    return model, seed


def _open_clip_model(config: PretrainConfig, model: OpenClip) -> OpenClip:
    """A model that open_clip computes, from the seed or as `initial` has it, with what the config asks of it."""
    check_open_clip(config, model.config)
    if config.initial is not None and (config.initial_towers != "both" or config.force_patch_dropout is not None):
        fresh = _fresh(config, model.config)
        assert isinstance(fresh, OpenClip)
        model = take_open_clip_towers(model, fresh, config.initial_towers)
    model.captions = "captions" in needs(weighted_sum(config.objectives))
    if config.lock_image:
        lock_open_clip_tower(model, "image", config.lock_image_unlocked_groups, config.lock_image_freeze_bn_stats)
    if config.lock_text:
        lock_open_clip_tower(model, "text", config.lock_text_unlocked_layers)
    return model


def _fresh(config: PretrainConfig, model: AnyClipConfig) -> AnyClip:
    """An untrained model, with `force_patch_dropout`, if there is one."""
    if isinstance(model, ClipConfig):
        return CLIP.from_seed(_forced(config, model), config.seed)
    if config.force_patch_dropout is None:
        return OpenClip.from_seed(model, config.seed)
    forced = model.with_patch_dropout(config.force_patch_dropout)
    try:
        return OpenClip.from_seed(forced, config.seed)
    except ConfigError as error:  # of timm's towers, those of patches have it
        raise ConfigError(f"force_patch_dropout: {error}") from error


def _forced(config: PretrainConfig, model: ClipConfig) -> ClipConfig:
    """The model's config with `force_patch_dropout`, if there is one."""
    if config.force_patch_dropout is None:
        return model
    vision = model.vision_cfg.model_copy(update={"patch_dropout": config.force_patch_dropout})
    return model.model_copy(update={"vision_cfg": vision})


def _cut_captions(config: PretrainConfig, model: AnyClip) -> None:
    """Have the text tower read captions in groups, or packed, where the config asks for it and the tower allows it."""
    reads_padding = not model.trims if isinstance(model, OpenClip) else model.config.text_cfg.reads_padding
    for key, default in (("text_groups", 1), ("text_packing", False)):
        if getattr(config, key) != default and reads_padding:
            raise ConfigError(f"{key}: the model reads its captions' padding, so they cannot be cut: leave it out")
    if isinstance(model, OpenClip):
        model.groups = config.text_groups
    else:
        model.text_model.groups, model.text_model.packed = config.text_groups, config.text_packing


def _objective(config: PretrainConfig, context: RunContext, student: AnyClipConfig) -> Objective:
    """What is minimised, with the teachers that it asks."""
    objective = weighted_sum(config.objectives)
    if not config.teachers:
        return objective
    online: dict[str, AnyClip] = {}
    for name, teacher in config.teachers.items():
        if teacher.clip is not None:
            online[name] = read_clip(context.inputs[f"teachers.{name}.clip"])
            check_teacher(name, online[name].config, student)
    return Taught(objective, online, {name: each.scale for name, each in config.teachers.items() if each.image})


STAGE = Stage("pretrain", PretrainConfig, run, "train a CLIP from picture-caption shards")
