"""Text towers and tokenizers of transformers small enough to test with, as folders."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from mmfoundry.pipeline.torchvision_ops import declare_missing_ops

declare_missing_ops()

from transformers import BertConfig, BertModel, BertTokenizerFast  # noqa: E402

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "square", "that", "is", "red", "green", "blue", "all"]
WORDS += ["over", "indeed", "in", "##de", "##ed", ",", "!"]


def bert_tokenizer(folder: Path) -> Path:
    """Word pieces between [CLS] and [SEP], as bert-base-uncased is on the hub: tokenizer_config.json names no class."""
    rules = Tokenizer(models.WordPiece({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    rules.normalizer = normalizers.BertNormalizer(lowercase=True)
    rules.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    rules.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    BertTokenizerFast(tokenizer_object=rules).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    (folder / "config.json").write_text('{"model_type": "bert"}')
    return folder


def bert(folder: Path) -> Path:
    """A text tower with its tokenizer."""
    bert_tokenizer(folder)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        BertModel(config).save_pretrained(folder)
    return folder
