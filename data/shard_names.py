"""What a user writes for shards -> the list of tars: files on a disk, and URLs that fsspec can open."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from mmfoundry.pipeline.errors import ConfigError, DamagedInput, MissingInput
from mmfoundry.pipeline.urls import is_url

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_MAX_BRACE_ITEMS = 1_000_000


class ShardUrl(str):
    """A shard that is not on a local disk, such as `s3://bucket/shard-00000.tar`; a `str` with a path's `name`."""

    @property
    def name(self) -> str:
        """The last part of the path, without the query of an http URL."""
        return urlsplit(self).path.rpartition("/")[2]


Shard = Path | ShardUrl
ShardSpec = str | os.PathLike[str] | Sequence["str | os.PathLike[str]"]


def shown(shard: str | os.PathLike[str]) -> str:
    """A shard's name as it may go to a terminal or a log: a URL without user, password and signature."""
    text = os.fspath(shard)
    if not is_url(text):
        return text
    parts = urlsplit(text)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def as_shard(text: str | os.PathLike[str]) -> Shard:
    """A path or a URL as the type that the rest of the package tells them apart by; `file://` is a path."""
    name = os.fspath(text)
    if name.startswith("file://"):
        return Path(name.removeprefix("file://"))
    return ShardUrl(name) if is_url(name) else Path(name)


def expand_shards(shards: ShardSpec) -> list[Shard]:
    """Turn what a user may write for shards into the list of tars.

    Args:
        shards: a tar, a folder (every `*.tar` in it or, if it has none, below it), a glob, a brace range such as
            `shard-{00000..00009}.tar`, a URL of any of these (s3, gs, hf, http, ...), or a list of these.
    Returns:
        Paths and URLs, sorted within each item of a list, each once. A URL that ends in `.tar` is not looked for.
    Raises:
        ConfigError: a command (`pipe:`), which is never run from here.
        MissingInput: nothing there, or no tar in it.
        DamagedInput: a compressed tar, which cannot be indexed.
    """
    if not isinstance(shards, str | os.PathLike):
        found = [shard for item in shards for shard in expand_shards(item)]
        if not found:
            raise MissingInput("no shards: the list is empty")
        return list(dict.fromkeys(found))
    text = os.fspath(shards)
    if text.startswith("pipe:"):
        raise ConfigError(f"{text}: a command has no places to index; give the shards' own paths or URLs")
    shard = as_shard(text)
    if isinstance(shard, Path) and shard.exists():
        return _local(shard)
    if "{" in text:
        return [found for name in _braces(text) for found in expand_shards(name)]
    if isinstance(shard, ShardUrl):
        return _remote(shard)
    if glob.has_magic(text):
        # indexes lie beside their shards, and `data/*` means the tars
        names = sorted(name for name in glob.glob(text, recursive=True) if not name.endswith(".idx"))
        if names:
            return [found for name in names for found in expand_shards(name)]
    raise MissingInput(f"{text}: no such shard; give a .tar, a folder of them, or a pattern such as 'data/*.tar'")


def _local(path: Path) -> list[Shard]:
    if path.is_dir():
        found = sorted(path.glob("*.tar")) or sorted(path.rglob("*.tar"))
        found = [tar for tar in found if not tar.name.startswith(".")]
        plain = {tar.name for tar in found}
        for other in sorted(path.iterdir()):  # a folder that is unpacked in part would be read in part
            for suffix in COMPRESSED:
                if other.name.endswith(suffix) and f"{other.name.removesuffix(suffix)}.tar" not in plain:
                    _refuse_compressed(other)
        if not found:
            raise MissingInput(f"{path}: no *.tar in this folder")
        return list(found)
    _refuse_compressed(path)
    return [path]


def _remote(url: ShardUrl) -> list[Shard]:
    """A URL that ends in `.tar` as it is; a pattern or a folder by asking the store for its names."""
    _refuse_compressed(url)
    if url.name.endswith(".tar") and not glob.has_magic(url.name):
        return [url]
    import fsspec  # slow to import, and most pools are local

    pattern = str(url) if glob.has_magic(url) else f"{url.rstrip('/')}/*.tar"
    try:
        system, path = fsspec.core.url_to_fs(pattern, use_listings_cache=False)
        names = sorted(name for name in system.glob(path) if name.endswith(".tar"))
    except (ImportError, ValueError) as error:  # no such scheme, or its package is not installed
        raise MissingInput(f"{shown(url)}: {error}") from error
    except OSError as error:
        why = str(error).replace(url, shown(url))
        raise MissingInput(f"{shown(url)}: no list of shards from there ({why}); name them by a brace range") from error
    if not names:
        raise MissingInput(
            f"{shown(url)}: no *.tar there; name the shards by a pattern or a brace range such as {{000..099}}"
        )
    return [ShardUrl(system.unstrip_protocol(name)) for name in names]


def _refuse_compressed(shard: Shard) -> None:
    if shard.name.endswith(COMPRESSED):
        raise DamagedInput(
            f"{shown(shard)}: a compressed tar has no places to index; unpack it to a plain .tar, or "
            "`mmfoundry data convert` it"
        )


def _braces(text: str) -> list[str]:
    from itertools import islice

    from braceexpand import braceexpand  # webdataset's own

    try:
        names = list(islice(braceexpand(text), _MAX_BRACE_ITEMS + 1))
    except ValueError as error:
        raise ConfigError(f"{shown(text)}: its braces are not closed") from error
    if len(names) > _MAX_BRACE_ITEMS:
        raise ConfigError(f"{shown(text)}: stands for more than {_MAX_BRACE_ITEMS} shards; give a folder or a pattern")
    if names == [text]:
        raise MissingInput(f"{shown(text)}: no such shard; a brace range is written {{00000..00009}}")
    return names
