"""What a CLIP's training costs, counted from shapes alone: positions and floating-point operations of a batch.

Matrix products only, two operations a multiply-add, as torch.utils.flop_counter counts them; attention in full, also
under the causal mask. What is not computed (all positions but one of the last block, padding that was cut) does not
count, nor does what is computed twice to save memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmfoundry.models.clip import CLIP, ClipConfig
from mmfoundry.models.open_clip_model import OpenClip
from mmfoundry.models.text import end_of_text, length_groups
from mmfoundry.pipeline.gauges import Work

FORWARD_AND_BACKWARD = 3  # the backward pass multiplies twice: for the weights and for the inputs


def vision_flops(config: ClipConfig) -> tuple[int, int]:
    """Operations of one picture's forward pass: all of them, and those of the patch embedding among them."""
    vision = config.vision_cfg
    patches = 2 * vision.num_patches * 3 * vision.patch_size**2 * vision.width
    positions, width, hidden = vision.num_patches + vision.num_prefix, vision.width, vision.mlp_hidden
    if vision.pool_type == "map":  # the head is shaped as a block of which one position is wanted
        blocks = vision.layers * _block(positions, positions, width, hidden) + _block(positions, 1, width, hidden)
        return patches + blocks, patches
    return patches + _pooled_blocks(vision.layers, positions, width, hidden) + 2 * width * config.embed_dim, patches


def text_flops(config: ClipConfig, length: int) -> int:
    """Operations of the forward pass of one caption of `length` positions."""
    text = config.text_cfg
    blocks = _pooled_blocks(text.layers, length, text.width, text.mlp_hidden)
    return blocks + (2 * text.width * config.embed_dim if text.proj_type == "linear" else 0)


def _pooled_blocks(layers: int, positions: int, width: int, hidden: int) -> int:
    """Blocks of which the last gives one position only."""
    if layers == 0:
        return 0
    whole = _block(positions, positions, width, hidden)
    return (layers - 1) * whole + _block(positions, 1, width, hidden)


def _block(positions: int, rows: int, width: int, hidden: int) -> int:
    """One block, of which `rows` positions are wanted."""
    keys_values = 2 * 2 * positions * width * width
    queries_and_output = 2 * 2 * rows * width * width
    attention = 2 * 2 * rows * positions * width
    mlp = 2 * 2 * rows * width * hidden
    return keys_values + queries_and_output + attention + mlp


def clip_work(model: CLIP) -> Callable[[Mapping[str, Any]], Work]:
    """What one micro-batch costs this rank to train on; towers only, the loss is left out.

    A tower of which nothing is trained has a forward pass only. Pixels want no gradient, so the patch embedding has no
    backward pass towards them.
    """
    config = model.config
    image_all, patches = vision_flops(config)
    image = _with_backward(image_all, patches, model.vision_model)
    trains_text = any(weight.requires_grad for weight in model.text_model.parameters())
    positions = config.vision_cfg.num_patches + config.vision_cfg.num_prefix

    def work(batch: Mapping[str, Any]) -> Work:
        rows, length = batch["text"].shape
        groups = [(rows, length)]
        if model.text_model.packed or model.text_model.groups > 1:
            lengths = (end_of_text(batch["text"]) + 1).tolist()
            packed = [(count, each) for each, count in Counter(lengths).items()]
            groups = packed if model.text_model.packed else length_groups(lengths, model.text_model.groups)
        text = sum(count * text_flops(config, longest) for count, longest in groups)
        text *= FORWARD_AND_BACKWARD if trains_text else 1
        tokens = rows * positions + sum(count * longest for count, longest in groups)
        return Work(tokens=tokens, flops=rows * image + text)

    return work


def _with_backward(forward: int, first: int, tower: Any) -> int:
    trained = any(weight.requires_grad for weight in tower.parameters())
    return FORWARD_AND_BACKWARD * forward - first if trained else forward


def open_clip_work(model: OpenClip) -> Callable[[Mapping[str, Any]], Work]:
    """What one micro-batch costs this rank to train on, of a model that open_clip computes: counted once, by torch.

    A pass forward and backward over tensors without storage, for captions of three lengths: what a caption costs is a
    polynomial of the second degree in its length (attention looks at each pair of positions), so these give them all.
    Captions that are made as long as the context cost the same, save in a CoCa's decoder.

    Tokens are the captions' positions, and those of pictures where the tower is open_clip's own ViT.

    Args:
        model: not yet changed by an engine; what is locked in it has no backward pass.
    """
    context = model.config.text_cfg.context_length
    lengths = [2, (2 + context) // 2, context] if model.trims or model.captions else [context]
    costs = [_pair_flops(model, length) for length in lengths]
    positions = getattr(model.open_clip.visual, "positional_embedding", None)
    seen = len(positions) if isinstance(positions, Tensor) else 0

    def work(batch: Mapping[str, Any]) -> Work:
        rows, length = batch["text"].shape
        groups = [(rows, length if model.trims else context)]
        if model.trims and model.groups > 1:
            groups = length_groups(model.caption_lengths(batch["text"]).tolist(), model.groups)
        tokens = sum(count * (seen + longest) for count, longest in groups)
        if model.captions:  # the decoder is cut behind the batch's longest caption
            groups = [(rows, length)]
        return Work(tokens=tokens, flops=sum(count * _through(lengths, costs, longest) for count, longest in groups))

    return work


_COUNTED_ROWS = 2  # a batch normalisation refuses one picture


def _pair_flops(model: OpenClip, length: int) -> float:
    """Operations of a step, forward and backward, for one picture and its caption."""
    # A text tower of transformers looks whether its mask masks anything, unless it sees that its tensors are not real.
    with FakeTensorMode(allow_non_fake_inputs=True) if model.config.text_cfg.vocab_size is None else nullcontext():
        return _counted(model, length)


def _counted(model: OpenClip, length: int) -> float:
    side = model.config.vision_cfg.image_size
    batch = {
        "image": torch.empty(_COUNTED_ROWS, 3, side, side, dtype=torch.uint8, device="meta"),
        "text": torch.empty(_COUNTED_ROWS, length, dtype=torch.int64, device="meta"),
    }
    bare: dict[str, Tensor] = {
        name: torch.empty_like(weight, device="meta").requires_grad_(weight.requires_grad)
        for name, weight in model.named_parameters()
    }
    bare |= {name: torch.empty_like(buffer, device="meta") for name, buffer in model.named_buffers()}
    was_training, groups = model.training, model.groups
    model.groups = 1  # which captions go together is seen in a batch only
    try:
        # The counter knows attention that is written out; few of the kernels.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            output = functional_call(model.train(), bare, (batch,))
            parts = [part.sum() for part in output if isinstance(part, Tensor) and part.requires_grad]
            if parts:
                torch.stack(parts).sum().backward()
    finally:
        model.train(was_training)
        model.groups = groups
    return counter.get_total_flops() / _COUNTED_ROWS


def _through(places: list[int], values: list[float], at: int) -> float:
    """The polynomial through some points, at another place (Lagrange)."""
    total = 0.0
    for i, value in enumerate(values):
        for j, place in enumerate(places):
            if i != j:
                value *= (at - place) / (places[i] - place)
        total += value
    return total
