"""A vision-language model small enough to test with: random weights, and a tokenizer made on the fly."""

from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mmfoundry.models.clip import CLIP
from mmfoundry.models.language import LanguageModel
from mmfoundry.models.vlm import VisionLanguageModel, VlmSettings
from mmfoundry.models.vlm_io import build_vlm
from mmfoundry.models.vlm_text import VlmText
from tests.models.tiny import tiny_clip

CORPUS = [
    "user\nassistant\nHow many pictures are there?\ntwo three four one",
    "What is in the top left? the dog the apple bottom right",
    "Is there a dog? yes no\nuser\nassistant\n tile 1: whole:",
]
TAGS = ["top left:", "top right:", "bottom left:", "bottom right:"]
WORDS = ("<pad>", "<|im_start|>", "<|im_end|>")


def tiny_tokenizer(patch_token: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE over a few sentences; with the placeholder among its special tokens or without."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [*WORDS, "<empty_output>"] if patch_token else [*WORDS]
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<|im_start|>", eos_token="<|im_end|>"
    )


def tiny_language(seed: int = 0, patch_token: bool = True, tie: bool = True) -> LanguageModel:
    tokenizer = tiny_tokenizer(patch_token)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tie,
        initializer_range=0.3,  # far enough from zero that answers differ from each other
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LanguageModel(LlamaForCausalLM(config).eval(), tokenizer)


def tiny_settings(connector: str = "pixel_shuffle", **changes: Any) -> VlmSettings:
    tiled: dict[str, Any] = {
        "connector": {"type": "pixel_shuffle", "downsample_factor": 2},
        "tiles": {"min_tiles": 4, "max_tiles": 4},
        "image": {"tile_tags": TAGS},
    }
    plain: dict[str, Any] = {
        "connector": {"type": "mlp", "downsample_factor": 1},
        "image": {"whole_tag": ""},
    }
    tree = {"pixel_shuffle": tiled, "mlp": plain}[connector]
    return VlmSettings.model_validate(tree | changes)


def tiny_vlm(
    connector: str = "pixel_shuffle",
    seed: int = 0,
    patch_token: bool = True,
    tie: bool = True,
    clip: CLIP | None = None,
    **changes: Any,
) -> tuple[VisionLanguageModel, VlmText]:
    """Towers of 16 pixels and width 24 (`tiny_clip`), four patches a tile."""
    language = tiny_language(seed, patch_token, tie)
    model, text = build_vlm(clip or tiny_clip(seed), language, tiny_settings(connector, **changes), seed)
    with torch.no_grad():  # image tokens as large as the others, so that a picture in the wrong place shows
        for weight in model.model.multi_modal_projector.parameters():
            weight.mul_(3).add_(0.1 * torch.randn_like(weight))
    return model, text


def picture(seed: int, height: int = 32, width: int = 32) -> np.ndarray:
    """uint8 (height, width, 3), noise."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def logits_of(model: VisionLanguageModel, input_ids: Tensor, tiles: Tensor) -> Tensor:
    """(b, L, V) at every position, by the plain causal path."""
    hidden = model.model.language_model(inputs_embeds=model.embed(input_ids, tiles)).last_hidden_state
    return model.lm_head(hidden)
