"""A vision-language model: vision tower, connector and language model, under transformers' names.

Module and parameter names are those of `AyaVisionForConditionalGeneration` (and of `LlavaForConditionalGeneration`,
which has the same), so that weights go over by name and adapters made on one load on the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mmfoundry.models.chat import IGNORED, ChatFormat, ImageFormat
from mmfoundry.models.clip import PreprocessConfig
from mmfoundry.models.connectors import CONNECTORS, ConnectorConfig
from mmfoundry.models.vision import VisionConfig, VisionTower, to_pixels
from mmfoundry.pipeline.config import Config

# Shape suffixes: b = sequences, L = positions, n = tiles of all pictures, t = tokens of a tile, D = width of the
# language model, s = supervised positions, V = vocabulary


class TilesConfig(Config):
    """How a picture is cut up before the vision tower sees it."""

    min_tiles: int = Field(
        1, ge=1, description="least number of tiles; where max_tiles is 1, the whole is all there is"
    )
    max_tiles: int = Field(1, ge=1, description="greatest number of tiles; the whole picture is added as one more view")

    @model_validator(mode="after")
    def _ordered(self) -> TilesConfig:
        if self.min_tiles > self.max_tiles:
            raise ValueError(f"min_tiles {self.min_tiles} is more than max_tiles {self.max_tiles}")
        return self


class VlmSettings(Config):
    """What can be chosen about a vision-language model, its vision tower and language model being given."""

    connector: ConnectorConfig = Field(default_factory=ConnectorConfig, description="from patches to image tokens")
    vision_layer: int = Field(
        -1, description="whose output the connector reads: 0 is the first block's input, -1 the last block's output"
    )
    tiles: TilesConfig = Field(default_factory=TilesConfig, description="how a picture is cut up")
    image: ImageFormat = Field(default_factory=ImageFormat, description="the text around image tokens")
    chat: ChatFormat = Field(default_factory=ChatFormat, description="the text around turns")

    @model_validator(mode="after")
    def _enough_tags(self) -> VlmSettings:
        if self.tiles.max_tiles > 1 and len(self.image.tile_tags) < self.tiles.max_tiles:
            raise ValueError(f"tiles.max_tiles is {self.tiles.max_tiles}, image.tile_tags {len(self.image.tile_tags)}")
        return self


class VlmConfig(VlmSettings):
    """A vision-language model, whole."""

    vision: VisionConfig = Field(description="vision tower")
    quick_gelu: bool = Field(False, description="of the vision tower")
    preprocess: PreprocessConfig = Field(default_factory=PreprocessConfig, description="pixel normalisation")
    language_model: dict[str, Any] = Field(description="transformers' config of the language model")
    patch_token_id: int = Field(ge=0, description="id of image.patch_token in the language model's tokenizer")


class VlmOutput(NamedTuple):
    """What a language-modelling objective reads. A tuple, because ZeRO-3 looks for a module's outputs in those only.

    Attributes:
        logits_sV: at the positions before each supervised one.
        target_s: the ids that should come there.
    """

    logits_sV: Tensor  # noqa: N815  (shape suffix)
    target_s: Tensor


class VlmBackbone(nn.Module):
    """Everything but the head that gives logits."""

    def __init__(self, config: VlmConfig, language_model: PreTrainedModel):
        super().__init__()
        self.vision_tower = VisionTower(config.vision, quick_gelu=config.quick_gelu)
        self.multi_modal_projector = CONNECTORS[config.connector.type](
            config.connector,
            patches=config.vision.num_patches,
            vision_width=config.vision.width,
            text_width=language_model.config.hidden_size,
        )
        self.language_model = language_model


class VisionLanguageModel(nn.Module):
    """A language model that is given pictures as vectors among its tokens."""

    def __init__(self, config: VlmConfig, language_model: PreTrainedModel | None = None):
        """Put the parts together; vision tower and connector start untrained.

        Args:
            config: of all parts.
            language_model: a causal language model of `config.language_model`, whose modules are taken over; None
                builds an untrained one.
        """
        super().__init__()
        self.config = config
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.language_model))
            language_model.tie_weights()  # left out where initialisation is
        self.model = VlmBackbone(config, language_model.get_decoder())
        self.lm_head = language_model.get_output_embeddings()

    @property
    def tokens_per_tile(self) -> int:
        """How many image tokens a tile becomes."""
        return self.model.multi_modal_projector.tokens  # type: ignore[return-value]  # an int of every connector

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.lm_head.weight.device

    def image_tokens(self, tiles: Tensor) -> Tensor:
        """Vectors for the language model, (n, t, D), of (n, 3, side, side) uint8 tiles."""
        preprocess = self.config.preprocess
        tower = self.model.vision_tower
        pixels = to_pixels(tiles, preprocess.mean, preprocess.std).to(tower.embeddings.patch_embedding.weight.dtype)
        return self.model.multi_modal_projector(tower.tokens(pixels, self.config.vision_layer))

    def embed(self, input_ids_bL: Tensor, tiles: Tensor | None) -> Tensor:
        """The language model's input vectors, (b, L, D), image tokens put where their placeholders are.

        Args:
            input_ids_bL: token ids; `patch_token_id` marks the place of an image token.
            tiles: (n, 3, side, side) uint8, in the order of their placeholders; None where there is no picture.

        Raises:
            ValueError: there are more or fewer placeholders than image tokens.
        """
        # The placeholder's own row may lie past a vocabulary that has no such token.
        is_patch_bL = input_ids_bL == self.config.patch_token_id
        embedded_bLD = self.model.language_model.get_input_embeddings()(input_ids_bL)
        if tiles is None:
            return embedded_bLD
        features = self.image_tokens(tiles).flatten(0, 1).to(embedded_bLD.dtype)
        if len(features) != int(is_patch_bL.sum()):
            raise ValueError(f"{int(is_patch_bL.sum())} placeholders for {len(features)} image tokens")
        return embedded_bLD.masked_scatter(is_patch_bL[..., None], features)

    def forward(self, batch: Mapping[str, Any]) -> VlmOutput:
        """Logits where an answer is to be learnt, and only there: a vocabulary is far wider than the model.

        Args:
            batch: `input_ids` and `labels`, (b, L), padded on the right (`labels`: `IGNORED` where nothing is to be
                learnt); `tiles`, (n, 3, side, side) uint8, in the order of the placeholders; `branches`, (b, L): 0 on
                what all of a sequence sees, 1, 2, ... on parts that do not see each other, -1 on padding;
                `position_ids`, (b, L): each part goes on counting where the common one ended. Both may be left out.
        """
        labels_bL = batch["labels"]
        branches_bL = batch.get("branches")
        hidden_bLD = self.model.language_model(
            inputs_embeds=self.embed(batch["input_ids"], batch.get("tiles")),
            attention_mask=None if branches_bL is None else branch_mask(branches_bL),
            position_ids=None if branches_bL is None else batch["position_ids"],
            use_cache=False,
        ).last_hidden_state
        supervised_bL = labels_bL[:, 1:] != IGNORED
        logits_sV = self.lm_head(hidden_bLD[:, :-1][supervised_bL])
        return VlmOutput(logits_sV, labels_bL[:, 1:][supervised_bL])


def branch_mask(branches_bL: Tensor) -> Tensor:
    """Who sees whom, (b, 1, L, L), True where a row may look: what came before it in its own branch or the common one.

    Padding sees itself, because a row that sees nothing has no softmax.
    """
    length = branches_bL.shape[1]
    query_bL1, key_b1L = branches_bL[:, :, None], branches_bL[:, None, :]
    earlier_LL = torch.ones(length, length, dtype=torch.bool, device=branches_bL.device).tril()
    seen_bLL = (key_b1L == 0) | (key_b1L == query_bL1)
    return (seen_bLL & earlier_LL)[:, None]
