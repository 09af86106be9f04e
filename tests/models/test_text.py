"""models/text.py: captions in groups of like length, or packed, give what they give one by one at full length."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mmfoundry.models.clip import CLIP
from mmfoundry.models.flops import clip_work, text_flops
from mmfoundry.models.text import length_groups
from tests.models.test_clip import every_position, features_and_gradients
from tests.models.test_flops import counted
from tests.models.tiny import END, pairs, tiny_clip, tiny_config, tokens

LENGTHS = [4, 9, 2, 5, 3, 3, 8, 6]


def packing_clip(layers: int = 2, context: int = 77) -> CLIP:
    text = {"context_length": context, "vocab_size": END + 1, "width": 16, "heads": 2, "layers": layers}
    model = tiny_clip(text_cfg=text)
    model.text_model.packed = True
    return model


@pytest.mark.parametrize("groups", [2, 3, 8, 20])
def test_groups_give_features_and_gradients_of_the_full_length(groups: int) -> None:
    model, batch = tiny_clip().double(), tokens(LENGTHS)
    full = features_and_gradients(model, every_position(model, {**pairs(8), "text": batch})[1])
    model.text_model.groups = groups
    grouped = features_and_gradients(model, model.encode_text(batch))
    assert max(part.abs().max() for part in grouped[1:]) > 1e-3
    torch.testing.assert_close(grouped, full, rtol=1e-9, atol=1e-12)
    counted = clip_work(model)({**pairs(8), "text": batch})
    found = length_groups(LENGTHS, groups)
    assert counted.tokens == 8 * 5 + sum(rows * length for rows, length in found)
    model.text_model.groups = 1
    saved = 3 * (8 * text_flops(model.config, 9) - sum(rows * text_flops(model.config, each) for rows, each in found))
    assert clip_work(model)({**pairs(8), "text": batch}).flops - counted.flops == saved > 0


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8), groups=st.integers(1, 5))
@settings(deadline=None)
def test_no_other_cut_has_less_padding(lengths: list[int], groups: int) -> None:
    found = length_groups(lengths, groups)
    assert len(found) == min(groups, len(lengths))  # equal on all ranks whatever their captions
    ordered, start = sorted(lengths), 0
    for rows, length in found:
        assert rows > 0
        assert ordered[start + rows - 1] <= length
        start += rows
    assert start == len(lengths)
    least = min(
        sum((b - a) * ordered[b - 1] for a, b in itertools.pairwise((0, *cuts, len(ordered))))
        for cuts in itertools.combinations(range(1, len(ordered)), len(found) - 1)
    )
    assert sum(rows * length for rows, length in found) == least


@given(lengths=st.lists(st.integers(1, 77), min_size=1, max_size=6), layers=st.integers(1, 3))
@example(lengths=[1], layers=1)  # the end of text alone
@example(lengths=[77, 77], layers=2)  # nothing to leave out
@example(lengths=[20, 1, 77, 1, 20], layers=2)
@settings(deadline=None, max_examples=15)
def test_packed_captions_give_features_and_gradients_of_the_full_length(lengths: list[int], layers: int) -> None:
    model, batch = packing_clip(layers), tokens(lengths, context=77)
    for row, length in zip(batch, lengths, strict=True):  # what follows the end is never looked at
        row[length:] = 1 + torch.arange(77 - length) % END
    whole = {**pairs(len(lengths)), "text": batch}
    full = features_and_gradients(model, every_position(model, whole)[1])
    assert max(part.abs().max() for part in full[1:]) > 1e-3
    # fp32: each weight's gradient is a sum over captions and positions, here in another order
    torch.testing.assert_close(features_and_gradients(model, model.encode_text(batch)), full, rtol=1e-4, atol=1e-5)
    model, full = model.double(), features_and_gradients(model.double(), every_position(model.double(), whole)[1])
    torch.testing.assert_close(features_and_gradients(model, model.encode_text(batch)), full, rtol=1e-9, atol=1e-12)


def test_no_padding_is_multiplied() -> None:
    model, batch = packing_clip(context=9), {**pairs(8), "text": tokens(LENGTHS)}
    work = clip_work(model)(batch)
    assert work.tokens == 8 * 5 + sum(LENGTHS)
    assert counted(model, batch, backward=True) == work.flops


def test_packed_captions_in_sixteen_bits() -> None:
    model, batch = packing_clip(context=9), tokens(LENGTHS)
    exact = model.encode_text(batch)
    with torch.autocast("cpu", torch.bfloat16):
        packed = model.encode_text(batch)
        model.text_model.packed = False
        trimmed = model.encode_text(batch)
    assert packed.dtype == torch.float32
    assert not torch.equal(packed, exact)
    assert (packed - exact).norm() < 1.5 * (trimmed - exact).norm()  # rounded as often


def test_packed_captions_of_a_locked_tower_and_none() -> None:
    model = packing_clip(context=9)
    model.text_model.requires_grad_(False)
    model.encode_text(tokens(LENGTHS)).sum().backward()
    assert all(weight.grad is None for weight in model.text_model.parameters())
    assert model.text_projection.weight.grad.abs().max() > 1e-3
    assert model.encode_text(tokens([])).shape == (0, tiny_config().embed_dim)


def test_compiled_blocks_take_packed_captions_of_any_total() -> None:
    """Compiled for one number of tokens, then for any: not anew with every batch."""
    model, graphs = packing_clip(context=9), []

    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    batches = [tokens(lengths) for lengths in ([4, 9, 2, 5], [3, 3, 8, 5], [1, 1, 2, 7], [9, 9, 9, 1])]
    expected = [features_and_gradients(model, model.encode_text(batch)) for batch in batches]
    for block in model.text_model.encoder.blocks():
        block.forward = torch.compile(block.forward, backend=counting)  # type: ignore[method-assign]
    found, after = [], []
    for batch in batches:
        found.append(features_and_gradients(model, model.encode_text(batch)))
        after.append(len(graphs))
    torch.testing.assert_close(found, expected)
    assert 0 < after[0] < after[1] == after[-1]
