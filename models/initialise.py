"""How an untrained CLIP starts: open_clip's scheme, which takes the text tower's from OpenAI's code.

OpenAI published none for the vision tower; open_clip leaves PyTorch's own there, with scaled class token, positions
and projection.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from mmfoundry.models.text import TextTower
from mmfoundry.models.transformer import EncoderLayer
from mmfoundry.models.vision import VisionTower


@torch.no_grad()
def init_vision_tower(tower: VisionTower, projection: nn.Linear) -> None:
    """Set every weight of a vision tower and its projection.

    What is not named here keeps PyTorch's own start: patch embedding, output projections and MLPs (uniform, bound
    1/sqrt(fan-in)) and norms (one and zero).
    """
    std = tower.config.width**-0.5
    for weight in (tower.embeddings.class_embedding, tower.embeddings.position_embedding.weight, projection.weight):
        nn.init.normal_(weight, std=std)
    # Xavier's bound for the three projections stacked, as PyTorch's fused attention has them
    bound = math.sqrt(6 / (3 * tower.config.width + tower.config.width))
    for layer in tower.encoder.blocks():
        for linear in _queries_keys_values(layer):
            nn.init.uniform_(linear.weight, -bound, bound)
        _zero_attention_biases(layer)


@torch.no_grad()
def init_text_tower(tower: TextTower, projection: nn.Linear) -> None:
    """Set every weight of a text tower and its projection; MLP biases and norms keep PyTorch's own start."""
    width, depth = tower.config.width, tower.config.layers
    nn.init.normal_(tower.embeddings.token_embedding.weight, std=0.02)
    nn.init.normal_(tower.embeddings.position_embedding.weight, std=0.01)
    nn.init.normal_(projection.weight, std=width**-0.5)
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
