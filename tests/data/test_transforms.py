"""Transforms: open_clip's pixels, torchvision's geometry."""

import io
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from mmfoundry.data.decode import LazyImage
from mmfoundry.data.transforms import (
    OPENAI_MEAN,
    OPENAI_STD,
    EvalTransform,
    Normalise,
    TrainTransform,
    normalise,
    resize,
    resize_to_square,
)
from mmfoundry.pipeline.errors import ConfigError
from mmfoundry.pipeline.torchvision_ops import declare_missing_ops

declare_missing_ops()
from open_clip.transform import image_transform  # noqa: E402
from torchvision.transforms import RandomResizedCrop  # noqa: E402

from .conftest import encode  # noqa: E402
from .photographs import photograph  # noqa: E402


def _noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _open_clip_pixels(image: np.ndarray, size: int) -> np.ndarray:
    plain = image_transform(size, is_train=False, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return plain(Image.fromarray(image)).mul(255).round().to(torch.uint8).numpy()


@pytest.mark.parametrize("size", [64, 224])
@pytest.mark.parametrize("shape", [(64, 64), (480, 640), (641, 480), (33, 47), (225, 224), (100, 1000), (128, 128)])
def test_eval_gives_open_clips_pixels(size: int, shape: tuple[int, int]) -> None:
    image = _noise(*shape)
    np.testing.assert_array_equal(EvalTransform(size)(image), _open_clip_pixels(image, size))


@pytest.mark.parametrize("shape", [(64, 64), (480, 640), (641, 480), (33, 47)])
def test_squashed_it_gives_open_clips_pixels(shape: tuple[int, int]) -> None:
    plain = image_transform(48, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3, resize_mode="squash")
    image = _noise(*shape)
    expected = plain(Image.fromarray(image)).mul(255).round().to(torch.uint8).numpy()
    np.testing.assert_array_equal(EvalTransform(48, "squash")(image), expected)


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 150), width=st.integers(1, 150), size=st.integers(1, 50))
def test_eval_gives_open_clips_pixels_at_any_size(height: int, width: int, size: int) -> None:
    if max(height, width) > 64 * min(height, width):
        return
    image = _noise(height, width)
    np.testing.assert_array_equal(EvalTransform(size)(image), _open_clip_pixels(image, size))


def test_a_thread_of_an_image_does_not_fill_the_memory() -> None:
    assert EvalTransform(32)(np.zeros((1, 1_000_000, 3), np.uint8)).shape == (3, 32, 32)
    rng = np.random.default_rng(0)
    assert TrainTransform(32)(np.zeros((1_000_000, 1, 3), np.uint8), rng).shape == (3, 32, 32)


def test_normalised_pixels_are_open_clips() -> None:
    image = _noise(70, 90)
    expected = image_transform(64, is_train=False, mean=OPENAI_MEAN, std=OPENAI_STD)(Image.fromarray(image))
    found = normalise(torch.from_numpy(EvalTransform(64)(image))[None])[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert normalise(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_normalising_in_a_loop_gives_the_same_numbers_in_memory_of_its_own(dtype: torch.dtype | None) -> None:
    normalised = Normalise(dtype=dtype)
    batches = [torch.from_numpy(_noise(2000, 200, seed).reshape(20, 3, 100, 200)) for seed in range(5)]
    held, places = [], set()
    for number, batch in enumerate(batches):
        found = normalised(batch[: 20 - number])
        assert torch.equal(found, normalise(batch[: 20 - number], dtype=dtype))
        assert found.is_contiguous()
        places.add(found.data_ptr())
        if number % 2:
            held.append((found[:, 1:].detach(), found.clone()))  # a view keeps it all
        del found
    assert len(places) == 3
    assert all(torch.equal(view, whole[:, 1:]) for view, whole in held)
    one = batches[0][0].permute(0, 2, 1)
    assert torch.equal(normalised(one), normalise(one, dtype=dtype))


class _TorchDraws:
    """Answers a numpy Generator's calls from torch's generator, as torchvision draws."""

    def uniform(self, low: float, high: float) -> float:
        return torch.empty(1).uniform_(low, high).item()

    def integers(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,)).item())


@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.08, 1.0)])
@pytest.mark.parametrize("shape", [(64, 64), (48, 96), (300, 200), (17, 400)])
def test_crops_follow_torchvisions_rule(scale: tuple[float, float], shape: tuple[int, int]) -> None:
    transform = TrainTransform(64, scale=scale)
    for seed in range(100):
        torch.manual_seed(seed)
        found = transform.crop(*shape, _TorchDraws())  # type: ignore[arg-type]
        torch.manual_seed(seed)
        expected = RandomResizedCrop.get_params(torch.empty(3, *shape), list(scale), [3 / 4, 4 / 3])
        # torchvision takes the logarithms in float32: a side can round the other way, and the place with it
        assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 1


