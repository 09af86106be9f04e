from collections import Counter
from itertools import combinations
from math import comb

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.stats import chi2

from mmfoundry.data.scenes import SceneStyle, compose_scene, scene_rng
from tests.data.drawn import by_name, pictures

TINY = {"canvas_size": 16}
PICTURES = by_name(pictures(8, ("noto",)))
BOTH = by_name(pictures(8))


def scenes(count: int, style: SceneStyle, pool: dict = PICTURES) -> list:
    return [compose_scene(pool, scene_rng(0, "test", index), style) for index in range(count)]


@pytest.fixture(scope="module")
def many() -> list[tuple[int, ...]]:
    """The filled cells of many scenes, in drawing order."""
    return [tuple(item.cell for item in scene.objects) for scene in scenes(4000, SceneStyle(**TINY))]


def test_every_number_of_objects_is_equally_likely(many: list[tuple[int, ...]]) -> None:
    counts = Counter(len(cells) for cells in many)
    expected = len(many) / 4
    statistic = sum((counts[n] - expected) ** 2 / expected for n in range(1, 5))
    assert statistic < chi2.ppf(1 - 1e-4, df=3)


def test_given_the_number_every_set_of_cells_is_equally_likely(many: list[tuple[int, ...]]) -> None:
    """So which slots are empty tells nothing of the count beyond how many are."""
    for count in (1, 2, 3):
        found = Counter(tuple(sorted(cells)) for cells in many if len(cells) == count)
        expected = sum(found.values()) / comb(4, count)
        statistic = sum((found[cells] - expected) ** 2 / expected for cells in combinations(range(4), count))
        assert statistic < chi2.ppf(1 - 1e-4, df=comb(4, count) - 1)


@pytest.mark.parametrize("slot", range(4))
def test_no_slot_tells_more_about_the_count_than_it_must(many: list[tuple[int, ...]], slot: int) -> None:
    """The mutual information of a slot's emptiness and the count is that of uniform placement."""
    joint = np.zeros((2, 4))
    for cells in many:
        joint[int(slot in cells), len(cells) - 1] += 1
    chance = np.arange(1, 5) / 4  # that a slot is filled, by count
    least = mutual_information(np.stack([1 - chance, chance]))
    assert mutual_information(joint) == pytest.approx(least, abs=0.03)


def mutual_information(joint: np.ndarray) -> float:
    """Of a table of joint counts, in bits."""
    share = joint / joint.sum()
    independent = share.sum(0, keepdims=True) * share.sum(1, keepdims=True)
    seen = share > 0
    return float((share[seen] * np.log2(share[seen] / independent[seen])).sum())


def test_drawing_order_says_nothing_about_the_cell(many: list[tuple[int, ...]]) -> None:
    firsts = Counter(cells[0] for cells in many if len(cells) == 4)
    expected = sum(firsts.values()) / 4
    assert sum((firsts[cell] - expected) ** 2 / expected for cell in range(4)) < chi2.ppf(1 - 1e-4, df=3)


def test_boxes_are_where_the_pixels_differ_from_the_canvas() -> None:
    for scene in scenes(40, SceneStyle(canvas_size=128, darkest=250)):
        changed = np.zeros((128, 128), bool)
        for item in scene.objects:
            left, top, right, bottom = item.box
            room = item.cell % 2 * 64, item.cell // 2 * 64
            assert room[0] <= left < right <= room[0] + 64
            assert room[1] <= top < bottom <= room[1] + 64
            changed[top:bottom, left:right] = True
            middle = scene.image[top + 3 : bottom - 3, left + 3 : right - 3].reshape(-1, 3)
            assert (middle.min(1) < 250).all()
        assert (scene.image[~changed] >= 200).mean() > 0.95  # but for the soft edge around a box


def test_sizes_span_the_range() -> None:
    scales = [item.scale for scene in scenes(300, SceneStyle(**TINY)) for item in scene.objects]
    assert 0.55 <= min(scales) < 0.58
    assert 0.97 < max(scales) <= 1.0


def test_one_generator_one_scene() -> None:
    one, same = (compose_scene(BOTH, scene_rng(7, "a", 3), SceneStyle()) for _ in range(2))
    assert np.array_equal(one.image, same.image)
    assert one.objects == same.objects
    for other in (scene_rng(8, "a", 3), scene_rng(7, "b", 3), scene_rng(7, "a", 4)):
        assert not np.array_equal(compose_scene(BOTH, other, SceneStyle()).image, one.image)


def test_concepts_repeat_only_where_allowed() -> None:
    def repeats(allowed: bool) -> bool:
        found = scenes(100, SceneStyle(**TINY, repeats=allowed))
        return any(len({item.concept.name for item in scene.objects}) < len(scene.objects) for scene in found)

    assert repeats(True)
    assert not repeats(False)


def test_each_scene_is_in_one_of_the_styles() -> None:
    assert Counter(scene.style for scene in scenes(200, SceneStyle(**TINY), BOTH)).keys() == {"noto", "twemoji"}


def test_a_single_object_may_lie_anywhere() -> None:
    style = SceneStyle(arrangement="single", canvas_size=64, min_scale=0.3)
    found = scenes(200, style)
    assert all(len(scene.objects) == 1 and scene.objects[0].cell is None for scene in found)
    centres = (
        np.array([[item.box[0] + item.box[2], item.box[1] + item.box[3]] for s in found for item in s.objects]) / 2
    )
    assert centres.min() < 16
    assert centres.max() > 48
    with pytest.raises(ValueError, match="no cell"):
        _ = found[0].objects[0].place


@pytest.mark.parametrize(
    ("given", "says"),
    [({"min_objects": 3, "max_objects": 2}, "max_objects 2"), ({"min_scale": 0.9, "max_scale": 0.5}, "max_scale 0.5")],
)
def test_empty_ranges_are_refused(given: dict[str, float], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        SceneStyle(**given)


def test_too_few_concepts_are_refused() -> None:
    with pytest.raises(ValueError, match="3 objects a scene need as many concepts"):
        compose_scene(by_name(pictures(2)), scene_rng(0, "x", 0), SceneStyle(min_objects=3, max_objects=3))
