"""data/regions.py: areas and masks against counting pixels one by one, and what masking leaves of a picture."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfoundry.data.regions import NO_REGIONS, covered, from_boxes, mask_of, to_boxes, without

HEIGHT, WIDTH = 40, 60


def boxes_of_pixels(*boxes: tuple[int, int, int, int]) -> np.ndarray:
    return from_boxes(np.array(boxes) / (WIDTH, HEIGHT, WIDTH, HEIGHT))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 30), st.integers(1, 10), st.integers(1, 10)), max_size=4))
def test_the_area_is_that_of_the_union(sizes: list[tuple[int, int, int, int]]) -> None:
    boxes = [(x, y, x + w, y + h) for x, y, w, h in sizes]
    mask = np.zeros((HEIGHT, WIDTH), bool)
    for x0, y0, x1, y1 in boxes:
        mask[y0:y1, x0:x1] = True
    regions = boxes_of_pixels(*boxes) if boxes else NO_REGIONS
    found = mask_of(regions, HEIGHT, WIDTH)
    assert (found == mask).all()
    assert (mask_of(regions[:, ::-1], HEIGHT, WIDTH) == mask).all()  # corners the other way around
    assert covered(regions, HEIGHT, WIDTH) == mask.mean()


def test_a_region_from_edge_to_edge_covers_everything() -> None:
    assert covered(from_boxes([[0, 0, 1, 1]]), 7, 11) == 1.0
    assert covered(NO_REGIONS, 7, 11) == 0.0
    assert covered(from_boxes([[0, 0, 0.5, 1]]), 100, 100) == pytest.approx(0.5, abs=1e-9)


def test_slanted_regions_cover_their_own_area_and_not_their_frame() -> None:
    diamond = np.array([[[0.5, 0.0], [1.0, 0.5], [0.5, 1.0], [0.0, 0.5]]], np.float32)
    assert covered(diamond, 200, 200) == pytest.approx(0.5, abs=0.01)
    assert to_boxes(diamond) == [[0.0, 0.0, 1.0, 1.0]]


def test_frames_are_cut_to_the_picture() -> None:
    assert to_boxes(np.array([[[-0.1, 0.2], [0.5, 0.2], [0.5, 1.4], [-0.1, 1.4]]], np.float32)) == [
        pytest.approx([0.0, 0.2, 0.5, 1.0])
    ]
    assert to_boxes(NO_REGIONS) == []


def test_masked_text_takes_the_colour_around_it() -> None:
    pixels = np.full((HEIGHT, WIDTH, 3), (10, 200, 30), np.uint8)
    pixels[:, 30:] = (90, 20, 240)
    clean = pixels.copy()
    pixels[10:20, 5:15] = 255  # one text on each half
    pixels[10:20, 40:50] = 0
    before = pixels.copy()
    filled = without(pixels, boxes_of_pixels((5, 10, 15, 20), (40, 10, 50, 20)))
    assert (filled == clean).all()
    assert (pixels == before).all()


def test_surroundings_leave_other_text_out() -> None:
    pixels = np.full((HEIGHT, WIDTH, 3), 100, np.uint8)
    pixels[10:20, 5:15] = 255
    pixels[10:20, 15:25] = 0  # right beside it
    filled = without(pixels, boxes_of_pixels((5, 10, 15, 20), (15, 10, 25, 20)))
    assert (filled == 100).all()


def test_text_everywhere_leaves_the_mean_colour() -> None:
    pixels = np.zeros((10, 10, 3), np.uint8)
    pixels[:5] = 200
    assert (without(pixels, from_boxes([[0, 0, 1, 1]])) == 100).all()
    assert without(pixels, NO_REGIONS) is pixels
