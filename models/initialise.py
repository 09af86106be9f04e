"""How an untrained CLIP starts: open_clip's scheme, which takes the text tower's from OpenAI's code.

OpenAI published none for the vision tower; open_clip leaves PyTorch's own there, with scaled class token, positions
and projection. SigLIP's vision tower starts as in its authors' code (big_vision): as transformers' `SiglipModel`, but
for patches, whose start transformers does not cut off, and the head's output projection, which it leaves out.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from mmfoundry.models.text import TextTower
from mmfoundry.models.transformer import MLP, EncoderLayer
from mmfoundry.models.vision import AttentionPooling, VisionTower


@torch.no_grad()
def init_vision_tower(tower: VisionTower, projection: nn.Linear | None) -> None:
    """Set every weight of a vision tower and its projection.

    What is not named here keeps PyTorch's own start: patch embedding, output projections and MLPs (uniform, bound
    1/sqrt(fan-in)) and norms (one and zero).
    """
    if tower.head is not None:
        _init_siglip_vision(tower, tower.head)
        return
    assert projection is not None
    assert tower.embeddings.class_embedding is not None
    std = tower.config.width**-0.5
    for weight in (tower.embeddings.class_embedding, tower.embeddings.position_embedding.weight, projection.weight):
        nn.init.normal_(weight, std=std)
    # Xavier's bound for the three projections stacked, as PyTorch's fused attention has them
    bound = math.sqrt(6 / (3 * tower.config.width + tower.config.width))
    for layer in tower.encoder.blocks():
        for linear in _queries_keys_values(layer):
            nn.init.uniform_(linear.weight, -bound, bound)
        _zero_attention_biases(layer)


def _init_siglip_vision(tower: VisionTower, head: AttentionPooling) -> None:
    """Set every weight of a tower with attention pooling: Xavier's uniform, but for positions and patches."""
    embeddings = tower.embeddings
    nn.init.normal_(embeddings.position_embedding.weight, std=tower.config.width**-0.5)
    # LeCun's, cut off at two of its standard deviations before it is scaled: 0.8796 is what the cut leaves of them
    std = (3 * tower.config.patch_size**2) ** -0.5 / 0.87962566103423978
    nn.init.trunc_normal_(embeddings.patch_embedding.weight, std=std, a=-2 * std, b=2 * std)
    assert embeddings.patch_embedding.bias is not None
    nn.init.zeros_(embeddings.patch_embedding.bias)
    for layer in tower.encoder.blocks():
        for linear in (*_queries_keys_values(layer), layer.self_attn.out_proj):
            nn.init.xavier_uniform_(linear.weight)
        _zero_attention_biases(layer)
        _init_siglip_mlp(layer.mlp)
    for weight in (head.probe, head.attention.in_proj_weight, head.attention.out_proj.weight):
        nn.init.xavier_uniform_(weight)
    for bias in (head.attention.in_proj_bias, head.attention.out_proj.bias):
        nn.init.zeros_(bias)
    _init_siglip_mlp(head.mlp)


def _init_siglip_mlp(mlp: MLP) -> None:
    for linear in (mlp.fc1, mlp.fc2):
        nn.init.xavier_uniform_(linear.weight)
        nn.init.normal_(linear.bias, std=1e-6)


@torch.no_grad()
def init_text_tower(tower: TextTower, projection: nn.Linear | None) -> None:
    """Set every weight of a text tower and its projection; MLP biases and norms keep PyTorch's own start."""
    width, depth = tower.config.width, tower.config.layers
    nn.init.normal_(tower.embeddings.token_embedding.weight, std=0.02)
    nn.init.normal_(tower.embeddings.position_embedding.weight, std=0.01)
    if (last := projection or tower.head) is not None:
        nn.init.normal_(last.weight, std=width**-0.5)
        if last.bias is not None:
            nn.init.zeros_(last.bias)
    residual_std = width**-0.5 * (2 * depth) ** -0.5  # each block adds twice to the residual stream
    for layer in tower.encoder.blocks():
        for linear in _queries_keys_values(layer):
            nn.init.normal_(linear.weight, std=width**-0.5)
        nn.init.normal_(layer.self_attn.out_proj.weight, std=residual_std)
        nn.init.normal_(layer.mlp.fc1.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(layer.mlp.fc2.weight, std=residual_std)
        _zero_attention_biases(layer)


def _queries_keys_values(layer: EncoderLayer) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    attention = layer.self_attn
    return attention.q_proj, attention.k_proj, attention.v_proj


def _zero_attention_biases(layer: EncoderLayer) -> None:
    for linear in (*_queries_keys_values(layer), layer.self_attn.out_proj):
        nn.init.zeros_(linear.bias)