def test_a_crop_and_its_pixels_depend_on_the_generator_alone() -> None:
    image = _noise(90, 70)
    one, two = (TrainTransform(64)(image, np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert one.shape == (3, 64, 64)
    assert one.dtype == np.uint8
    assert (one != TrainTransform(64)(image, np.random.default_rng(6))).any()
    top, left, height, width = TrainTransform(64).crop(90, 70, np.random.default_rng(5))
    cut = Image.fromarray(image).crop((left, top, left + width, top + height)).resize((64, 64), Image.BICUBIC)
    np.testing.assert_array_equal(one, np.asarray(cut).transpose(2, 0, 1))


def test_a_picture_of_the_right_size_is_left_alone() -> None:
    image = _noise(64, 64)
    assert resize(image, 64, 64) is image
    whole = TrainTransform(64, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    np.testing.assert_array_equal(whole(image, np.random.default_rng(0)), image.transpose(2, 0, 1))


@pytest.mark.parametrize("options", [{"image_size": 0}, {"image_size": 8, "scale": (0.9, 1.1)}])
def test_an_impossible_transform_is_refused(options: dict) -> None:
    with pytest.raises(ConfigError, match="RandomResizedCrop"):
        TrainTransform(**options)


def test_crops_of_today_are_those_of_yesterday() -> None:
    """What was trained on must be drawn again by whoever resumes; pixels follow from the crop and Pillow (above)."""
    rng = np.random.default_rng(2024)
    found = [TrainTransform(64).crop(*shape, rng) for shape in [(64, 64), (480, 640), (1000, 30), (7, 900)]]
    assert found == [(3, 0, 60, 62), (7, 18, 470, 618), (480, 0, 40, 30), (0, 445, 7, 9)]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
def test_what_is_not_a_jpeg_gives_the_pixels_of_its_array(kind: str) -> None:
    image = LazyImage(encode(photograph(90, 120), kind))
    assert not image.scalable
    found = TrainTransform(64)(image, np.random.default_rng(3))
    np.testing.assert_array_equal(found, TrainTransform(64)(image.pixels, np.random.default_rng(3)))


def _in_two_passes(image: np.ndarray, size: int) -> np.ndarray:
    """Pillow's resize along rows, then along columns; by itself it may take columns first, and cuts between."""
    return resize(resize(image, image.shape[0], size), size, size).transpose(2, 0, 1).astype(int)


@settings(max_examples=80, deadline=None)
@given(height=st.integers(1, 300), width=st.integers(1, 300), size=st.integers(1, 80), noise=st.booleans())
def test_the_quick_resize_is_pillows_but_for_rounding(height: int, width: int, size: int, noise: bool) -> None:
    image = _noise(height, width) if noise else np.asarray(photograph(height, width)).copy()
    found = resize_to_square(image, size)
    assert found.shape == (size, size, 3)
    assert found.flags.c_contiguous
    assert found.flags.writeable
    assert abs(found.transpose(2, 0, 1).astype(int) - _in_two_passes(image, size)).max() <= 2  # 1 of each pass


@settings(max_examples=300, deadline=None)
@given(height=st.integers(1, 3000), width=st.integers(1, 3000), size=st.integers(1, 400), seed=st.integers(0, 99))
def test_the_least_scale_that_covers_the_crop_is_decoded(height: int, width: int, size: int, seed: int) -> None:
    transform = TrainTransform(size, scale=(0.08, 1.0))
    crop = transform.crop(height, width, np.random.default_rng(seed))
    shrink, (top, left, rows, columns) = transform.reduce(crop)
    assert shrink in (1, 2, 4, 8)
    assert 0 <= top <= top + rows <= -(-height // shrink)
    assert 0 <= left <= left + columns <= -(-width // shrink)
    edges = (top, left, top + rows, left + columns)
    whole = (crop[0], crop[1], crop[0] + crop[2], crop[1] + crop[3])
    assert all(abs(edge * shrink - exact) <= shrink / 2 for edge, exact in zip(edges, whole, strict=True))
    if shrink > 1:
        assert min(rows, columns) >= size
    if shrink < 8:  # the next smaller scale would have to be enlarged
        assert min(crop[2], crop[3]) / (2 * shrink) < size + 1


def _train_pair(shape: tuple[int, int], size: int, seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Ours of a JPEG; open_clip's way with the crop that ours took (whole decode, crop, Pillow); the shrink it took."""
    jpeg = encode(photograph(*shape), "JPEG", quality=90)
    transform = TrainTransform(size)
    found = transform(LazyImage(jpeg), np.random.default_rng(seed))
    shrink, crop = transform.reduce(transform.crop(*shape, np.random.default_rng(seed)))
    top, left, height, width = (side * shrink for side in crop)
    picture = Image.open(io.BytesIO(jpeg)).convert("RGB").crop((left, top, left + width, top + height))
    return found.astype(int), _in_two_passes(np.asarray(picture), size), shrink


@pytest.mark.parametrize("shape", [(288, 384), (200, 150), (224, 224)])
def test_a_jpeg_that_needs_no_scaling_gives_open_clips_training_pixels(shape: tuple[int, int]) -> None:
    found, expected, shrink = _train_pair(shape, 224, seed=1)
    assert shrink == 1
    assert abs(found - expected).max() <= 1
    assert (found != expected).mean() < 0.01


@pytest.mark.parametrize(
    ("shape", "size", "shrink"), [((480, 640), 224, 2), ((1200, 1600), 224, 4), ((600, 800), 64, 8)]
)
def test_a_scaled_jpeg_looks_like_open_clips_training_picture(shape: tuple[int, int], size: int, shrink: int) -> None:
    for seed in range(4):
        found, expected, taken = _train_pair(shape, size, seed)
        assert taken == shrink
        off = abs(found - expected).mean()
        shifted = min(abs(found[:, :, 1:] - expected[:, :, :-1]).mean(), abs(found[:, 1:] - expected[:, :-1]).mean())
        assert off < 3
        assert shifted > 2 * off


def test_orientation_comes_before_the_crop() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    jpeg = encode(photograph(480, 640), "JPEG", quality=95, exif=exif)
    found = TrainTransform(64, scale=(1, 1), ratio=(0.75, 0.75))(LazyImage(jpeg), np.random.default_rng(0))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(jpeg))).convert("RGB")
    assert upright.size == (480, 640)
    expected = np.asarray(upright.resize((64, 64), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert abs(found.astype(int) - expected).mean() < 2


def test_a_picture_looks_the_same_whether_it_was_kept_or_decoded_before() -> None:
    jpeg = encode(photograph(480, 640), "JPEG")
    fresh, kept, decoded = LazyImage(jpeg), LazyImage(jpeg), LazyImage(jpeg)
    kept.freeze()
    assert decoded.pixels.shape == (480, 640, 3)
    one, two, three = (TrainTransform(224)(image, np.random.default_rng(9)) for image in (fresh, kept, decoded))
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one, three)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_eval_gives_open_clips_pixels_of_a_jpeg(mode: str, options: dict) -> None:
    jpeg = encode(photograph(480, 640).convert(mode), "JPEG", quality=90, **options)
    plain = image_transform(224, is_train=False, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    expected = plain(Image.open(io.BytesIO(jpeg))).mul(255).round().to(torch.uint8).numpy()
    found = EvalTransform(224)(LazyImage(jpeg))
    # open_clip converts to RGB after resizing, we before; of grey and RGB that is the same
    assert abs(found.astype(int) - expected).max() <= (2 if mode == "CMYK" else 0)


def test_pictures_made_in_turn_and_in_threads_keep_to_themselves() -> None:
    """Pixels are decoded into memory that is used again."""
    sizes = [(200 + 40 * number, 500 - 40 * number) for number in range(6)]
    jpegs = [encode(photograph(*size, name), "JPEG") for size in sizes for name in ("china.jpg", "flower.jpg")]
    jpegs.append(encode(photograph(64, 64), "JPEG"))  # needs no resizing

    def alone(number: int) -> np.ndarray:
        whole = TrainTransform(64, scale=(1, 1), ratio=(1, 1)) if number == len(jpegs) - 1 else TrainTransform(64)
        return whole(LazyImage(jpegs[number]), np.random.default_rng(number))

    expected = [alone(number) for number in range(len(jpegs))]
    copy = ForkingPickler.loads(ForkingPickler.dumps(TrainTransform(64)))
    shared = {True: TrainTransform(64, scale=(1, 1), ratio=(1, 1)), False: copy}

    def together(number: int) -> np.ndarray:
        return shared[number == len(jpegs) - 1](LazyImage(jpegs[number]), np.random.default_rng(number))

    with ThreadPoolExecutor(4) as threads:
        for _ in range(5):
            for one, other in zip(list(threads.map(together, range(len(jpegs)))), expected, strict=True):
                np.testing.assert_array_equal(one, other)


def test_a_picture_larger_than_the_kept_memory_is_decoded_all_the_same() -> None:
    jpeg = encode(photograph(2400, 2400), "JPEG")
    found = TrainTransform(1300)(LazyImage(jpeg), np.random.default_rng(0))
    crop = TrainTransform(1300).crop(2400, 2400, np.random.default_rng(0))
    top, left, height, width = crop
    whole = np.asarray(Image.open(io.BytesIO(jpeg)))[top : top + height, left : left + width]
    off = abs(found.astype(int) - _in_two_passes(whole, 1300))
    assert off.max() <= 2
    assert off.mean() < 0.01
