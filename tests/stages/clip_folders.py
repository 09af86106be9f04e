"""Small random CLIPs on disk, as open_clip and transformers write them, with their tokenizers."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mmfoundry.models.clip import CLIP, ClipConfig
from mmfoundry.models.interop.clip_folders import save_for_open_clip, save_for_transformers
from mmfoundry.models.io import save_clip
from mmfoundry.pipeline.torchvision_ops import declare_missing_ops

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 16, "width": 16, "heads": 2, "layers": 1},
}


def clip(seed: int = 0) -> CLIP:
    return CLIP.from_seed(ClipConfig.model_validate(CONFIG), seed).eval()


def ours(folder: Path, seed: int = 0) -> Path:
    save_clip(clip(seed), folder, seed=seed)
    return folder


def open_clip_folder(folder: Path, seed: int = 0) -> Path:
    save_for_open_clip(clip(seed), folder)
    return folder


def transformers_folder(folder: Path, seed: int = 0) -> Path:
    save_for_transformers(clip(seed), folder)
    return folder


def custom_open_clip_folder(folder: Path) -> Path:
    """One of open_clip's CustomTextCLIP models, which is no plain CLIP: a sigmoid-trained one with a bias."""
    declare_missing_ops()
    from open_clip.model import CustomTextCLIP

    torch.manual_seed(3)
    model_cfg: dict[str, Any] = json.loads(json.dumps(CONFIG)) | {"init_logit_bias": -10.0}
    model = CustomTextCLIP(**model_cfg)
    folder.mkdir()
    record = {
        "model_cfg": model_cfg | {"custom_text": True},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash", "interpolation": "bicubic"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(record))
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")
    return folder


def siglip_folder(folder: Path) -> Path:
    """transformers' SigLIP with a tokenizer of a few words."""
    declare_missing_ops()
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipImageProcessor, SiglipModel

    torch.manual_seed(4)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = ["<pad>", "</s>", "<unk>", "picture", "another", "line", "for", *map(str, range(40))]
    config = SiglipConfig(
        text_config={**tower, "vocab_size": len(words), "max_position_embeddings": 8, "projection_size": 16},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
    )
    SiglipModel(config).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    vocabulary = {word: number for number, word in enumerate(words)}
    base = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.Whitespace()
    base.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=base,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids"],
    ).save_pretrained(folder)
    return folder
