"""models/text.py: captions in groups of like length give what they give one by one at full length."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfoundry.models.flops import clip_work, text_flops
from mmfoundry.models.text import length_groups
from tests.models.test_clip import every_position, features_and_gradients
from tests.models.tiny import pairs, tiny_clip, tokens

LENGTHS = [4, 9, 2, 5, 3, 3, 8, 6]


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
