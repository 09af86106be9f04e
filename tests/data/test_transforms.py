"""Transforms: open_clip's pixels, torchvision's geometry."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmfoundry.data.transforms import OPENAI_MEAN, OPENAI_STD, EvalTransform, TrainTransform, normalise, resize
from mmfoundry.pipeline.errors import ConfigError
from mmfoundry.pipeline.torchvision_ops import declare_missing_ops

declare_missing_ops()
from open_clip.transform import image_transform  # noqa: E402
from torchvision.transforms import RandomResizedCrop  # noqa: E402


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
