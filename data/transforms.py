"""Pixels of one picture -> pixels of the model's size (uint8, on the CPU), and normalising a batch (on the device)."""

import math
import threading
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from mmfoundry.data.decode import SHRINKS, LazyImage
from mmfoundry.data.recycled import Recycled
from mmfoundry.pipeline.errors import ConfigError

if TYPE_CHECKING:  # torch takes a second to import, and reading shards does not need it
    import torch

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
_MAX_ASPECT = 64
_MAX_SCRATCH_BYTES = 16 << 20  # a thread; larger pictures get memory of their own
_TRIES = 10  # crops drawn before the fallback, as in torchvision


class _Scratch(threading.local):
    """A thread's memory for pixels that live until they are resized: fresh memory costs a tenth of the whole."""

    def __init__(self) -> None:
        self._buffer = np.empty(0, np.uint8)

    def __reduce__(self) -> tuple[type["_Scratch"], tuple[()]]:
        return _Scratch, ()  # a transform goes to worker processes

    def room(self, num_bytes: int) -> np.ndarray | None:
        """At least so many bytes, what lay there before is lost; None where that is more than is kept."""
        if num_bytes > _MAX_SCRATCH_BYTES:
            return None
        if self._buffer.size < num_bytes:
            self._buffer = np.empty(num_bytes, np.uint8)
        return self._buffer


