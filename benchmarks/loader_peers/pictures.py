"""The pictures that every side loads: pieces of real photographs, encoded as web pools have them.

A piece is cut at the photograph's own resolution, never enlarged: enlarged pixels have next to no high frequencies,
and their JPEGs decode far faster than what people have. A size that is larger than the photographs is laid together of
several pieces. Quality: 95 for 384x288, as img2dataset encodes what it has resized (about 46 KB a picture); 85 for the
larger ones, as they are found on the web and kept.
"""

from __future__ import annotations

import importlib.util
import io
import json
import random
import shutil
import tarfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

SHARDS = 4
PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "rocket.jpg",
)
_WORDS = """
    a the of in on with under beside old small bright quiet red green grey wooden paved river harbour bridge garden
    temple flower petal leaf cat astronaut rocket motorcycle coffee table window workshop morning evening photograph
    close view from above reflecting standing leaning waiting crowded empty ancient polished steaming striped
""".split()  # noqa: SIM905  # a list literal would take a page


@dataclass(frozen=True)
class Size:
    """One size of picture.

    Attributes:
        name: as rows call it.
        width: pixels.
        height: pixels.
        extension: "jpg" or "png".
        pictures: how many the pool holds, a multiple of `SHARDS`.
        quality: of JPEGs, on Pillow's scale.
    """

    name: str
    width: int
    height: int
    extension: str
    pictures: int
    quality: int = 0


SIZES = (
    Size("384x288", 384, 288, "jpg", 256, quality=95),
    Size("640x480", 640, 480, "jpg", 256, quality=85),
    Size("1600x1200", 1600, 1200, "jpg", 128, quality=85),
    Size("64x64", 64, 64, "png", 512),
)


def read_photographs(folder: Path) -> list[np.ndarray]:
    """The photographs of scikit-image, unpacked in `folder`, and of scikit-learn, uint8 (height, width, 3) each.

    Raises:
        SystemExit: scikit-learn is not installed.
    """
    found = importlib.util.find_spec("sklearn")  # finds the package without importing it
    if found is None or not found.submodule_search_locations:
        raise SystemExit("scikit-learn is missing, whose photographs this script cuts; pip install scikit-learn")
    sklearn = Path(found.submodule_search_locations[0]) / "datasets" / "images"
    paths = [folder / "skimage" / "data" / name for name in PHOTOGRAPHS] + sorted(sklearn.glob("*.jpg"))
    return [np.asarray(Image.open(path).convert("RGB")) for path in paths]


def pool_folder(work: Path, size: Size) -> Path:
    """Where the tars of a size lie."""
    return work / "pools" / f"{size.name}-{size.extension}{size.quality or ''}"


def write_pool(folder: Path, size: Size, photographs: list[np.ndarray]) -> None:
    """Write a size's tars unless they are there; the same bytes every time.

    Args:
        folder: made complete under another name and then renamed.
        size: what to cut.
        photographs: uint8 (height, width, 3) each.
    """
    if folder.exists():
        return
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    rng = random.Random(size.name)
    for shard in range(SHARDS):
        with tarfile.open(unfinished / f"shard-{shard:05d}.tar", "w") as tar:
            for number in range(shard, size.pictures, SHARDS):
                _add(tar, f"{number:06d}.{size.extension}", _encode(_cut(size, photographs, rng), size))
                _add(tar, f"{number:06d}.txt", " ".join(rng.choices(_WORDS, k=rng.randint(6, 14))).encode())
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished.rename(folder)


def picture_bytes(folder: Path) -> list[bytes]:
    """The encoded pictures of a pool, for what decodes them without a loader."""
    found = []
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                data = tar.extractfile(member)
                if data is not None and not member.name.endswith(".txt"):
                    found.append(data.read())
    return found


def read_pairs(folder: Path) -> list[tuple[bytes, str]]:
    """Encoded picture and caption of every sample of a pool, for what keeps samples in another format."""
    pairs: list[tuple[bytes, str]] = []
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            picture = b""
            for member in tar:
                data = tar.extractfile(member).read()  # type: ignore[union-attr]  # written by us: plain files only
                if member.name.endswith(".txt"):
                    pairs.append((picture, data.decode()))
                else:
                    picture = data
    return pairs


def _cut(size: Size, photographs: list[np.ndarray], rng: random.Random) -> Image.Image:
    """Pieces of photographs side by side until the size is full; a small one is scaled down from a square."""
    if size.width <= 64:
        square = 4 * size.width
        return Image.fromarray(_piece(photographs, square, square, rng)).resize((size.width, size.height))
    canvas = np.empty((size.height, size.width, 3), np.uint8)
    across = -(-size.width // 448)  # no photograph is much wider than 448 pixels or higher than 300
    down = -(-size.height // 300)
    rows = [size.height * i // down for i in range(down + 1)]
    columns = [size.width * i // across for i in range(across + 1)]
    for top, bottom in pairwise(rows):
        for left, right in pairwise(columns):
            canvas[top:bottom, left:right] = _piece(photographs, bottom - top, right - left, rng)
    return Image.fromarray(canvas)


def _piece(photographs: list[np.ndarray], height: int, width: int, rng: random.Random) -> np.ndarray:
    photograph = rng.choice([photo for photo in photographs if photo.shape[0] >= height and photo.shape[1] >= width])
    top = rng.randint(0, photograph.shape[0] - height)
    left = rng.randint(0, photograph.shape[1] - width)
    piece = photograph[top : top + height, left : left + width]
    return piece[:, ::-1] if rng.random() < 0.5 else piece


def _encode(image: Image.Image, size: Size) -> bytes:
    stream = io.BytesIO()
    if size.extension == "jpg":
        image.save(stream, "JPEG", quality=size.quality)
    else:
        image.save(stream, "PNG")
    return stream.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_stamp(folder: Path, what: dict[str, object]) -> None:
    """Note what a folder was made from, so that it is made again when that changes."""
    (folder / "made-from.json").write_text(json.dumps(what, sort_keys=True))


def is_made_from(folder: Path, what: dict[str, object]) -> bool:
    """Whether a folder is complete and was made from this."""
    stamp = folder / "made-from.json"
    return stamp.is_file() and json.loads(stamp.read_text()) == what
