"""data/perceptual.py: copies of a picture are near, other pictures are far; held on the shipped pool."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from mmfoundry.data.decode import UnreadableSample, decode_image
from mmfoundry.data.filters.near_duplicate import NearDuplicate
from mmfoundry.data.perceptual import HASH_BYTES, perceptual_hash
from mmfoundry.data.reader import Pool
from mmfoundry.data.sample import image_member
from tests.data.conftest import smooth

SAMPLES = Path(__file__).parents[2] / "data" / "samples"
RADIUS = NearDuplicate().radius


def bits(pixels: np.ndarray) -> np.ndarray:
    return np.unpackbits(np.frombuffer(perceptual_hash(pixels), np.uint8))


def distance(a: np.ndarray, b: np.ndarray) -> int:
    return int((bits(a) != bits(b)).sum())


def again(pixels: np.ndarray, kind: str, **options: object) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return np.asarray(Image.open(buffer).convert("RGB"))


def disc(colour: tuple[int, int, int], side: int = 96) -> np.ndarray:
    y, x = np.mgrid[:side, :side] / side - 0.5
    pixels = np.full((side, side, 3), 245, np.uint8)
    pixels[(x**2 + y**2) < 0.1] = colour
    return pixels


@pytest.mark.parametrize("seed", range(5))
def test_copies_are_near(seed: int) -> None:
    pixels = smooth(seed, height=90, width=120)
    image = Image.fromarray(pixels)
    copies = [
        again(pixels, "JPEG", quality=60),
        again(pixels, "WEBP", quality=60),
        np.asarray(image.resize((240, 180), Image.Resampling.BICUBIC)),
        np.asarray(image.resize((80, 60), Image.Resampling.LANCZOS)),
        np.asarray(ImageEnhance.Brightness(image).enhance(1.03)),
    ]
    assert max(distance(pixels, copy) for copy in copies) <= RADIUS


def test_other_pictures_are_far() -> None:
    pictures = [smooth(seed, height=90, width=120) for seed in range(12)]
    hashes = np.stack([bits(picture) for picture in pictures])
    apart = (hashes[:, None] != hashes[None]).sum(axis=2)[np.triu_indices(12, 1)]
    assert apart.min() > 2 * RADIUS


def test_colour_counts() -> None:
    """Of the same brightness, so that the luminance alone cannot tell them apart."""
    assert distance(disc((200, 30, 40)), disc((30, 110, 40))) > RADIUS


def test_flat_pictures_have_stable_hashes() -> None:
    first = perceptual_hash(np.full((50, 50, 3), 80, np.uint8))
    assert len(first) == HASH_BYTES
    assert first == perceptual_hash(np.full((70, 40, 3), 90, np.uint8))


def test_the_hash_stays_what_it_is() -> None:
    """Tables of an earlier version must mean the same."""
    assert perceptual_hash(smooth(3, 90, 120)).hex()[:32] == "74c0c500a5e086085400710044000000"


@pytest.mark.parametrize("height", [1, 2, 5000])
def test_any_shape_has_a_hash(height: int) -> None:
    assert len(perceptual_hash(np.zeros((height, 3, 3), np.uint8))) == HASH_BYTES


def test_sample_pool_copies_and_others_are_apart() -> None:
    """Copies at most 24 bits apart, different pictures at least 50: the radius stands between."""
    pool = Pool(str(SAMPLES / "pool-*.tar"), save_index=False)
    hashes, uids, originals, blank = [], [], {}, set()
    for number in range(len(pool)):
        raw = pool.get(number)
        meta = json.loads(raw.members["json"])
        try:
            pixels = decode_image(image_member(raw.members) or b"")
        except UnreadableSample:
            continue
        hashes.append(bits(pixels))
        uids.append(meta["uid"])
        originals[meta["uid"]] = meta["truth"].get("of", meta["uid"])
        if meta["truth"]["bad"] in ("blank", "extreme_aspect", "too_small"):
            blank.add(meta["uid"])
    ones = np.stack(hashes).astype(np.float32)
    apart = ones @ (1 - ones.T) + (1 - ones) @ ones.T
    root = np.array([originals[uid] for uid in uids])
    same = (root[:, None] == root[None]) & ~np.eye(len(root), dtype=bool)
    usual = np.array([uid not in blank for uid in uids])
    others = (root[:, None] != root[None]) & usual[:, None] & usual[None]
    assert same.any()
    assert apart[same].max() <= 24 < RADIUS < 50 <= apart[others].min()