class TrainTransform:
    """RandomResizedCrop as open_clip trains with: a random crop, resized to a square by antialiased bicubic.

    The geometry is drawn by torchvision's rule (`RandomResizedCrop.get_params`) from the sample's own generator.

    What is given as decoded pixels, or can only be decoded whole, is resized by Pillow. Of a JPEG that is not decoded
    yet (`Sample.picture`) the crop is drawn from the header and the least scale is decoded that still covers it; the
    crop's edges move to the nearest pixel of that scale, and torch resizes, which does Pillow's arithmetic with vector
    instructions in a fifth of the time (see `resize_to_square`).
    """

    def __init__(
        self,
        image_size: int,
        scale: tuple[float, float] = (0.9, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
    ):
        """Fix the distribution of crops.

        Args:
            image_size: side of the result, pixels.
            scale: least and greatest share of the picture's area that a crop has.
            ratio: least and greatest width / height of a crop.
        Raises:
            ConfigError: an empty range, or one outside what is possible.
        """
        if image_size < 1 or not 0 < scale[0] <= scale[1] <= 1 or not 0 < ratio[0] <= ratio[1]:
            raise ConfigError(
                f"RandomResizedCrop of size {image_size}, scale {scale}, ratio {ratio}: "
                "needs size >= 1, 0 < scale[0] <= scale[1] <= 1 and 0 < ratio[0] <= ratio[1]"
            )
        self.image_size, self.scale, self.ratio = image_size, scale, ratio
        self._scratch = _Scratch()

    def crop(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Draw a crop: top, left, height, width, in pixels of a picture of `height` x `width`."""
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(_TRIES):
            area = height * width * rng.uniform(*self.scale)
            aspect = math.exp(rng.uniform(low, high))
            crop_width = round(math.sqrt(area * aspect))
            crop_height = round(math.sqrt(area / aspect))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                top = int(rng.integers(0, height - crop_height + 1))
                left = int(rng.integers(0, width - crop_width + 1))
                return top, left, crop_height, crop_width
        crop_height, crop_width = height, width  # the whole picture, cut to the nearest allowed aspect
        if width / height < self.ratio[0]:
            crop_height = round(width / self.ratio[0])
        elif width / height > self.ratio[1]:
            crop_width = round(height * self.ratio[1])
        return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width

    def reduce(self, crop: tuple[int, int, int, int]) -> tuple[int, tuple[int, int, int, int]]:
        """The least scale at which a JPEG's crop has the size of the result.

        Args:
            crop: top, left, height, width, in pixels of the whole picture.
        Returns:
            By what the sides are divided (1, 2, 4 or 8), and the crop in pixels of that scale.
        """
        top, left, height, width = crop
        for shrink in SHRINKS:
            if min(height, width) <= shrink * (self.image_size - 1):
                continue  # rounding gives less than one pixel
            first_row, first_column = round(top / shrink), round(left / shrink)
            rows = round((top + height) / shrink) - first_row
            columns = round((left + width) / shrink) - first_column
            if min(rows, columns) >= self.image_size:
                return shrink, (first_row, first_column, rows, columns)
        return 1, crop

    def __call__(self, image: np.ndarray | LazyImage, rng: np.random.Generator) -> np.ndarray:
        """Crop and resize.

        Args:
            image: uint8 (height, width, 3), or one not decoded yet.
            rng: what the crop is drawn from; nothing else decides it.
        Returns:
            uint8 (3, image_size, image_size); of a JPEG a view of rows of pixels, laid out in planes when copied.
        Raises:
            UnreadableImage: the pixels of an image not decoded yet are damaged.
        """
        if isinstance(image, LazyImage):
            if image.scalable:
                rows, columns = image.size
                shrink, (top, left, height, width) = self.reduce(self.crop(rows, columns, rng))
                buffer = self._scratch.room(-(-rows // shrink) * -(-columns // shrink) * 3)
                pixels = image.reduced(shrink, buffer)[top : top + height, left : left + width]
                return resize_to_square(pixels, self.image_size).transpose(2, 0, 1)
            image = image.pixels
        top, left, height, width = self.crop(image.shape[0], image.shape[1], rng)
        return _chw(resize(image[top : top + height, left : left + width], self.image_size, self.image_size))


class EvalTransform:
    """Shortest side to `image_size`, then the centre square: the pixels of open_clip's `image_transform`; or, as SigLIP
    wants it, both sides squashed to `image_size`.

    Of grey and RGB pictures bit for bit; others open_clip converts to RGB after resizing, we before (of CMYK that moves
    a value by at most 2; open_clip shows what lies under a clear pixel and resizes palettes without smoothing).

    Scores are compared with published ones, so nothing is traded for speed here: JPEGs are decoded whole.

    A picture more than 64 times as long as wide is first cut to that, from its middle: resized whole it could fill the
    memory, and next to nothing of its ends would be seen.
    """

    def __init__(self, image_size: int, resize_mode: Literal["shortest", "squash"] = "shortest"):
        if image_size < 1:
            raise ConfigError(f"an image size of {image_size} pixels; needs at least 1")
        self.image_size, self._squash = image_size, resize_mode == "squash"

    def __call__(self, image: np.ndarray | LazyImage) -> np.ndarray:
        """Resize and cut.

        Args:
            image: uint8 (height, width, 3), or one not decoded yet, which is decoded whole.
        Returns:
            uint8 (3, image_size, image_size).
        Raises:
            UnreadableImage: the pixels of an image not decoded yet are damaged.
        """
        image = without_ends(image.pixels if isinstance(image, LazyImage) else image)
        height, width = image.shape[:2]
        size = self.image_size
        if self._squash:
            return _chw(resize(image, size, size))
        if width <= height:
            image = resize(image, int(size * height / width), size)
        else:
            image = resize(image, size, int(size * width / height))
        height, width = image.shape[:2]
        # Python's round (half to even), as torchvision's center_crop
        top, left = round((height - size) / 2.0), round((width - size) / 2.0)
        return _chw(image[top : top + size, left : left + size])


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize by Pillow's bicubic, which antialiases; the picture itself where it has that size already.

    Args:
        image: uint8 (any height, any width, 3).
        height: of the result, pixels.
        width: of the result, pixels.
    Returns:
        uint8 (height, width, 3).
    """
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def resize_to_square(image: np.ndarray, size: int) -> np.ndarray:
    """Resize to a square by torch's antialiased bicubic on bytes, the quickest one at hand.

    Args:
        image: uint8 (any height, any width, 3), writable.
        size: side of the result, pixels.
    Returns:
        uint8 (size, size, 3), C-contiguous; within 2 of Pillow's along rows, then along columns, and mostly equal.
            Pillow 13 takes columns first in some shapes, as in upright pictures; values are cut to bytes in between,
            so that hard edges of full contrast then differ by more (by 30 in black and white noise).
    """
    import torch

    # laid out as torch's own channels_last, down to the stride of the batch of one: otherwise its slower way is taken
    pixels = torch.from_numpy(np.ascontiguousarray(image)).unsqueeze(0).permute(0, 3, 1, 2)
    small = torch.nn.functional.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True)
    square: np.ndarray = small[0].permute(1, 2, 0).numpy()
    return square


def normalise(
    images: "torch.Tensor",
    mean: tuple[float, ...] = OPENAI_MEAN,
    std: tuple[float, ...] = OPENAI_STD,
    dtype: "torch.dtype | None" = None,
) -> "torch.Tensor":
    """Bytes to what CLIP was trained on: (x / 255 - mean) / std, on the device where the batch is.

    Args:
        images: uint8 (..., 3, height, width).
        mean: of each channel, in [0, 1].
        std: of each channel, in [0, 1].
        dtype: of the result; float32 if None. The arithmetic is float32 in any case.
    Returns:
        The same shape, in `dtype`.
    """
    import torch

    shape = (3, 1, 1)
    mean_311, std_311 = (
        torch.tensor(each, dtype=torch.float32).view(shape).to(images.device, non_blocking=True) for each in (mean, std)
    )
    pixels = images.to(torch.float32).div_(255.0).sub_(mean_311).div_(std_311)
    return pixels if dtype is None else pixels.to(dtype)


class Normalise:
    """`normalise`, for a loop: batches on the CPU get memory that is used again when they are gone, and each image is
    worked on while it is in the core's cache. The numbers are equal; a fresh batch of a loop costs a third of the time.
    """

    def __init__(
        self,
        mean: tuple[float, ...] = OPENAI_MEAN,
        std: tuple[float, ...] = OPENAI_STD,
        dtype: "torch.dtype | None" = None,
    ):
        """Fix what `normalise` is given."""
        self._mean, self._std, self._dtype = mean, std, dtype
        self._memory = Recycled()

    def __call__(self, images: "torch.Tensor") -> "torch.Tensor":
        """As `normalise`; a result may be held as long as it is needed."""
        if images.device.type != "cpu":
            return normalise(images, self._mean, self._std, self._dtype)
        import torch

        dtype = self._dtype or torch.float32
        memory = torch.from_numpy(self._memory.empty((images.numel() * dtype.itemsize,), np.uint8))
        pixels = memory.view(dtype).view(images.shape)
        mean_311, std_311 = (torch.tensor(each, dtype=torch.float32).view(3, 1, 1) for each in (self._mean, self._std))
        scratch = torch.empty(images.shape[-3:], dtype=torch.float32)
        for image, result in zip(
            images.reshape(-1, *images.shape[-3:]), pixels.view(-1, *images.shape[-3:]), strict=True
        ):
            work = result if dtype == torch.float32 else scratch
            work.copy_(image).div_(255.0).sub_(mean_311).div_(std_311)
            if work is scratch:
                result.copy_(scratch)
        return pixels


def without_ends(image: np.ndarray) -> np.ndarray:
    """The picture, or its middle where it is more than 64 times as long as wide."""
    limit = _MAX_ASPECT * min(image.shape[:2])
    if max(image.shape[:2]) <= limit:
        return image
    top, left = (max(0, side - limit) // 2 for side in image.shape[:2])
    return image[top : top + limit, left : left + limit]


def _chw(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image.transpose(2, 0, 1))
