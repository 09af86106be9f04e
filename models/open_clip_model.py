"""Any of open_clip's models: where our own towers cannot express a config, open_clip's module computes.

A ResNet, a ConvNeXt or any other tower of timm, attention pooling, a text tower without a causal mask, CoCa (Yu et al.
2022, arXiv 2205.01917): the module is built from its config alone, nothing is downloaded, and `OpenClip` gives it the
interface of our `CLIP`. Parameters are open_clip's own under `open_clip.`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from safetensors import SafetensorError
from torch import Tensor, nn

from mmfoundry.models.clip import ClipOutput, PreprocessConfig, at_least_fp32, inverse_temperature
from mmfoundry.models.interop.open_clip import model_cfg_file, named_model_cfg
from mmfoundry.models.text import TokenizerConfig, by_length
from mmfoundry.models.vision import to_pixels
from mmfoundry.pipeline.config import Config, parse
from mmfoundry.pipeline.errors import ConfigError, DamagedInput
from mmfoundry.pipeline.resolve import resolve_transformers
from mmfoundry.pipeline.torchvision_ops import declare_missing_ops

# Shape suffixes: b = pairs on this rank, L = positions of a caption, D = width of the joint embedding

PAD = 0  # what the loader puts behind a caption, and CLIP's tokenizer too
_TRIMMED_POOLS = ("argmax", "eos")  # read one position that the caption itself has


class OpenClipPreprocess(PreprocessConfig):
    """How pictures become the image tower's input, in open_clip's keys."""

    interpolation: str = Field("bicubic", description="how pictures are resized; our stages do bicubic only")


class PictureSide(NamedTuple):
    """Of an image tower, what prepares its pictures."""

    image_size: int


class CaptionSide(NamedTuple):
    """Of a text tower, what prepares its captions."""

    context_length: int
    vocab_size: int | None  # None: a tower of transformers, whose own config has it
    hf_tokenizer_name: str | None = None
    tokenizer_kwargs: TokenizerConfig | None = None


class OpenClipConfig(Config):
    """A model that open_clip builds, beside what open_clip's configs do not say."""

    open_clip: dict[str, Any] = Field(
        description="open_clip's model config (embed_dim, vision_cfg, text_cfg, ...), or its name for one"
    )
    preprocess_cfg: OpenClipPreprocess = Field(
        default_factory=OpenClipPreprocess, description="pixel normalisation and resizing"
    )
    max_logit_scale: float | None = Field(
        100.0, gt=0, description="the inverse temperature is held at or below this; None: not held"
    )

    @field_validator("open_clip", mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        if isinstance(given, str) and given.endswith(".json"):
            found = model_cfg_file(given)
            return found.get("model_cfg", found)
        return named_model_cfg(given) if isinstance(given, str) else given

    @field_validator("open_clip")
    @classmethod
    def _can_be_built(cls, tree: dict[str, Any]) -> dict[str, Any]:
        for key in ("vision_cfg", "text_cfg"):
            if not isinstance(tree.get(key), dict):
                raise ValueError(f"open_clip's model config has a mapping {key}")
        vision, text = tree["vision_cfg"], tree["text_cfg"]
        if text.get("hf_model_name") and "multimodal_cfg" in tree:
            raise ValueError(
                "text_cfg.hf_model_name: this CoCa's text tower and its decoder differ in vocabulary in open_clip; "
                "take one with open_clip's own text tower"
            )
        if text.get("hf_model_name") and not text.get("hf_tokenizer_name"):
            raise ValueError("text_cfg.hf_tokenizer_name: a text tower of transformers reads its own tokenizer's ids")
        if text.get("tokenizer_mode"):
            raise ValueError(f"text_cfg.tokenizer_mode: {text['tokenizer_mode']} is a way of splitting we do not have")
        if text.get("tokenizer_kwargs") and not text.get("hf_tokenizer_name"):
            raise ValueError("text_cfg.tokenizer_kwargs is for a tokenizer of transformers: give hf_tokenizer_name")
        _tokenizer_config(text)
        if ":" in (name := str(vision.get("timm_model_name"))):
            raise ValueError(
                f"vision_cfg.timm_model_name: {name} names a hub or a folder; give an architecture of timm"
            )
        if text.get("pad_id", PAD) != PAD or tree.get("pad_id", PAD) != PAD:
            raise ValueError(f"pad_id: captions are padded with {PAD}")
        size = vision.get("image_size", 224)
        sides = list(size) if isinstance(size, list | tuple) else [size, size]
        if len(set(sides)) != 1 or len(sides) != 2 or not isinstance(sides[0], int):
            raise ValueError(f"vision_cfg.image_size is {size}; pictures are squares here")
        return tree

    @property
    def _vision(self) -> dict[str, Any]:
        return dict(self.open_clip["vision_cfg"])

    @property
    def _text(self) -> dict[str, Any]:
        return dict(self.open_clip["text_cfg"])

    @property
    def vision_cfg(self) -> PictureSide:
        """What prepares pictures; open_clip's default where its config leaves it out."""
        size = self._vision.get("image_size", 224)
        return PictureSide(size[0] if isinstance(size, list | tuple) else size)

    @property
    def text_cfg(self) -> CaptionSide:
        """What prepares captions; open_clip's defaults where its config leaves it out."""
        text = self._text
        vocab_size = None if text.get("hf_model_name") else text.get("vocab_size", 49_408)
        name = text.get("hf_tokenizer_name") or None
        return CaptionSide(text.get("context_length", 77), vocab_size, name, _tokenizer_config(text) if name else None)

    def architecture(self) -> OpenClipConfig:
        """The same, but its text tower does not start from transformers' weights, if it is one of theirs."""
        tree = self.open_clip | {"text_cfg": self._text | {"hf_model_pretrained": False}}
        return self.model_copy(update={"open_clip": tree}) if "hf_model_name" in self._text else self

    @property
    def init_logit_bias(self) -> float | None:
        """Added to every logit, at the start; None: the model has no bias."""
        return self.open_clip.get("init_logit_bias")

    @property
    def writes_captions(self) -> bool:
        """Whether there is a text decoder, as CoCa has."""
        return "multimodal_cfg" in self.open_clip

    def with_patch_dropout(self, share: float) -> OpenClipConfig:
        """The same model with this share of a picture's patches left out in training.

        Raises:
            ConfigError: its image tower has no patches to leave out.
        """
        if isinstance(self._vision.get("layers"), list | tuple):
            raise ConfigError("force_patch_dropout: this model's image tower is a ResNet, which has no patches")
        return self.model_copy(
            update={"open_clip": self.open_clip | {"vision_cfg": self._vision | {"patch_dropout": share}}}
        )

    def check_resizing(self) -> None:
        """Refuse a model whose pictures are resized in another way than ours.

        Raises:
            ConfigError: the key is named.
        """
        if self.preprocess_cfg.interpolation != "bicubic":
            raise ConfigError(
                f"preprocess_cfg.interpolation is {self.preprocess_cfg.interpolation}: this stage resizes with "
                "bicubic, so its numbers would not be the model's"
            )


def _tokenizer_config(text_cfg: Mapping[str, Any]) -> TokenizerConfig:
    return parse(
        TokenizerConfig, text_cfg.get("tokenizer_kwargs") or {}, source="open_clip", prefix="text_cfg.tokenizer_kwargs"
    )


class CaptionedOutput(NamedTuple):
    """What a contrastive and a captioning objective read of a CoCa; the first four as in `ClipOutput`.

    Attributes:
        caption_nats_bL: cross-entropy of each position's next token, at least fp32; 0 where none is said.
        caption_right_bL: bool, where the next token scores highest.
        caption_said_bL: bool, where there is a next token.
    """

    image_bD: Tensor  # noqa: N815  (shape suffix)
    text_bD: Tensor  # noqa: N815
    scale: Tensor
    bias: Tensor | None
    caption_nats_bL: Tensor  # noqa: N815
    caption_right_bL: Tensor  # noqa: N815
    caption_said_bL: Tensor  # noqa: N815


class OpenClip(nn.Module):
    """One of open_clip's models behind the interface of our `CLIP`.

    Attributes:
        open_clip: open_clip's own module, which holds all parameters.
        captions: whether the forward pass gives `CaptionedOutput`; a CoCa's decoder costs as much as a tower.
        trims: whether captions are read as they come, not made as long as the context.
        groups: of captions of like length, which go through the text tower one after the other; more than 1 where it
            `trims` only.
    """

    def __init__(self, config: OpenClipConfig):
        super().__init__()
        self.config = config
        self.open_clip: Any = build_module(config)
        self.captions = False
        self.groups = 1
        text = self._text
        alone = getattr(text, "cls_emb", None) is None and getattr(text, "attn_mask", None) is not None
        self.trims = alone and _pooling(text)[0] in _TRIMMED_POOLS

    @classmethod
    def from_seed(cls, config: OpenClipConfig, seed: int) -> OpenClip:
        """An untrained model: the same weights for the same seed, the caller's random state left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(config)

    def forward(self, batch: Mapping[str, Any]) -> ClipOutput | CaptionedOutput:
        """Embed a batch of pairs, and say how well the captions are foreseen, where `captions` is set.

        Args:
            batch: `image`, (b, 3, side, side), uint8; `text`, (b, L), integer token ids, 0 behind each caption.
        """
        pixels, tokens_bL = self.pixels(batch["image"]), batch["text"]
        bias = None if self.logit_bias is None else at_least_fp32(self.logit_bias).reshape(())
        if not self.captions:
            return ClipOutput(self.encode_image(pixels), self.encode_text(tokens_bL), self.scale(), bias)
        image, patches = self.open_clip.visual(pixels)
        text, words = self.open_clip.text(self._padded(tokens_bL))
        # The decoder is causal, so what is behind the batch's longest caption need not be computed.
        logits = self.open_clip.text_decoder(patches, words[:, : tokens_bL.shape[1] - 1])
        next_bL = tokens_bL[:, 1:].long()
        nats = F.cross_entropy(
            at_least_fp32(logits).flatten(0, 1), next_bL.flatten(), ignore_index=PAD, reduction="none"
        )
        said_bL = next_bL != PAD
        return CaptionedOutput(
            image_bD=F.normalize(at_least_fp32(image), dim=-1),
            text_bD=F.normalize(at_least_fp32(text), dim=-1),
            scale=self.scale(),
            bias=bias,
            caption_nats_bL=nats.view_as(next_bL),
            caption_right_bL=(logits.detach().argmax(-1) == next_bL) & said_bL,
            caption_said_bL=said_bL,
        )

    def pixels(self, images: Tensor) -> Tensor:
        """Normalise (b, 3, side, side) uint8 pictures as this model wants them, in its dtype."""
        preprocess = self.config.preprocess_cfg
        return to_pixels(images, preprocess.mean, preprocess.std).to(self.logit_scale.dtype)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Embed normalised float pixels (b, 3, side, side); (b, D), L2-normalised, at least fp32."""
        return F.normalize(at_least_fp32(self.open_clip.encode_image(pixels, normalize=False)), dim=-1)

    def encode_text(self, tokens_bL: Tensor) -> Tensor:
        """Embed token ids (b, L); (b, D), L2-normalised, at least fp32.

        Captions are made as long as the context, unless what follows the end of text cannot matter: under a causal
        mask, where the caption's own last position is read. A CoCa's class token stands behind the whole context.
        """
        if self.trims and self.groups > 1 and len(tokens_bL) > 1:
            lengths_b = self.caption_lengths(tokens_bL)
            features = by_length(partial(_read_at_end, self._text), tokens_bL, lengths_b, self.groups)
        elif self.trims:
            features = _read_at_end(self._text, tokens_bL)
        else:
            features = self.open_clip.encode_text(self._padded(tokens_bL), normalize=False)
        return F.normalize(at_least_fp32(features), dim=-1)

    def caption_lengths(self, tokens_bL: Tensor) -> Tensor:
        """Tokens of each caption up to the position that is read, (b,), of a tower that `trims`."""
        pool, end = _pooling(self._text)
        if pool == "argmax":
            return tokens_bL.argmax(dim=-1) + 1
        assert end is not None  # open_clip asks for it, too
        return (tokens_bL == end).int().argmax(dim=-1) + 1

    @property
    def _text(self) -> Any:
        """What reads captions: a module of its own, or open_clip's plain CLIP itself."""
        return getattr(self.open_clip, "text", self.open_clip)

    def _padded(self, tokens_bL: Tensor) -> Tensor:
        return F.pad(tokens_bL, (0, self.config.text_cfg.context_length - tokens_bL.shape[1]), value=PAD)

    @property
    def logit_scale(self) -> nn.Parameter:
        """Logarithm of the inverse temperature, as it is stored."""
        scale: nn.Parameter = self.open_clip.logit_scale
        return scale

    @property
    def logit_bias(self) -> nn.Parameter | None:
        """Added to every logit; None: the model has none."""
        bias: nn.Parameter | None = self.open_clip.logit_bias
        return bias

    def scale(self) -> Tensor:
        """The inverse temperature, (), at least fp32, held at `config.max_logit_scale`; see `CLIP.scale`."""
        return inverse_temperature(self.logit_scale, self.config.max_logit_scale).reshape(())

    def repeated_blocks(self) -> list[nn.Module]:
        """What can be compiled or computed twice one by one: blocks of open_clip's transformers and of timm's towers.

        Blocks with a batch normalisation are left out: computed twice, they would count a batch twice.
        """
        from open_clip.transformer import MultimodalTransformer, Transformer

        found: list[nn.Module] = []
        for module in self.open_clip.modules():
            if isinstance(module, Transformer):
                found += module.resblocks
                found += module.cross_attn if isinstance(module, MultimodalTransformer) else []
            elif isinstance(blocks := getattr(module, "blocks", None), nn.Sequential | nn.ModuleList):
                found += blocks  # in all of timm's staged or plain towers
        return [block for block in found if not any(isinstance(part, _BATCH_NORM) for part in block.modules())]

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that should not decay: norms, biases, scale, positions and tokens of open_clip."""
        listed = set()
        for name, module in self.named_modules():
            if name != "" and hasattr(module, "no_weight_decay"):
                listed |= {f"{name}.{each}" for each in module.no_weight_decay()}  # type: ignore[operator]
        return {name for name, each in self.named_parameters() if each.ndim < 2 or name in listed}


_BATCH_NORM = nn.modules.batchnorm._BatchNorm


def build_module(config: OpenClipConfig) -> nn.Module:
    """open_clip's module for a config, chosen as its `create_model` chooses.

    Weights are random, but for a text tower of transformers (`hf_model_name`): as in open_clip, it starts from the
    weights that are published under that name, unless `hf_model_pretrained` is false.

    Raises:
        ConfigError: open_clip does not know a key, or cannot build it.
        MissingInput: the text tower's config or weights are not to be had.
        DamagedInput: they cannot be read.
    """
    declare_missing_ops()  # open_clip imports torchvision
    from open_clip import CLIP, CoCa, CustomTextCLIP

    tree = copy.deepcopy(config.open_clip)
    if "timm_model_name" in tree["vision_cfg"]:
        tree["vision_cfg"]["timm_model_pretrained"] = False
    text = tree["text_cfg"]
    custom = tree.pop("custom_text", False) or "hf_model_name" in text
    if name := text.get("hf_model_name"):
        only = None if text.get("hf_model_pretrained", True) else ("config.json",)
        text["hf_model_name"] = str(resolve_transformers(name, only))
    kind: Any = CLIP if not custom else CoCa if "multimodal_cfg" in tree else CustomTextCLIP
    try:
        module: nn.Module = kind(**tree)
    except (OSError, SafetensorError) as error:  # of what a text tower's folder holds
        raise DamagedInput(f"text_cfg.hf_model_name: {name}: {str(error).splitlines()[0]}") from error
    except (TypeError, ValueError, AssertionError, RuntimeError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"open_clip cannot build this {kind.__name__}: {reason[:300]}") from error
    if isinstance(module, CoCa):
        # Left as memory had it by open_clip 3.3.0, whose own init_parameters of the decoder is never called.
        projection = module.text_decoder.text_projection
        nn.init.normal_(projection, std=len(projection) ** -0.5)
    return module


def _pooling(text: Any) -> tuple[str | None, int | None]:
    """How a caption is read, and the id of its end where that is asked for; `CLIP` and `TextTransformer` differ."""
    pool = getattr(text, "text_pool_type", getattr(text, "pool_type", None))
    return pool, getattr(text, "text_eos_id", getattr(text, "eos_id", None))


def _read_at_end(text: Any, tokens_bL: Tensor) -> Tensor:
    """Features (b, D) of captions of any length by a causal text tower, an open_clip `TextTransformer` or `CLIP`."""
    from open_clip.transformer import text_global_pool

    length = tokens_bL.shape[1]
    hidden = text.token_embedding(tokens_bL) + text.positional_embedding[:length]
    hidden = text.ln_final(text.transformer(hidden, attn_mask=text.attn_mask[:length, :length]))
    pool, end = _pooling(text)
    features = text_global_pool(hidden, tokens_bL, pool, eos_token_id=end)
    if text.text_projection is None:
        return features
    if isinstance(text.text_projection, nn.Linear):
        projected: Tensor = text.text_projection(features)
        return projected
    return features @ text.text_projection
