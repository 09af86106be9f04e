"""Build `data/samples` from two npm packages of emoji pictures: same inputs and versions, same bytes.

    python -m mmfoundry.data.sample_pool build --google FOLDER --twitter FOLDER --output data/samples

FOLDER is an unpacked `emoji-datasource-google` / `emoji-datasource-twitter` 16.0.0; without it the package is fetched
by `npm pack` and checked against its published digest. The table `concepts.csv` in the output folder says which
pictures are taken, what they are called and on which side of the split they are; nothing else is decided by hand.
"""

import argparse
import base64
import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmfoundry.data.concepts import STYLES, Concept, read_concepts
from mmfoundry.data.sample_pairs import noisy_pairs
from mmfoundry.data.shards import write_shards
from mmfoundry.pipeline.artifact import write_atomic
from mmfoundry.pipeline.errors import DamagedInput, MissingInput, MmfoundryError

VERSION = "16.0.0"
# style -> (npm package, folder of its 64 px pictures, digest that the registry publishes for the packed version)
SOURCES = {
    "noto": (
        "emoji-datasource-google",
        "img/google/64",
        "sha512-ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
    ),
    "twemoji": (
        "emoji-datasource-twitter",
        "img/twitter/64",
        "sha512-7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
    ),
}
SEED = 0
PAIRS_PER_SHARD = 215
SUMS = "SHA256SUMS"


def build(folders: Mapping[str, Path], output: Path, seed: int = SEED) -> list[Path]:
    """Write the picture shards, the pool shards and their digests.

    Args:
        folders: by style, the unpacked npm package.
        output: holds `concepts.csv`; the shards are written beside it.
        seed: draws backgrounds, captions and which pairs are bad.
    Returns:
        The shards, in the order in which `SHA256SUMS` lists them.
    Raises:
        MissingInput: the table or a picture is not there.
    """
    concepts = read_concepts(output / "concepts.csv")
    shards = []
    for style in STYLES:
        samples = picture_samples(concepts, style, folders[style] / SOURCES[style][1])
        shards += write_shards(samples, output, pattern=f"pictures-{style}-%05d.tar")
    train = [concept for concept in concepts if concept.split == "train"]
    pictures = {c.name: read_rgba(folders["noto"] / SOURCES["noto"][1] / c.file) for c in train}
    pairs = noisy_pairs(train, pictures, seed)
    shards += write_shards(pairs, output, pattern="pool-%05d.tar", max_count=PAIRS_PER_SHARD)
    write_atomic(output / SUMS, digest_lines(shards))
    return shards


def picture_samples(concepts: Sequence[Concept], style: str, folder: Path) -> Iterator[dict[str, Any]]:
    """One sample a concept: the source's own PNG, its names, and what the table says about it."""
    for concept in concepts:
        yield {
            "__key__": f"{style}-{concept.slug}",
            "png": smallest_png(_read(folder / concept.file)),
            "txt": concept.phrase,
            "json": concept.as_json() | {"style": style},
        }


def smallest_png(data: bytes) -> bytes:
    """The same pixels in fewer bytes where recompressing helps, otherwise the bytes as they are."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGBA").save(buffer, "PNG", optimize=True)
    again = buffer.getvalue()
    return again if len(again) < len(data) else data


def read_rgba(path: Path) -> np.ndarray:
    """A picture as uint8 (height, width, 4), alpha not premultiplied."""
    return np.array(Image.open(io.BytesIO(_read(path))).convert("RGBA"))


def digest_lines(paths: Sequence[Path]) -> str:
    """SHA-256 digests in the manner of `sha256sum`, so that `sha256sum -c SHA256SUMS` checks them."""
    return "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in paths)


def fetch(style: str, folder: Path) -> Path:
    """Get a source package through `npm pack`, check it, and unpack it.

    Args:
        style: "noto" or "twemoji".
        folder: the package is packed and unpacked in here.
    Returns:
        The unpacked package.
    Raises:
        MissingInput: npm is not installed or could not get the package.
        DamagedInput: the package's digest is not the published one.
    """
    name, _, integrity = SOURCES[style]
    npm = shutil.which("npm")
    if npm is None:
        raise MissingInput(f"npm is not installed; install it or unpack {name}@{VERSION} yourself and give its folder")
    command = [npm, "pack", "--silent", "--pack-destination", str(folder), f"{name}@{VERSION}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    package = folder / f"{name}-{VERSION}.tgz"
    if done.returncode or not package.is_file():
        last = (done.stderr.strip() or "npm said nothing").splitlines()[-1]
        raise MissingInput(f"npm could not fetch {name}@{VERSION}: {last}")
    found = "sha512-" + base64.b64encode(hashlib.sha512(package.read_bytes()).digest()).decode()
    if found != integrity:
        raise DamagedInput(f"{package.name}: digest {found} is not the published {integrity}")
    with tarfile.open(package) as tar:
        tar.extractall(folder / style, filter="data")
    return folder / style / "package"


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise MissingInput(f"{path}: no such picture; is the folder an unpacked emoji-datasource package {VERSION}?")
    return path.read_bytes()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mmfoundry.data.sample_pool", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("build", help="write the shards and SHA256SUMS")
    verb.add_argument("--google", type=Path, help="unpacked emoji-datasource-google (default: fetch by npm)")
    verb.add_argument("--twitter", type=Path, help="unpacked emoji-datasource-twitter (default: fetch by npm)")
    verb.add_argument("--output", type=Path, default=Path("data/samples"), help="folder that holds concepts.csv")
    given = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            folders = {
                "noto": given.google or fetch("noto", Path(scratch)),
                "twemoji": given.twitter or fetch("twemoji", Path(scratch)),
            }
            shards = build(folders, given.output)
    except MmfoundryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(shards)} shards, {sum(path.stat().st_size for path in shards):,} bytes, in {given.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
