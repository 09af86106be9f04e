"""Language models: any folder or hub repository that transformers reads, and GGUF files, dequantised once and kept."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from mmfoundry.pipeline.artifact import sync_files, sync_folder
from mmfoundry.pipeline.errors import DamagedInput, MissingInput

# What a kept folder must hold to be whole; the layout of such folders is part of the key, so raise it on a change.
_LAYOUT = "1"


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_language_model(path: str | Path, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Read a language model, on the CPU, in evaluation mode.

    Args:
        path: a transformers folder (`config.json` and safetensors), or a GGUF file, or a folder with one GGUF file such
            as an installed wheel's. A GGUF file is dequantised the first time (about 20 s for 135M parameters) and kept
            as a transformers folder under `cache_folder()`.
        dtype: of the weights.

    Raises:
        MissingInput: nothing there that can be read as a language model.
        DamagedInput: the weights cannot be read.
    """
    path = Path(path)
    gguf = _gguf_file(path)
    folder = path if gguf is None else dequantised(gguf)
    try:
        with without_bars():
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:  # what transformers raises for missing files and unknown architectures
        raise DamagedInput(f"{folder}: not a language model that transformers can read ({error})") from error
    return LanguageModel(model.eval(), tokenizer)


def cache_folder() -> Path:
    """Where models that take long to convert are kept: `$MMFOUNDRY_CACHE`, else `mmfoundry` in the user's cache."""
    base = os.environ.get("MMFOUNDRY_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmfoundry"


def dequantised(gguf: Path) -> Path:
    """A transformers folder with the dequantised weights of a GGUF file; written on the first call, by content.

    Several processes may call it at once: each writes aside and the first one's folder stays.
    """
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    kept = cache_folder() / "language-models" / f"{gguf.stem}-{digest[:16]}-{_LAYOUT}"
    if kept.is_dir():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{kept.name}.", dir=kept.parent))
    try:
        _dequantise(gguf, aside)
        sync_files(file for file in aside.iterdir())
        os.chmod(aside, 0o755)  # mkdtemp gives 0700
        try:
            os.rename(aside, kept)
            sync_folder(kept.parent)
        except OSError:
            if not kept.is_dir():  # else another process was first, and its folder holds the same
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return kept


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers' progress bars of a second or two off the screen while the block runs."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


@without_bars()
def _dequantise(gguf: Path, folder: Path) -> None:
    # A model loaded from GGUF refuses save_pretrained, so its weights go into a plain model of the same config.
    try:
        source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        config = source.config.to_dict()
        for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
            config.pop(key, None)
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        plain.load_state_dict(source.state_dict(), assign=True)
        plain.tie_weights()
        plain.generation_config = source.generation_config
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except ImportError as error:
        raise MissingInput(f"{gguf}: reading a GGUF file needs the gguf package: pip install gguf") from error


def _gguf_file(path: Path) -> Path | None:
    """The GGUF file that `path` names or holds; None if it is a transformers folder.

    Raises:
        MissingInput: neither.
    """
    if path.is_file() and path.suffix == ".gguf":
        return path
    if (path / "config.json").is_file():
        return None
    found = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if len(found) != 1:
        what = f"{len(found)} GGUF files; name one of them" if found else "neither config.json nor a GGUF file"
        raise MissingInput(f"{path}: not a language model: {what}")
    return found[0]
