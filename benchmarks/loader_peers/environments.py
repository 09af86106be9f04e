"""An environment for each peer whose versions clash with ours: a venv over the one that runs this script.

What is installed into it hides the same package of ours; everything else (torch above all) is shared, so that every
side runs the same torch and the environments take seconds and megabytes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

from pictures import PHOTOGRAPHS, is_made_from, write_stamp

# Peer -> what its environment adds. Whole and pinned: nothing is resolved, so nothing of ours is replaced by chance.
REQUIREMENTS = {
    # its loader asks webdataset for functions that 1.x no longer has; open_clip's requirements name 0.2.5 to 0.2.86
    "open_clip": (
        "webdataset==0.2.86",
        "pandas==2.3.3",
        "pytz==2026.6",
        "tzdata==2026.6",
        "python-dateutil==4.0.0",
    ),
    "webdataset": (),
    # it wants numpy < 2.2; of its requirements those that local shards use, none of its clouds' clients
    "mosaicml-streaming": (
        "mosaicml-streaming==0.13.0",
        "catalogue==2.0.10",
        "numpy==2.1.3",
        "zstd==1.5.7.2",
        "python-snappy==0.7.3",
        "cramjam==2.14.0",
        "xxhash==3.6.0",
        "Brotli==1.2.1",
    ),
}
_PICTURES = "scikit-image==0.26.0"


def environment_python(work: Path, peer: str) -> Path:
    """The interpreter that has what a peer needs; its environment is made if it is missing or was made otherwise.

    Args:
        work: folder of this benchmark.
        peer: a key of `REQUIREMENTS`.
    Returns:
        Path of the interpreter: ours where the peer has no clash.
    Raises:
        SystemExit: an installation failed; pip has said why.
    """
    requirements = REQUIREMENTS[peer]
    if not requirements:
        return Path(sys.executable)
    folder = work / "environments" / peer
    python = folder / "bin" / "python"
    parent = sysconfig.get_path("purelib")
    made_from: dict[str, object] = {"requirements": list(requirements), "over": parent, "python": sys.version}
    if is_made_from(folder, made_from):
        return python
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=False, symlinks=True)
    here = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    # behind the environment's own packages, and with the parent's .pth files, by which ours is installed
    (here / "parent.pth").write_text(f"import site; site.addsitedir({parent!r})\n")
    _pip(["install", "--no-deps", "--target", str(here), *requirements], f"the environment of {peer}")
    write_stamp(folder, made_from)
    return python


def fetch_photographs(work: Path) -> Path:
    """Folder with scikit-image's photographs, taken out of its wheel; nothing of it is installed.

    Raises:
        SystemExit: the wheel could not be had; pip has said why.
    """
    folder = work / "photographs"
    made_from: dict[str, object] = {"wheel": _PICTURES, "files": list(PHOTOGRAPHS)}
    if is_made_from(folder, made_from):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _pip(["download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), _PICTURES], "the photographs")
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for name in PHOTOGRAPHS:
                archive.extract(f"skimage/data/{name}", folder)
        wheel.unlink()
    write_stamp(folder, made_from)
    return folder


def _pip(arguments: Sequence[str], what: str) -> None:
    print(f"fetching {what} (once)", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", arguments[0], "--quiet", "--disable-pip-version-check", *arguments[1:]]
    if subprocess.run(command, check=False).returncode != 0:
        raise SystemExit(f"could not fetch {what}; what pip said is above")
