"""data/blur.py: what is in a box goes, what is far from it stays, and the file stays what it was."""

import io

import numpy as np
import pytest
from PIL import Image

from mmfoundry.data.blur import blur_boxes, blur_image
from mmfoundry.data.decode import UnreadableImage, decode_image
from tests.data.conftest import encode

NOISE = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
BOX = [0.25, 0.25, 0.5, 0.5]  # 40 to 80, 30 to 60


def test_the_box_is_blurred_and_what_is_far_stays() -> None:
    blurred = blur_boxes(NOISE, [BOX])
    inside = blurred[35:55, 45:75].astype(float)
    assert inside.std() < 0.3 * NOISE[35:55, 45:75].std()
    assert (blurred[:, 100:] == NOISE[:, 100:]).all()
    assert (blurred[90:] == NOISE[90:]).all()
    # the margin: a tenth of the longer side beyond the box is changed as well
    assert blurred[30:60, 37:40].astype(float).std() < 0.6 * NOISE[30:60, 37:40].std()


def test_longer_sides_are_blurred_more() -> None:
    small, large = blur_boxes(NOISE, [[0.45, 0.45, 0.55, 0.55]]), blur_boxes(NOISE, [[0.1, 0.1, 0.9, 0.9]])
    assert large[55:65, 75:85].astype(float).std() < 0.5 * small[55:65, 75:85].astype(float).std()


def test_boxes_at_and_beyond_the_edge_are_cut_to_it() -> None:
    for box in ([0.0, 0.0, 1.0, 1.0], [-0.2, -0.2, 0.3, 0.3], [0.8, 0.8, 1.4, 1.4], [1.2, 1.2, 1.4, 1.4]):
        assert blur_boxes(NOISE, [box]).shape == NOISE.shape
    assert (blur_boxes(NOISE, [[1.2, 1.2, 1.4, 1.4]]) == NOISE).all()


def test_no_boxes_leave_the_bytes_alone() -> None:
    data = encode(NOISE, "PNG")
    assert blur_image(data, []) == ("png", data)
    assert blur_boxes(NOISE, []) is NOISE


@pytest.mark.parametrize(("kind", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("BMP", "png")])
def test_a_format_that_shards_have_is_kept(kind: str, extension: str) -> None:
    found, data = blur_image(encode(NOISE, kind), [BOX])
    assert found == extension
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension]
        assert image.size == (160, 120)


def test_orientation_is_applied_and_metadata_goes() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "somebody's face"
    turned = encode(NOISE, "JPEG", exif=exif, quality=95)
    _, data = blur_image(turned, [[0.0, 0.0, 0.5, 0.5]])
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (120, 160)
        assert not image.getexif()
    shown, blurred = decode_image(turned).astype(float), decode_image(data).astype(float)
    assert blurred[20:60, 15:45].std() < 0.4 * shown[20:60, 15:45].std()
    assert np.abs(blurred[120:, 90:] - shown[120:, 90:]).mean() < 12  # encoded anew, so not equal


def test_a_damaged_image_is_reported() -> None:
    with pytest.raises(UnreadableImage):
        blur_image(encode(NOISE)[:500], [BOX])
