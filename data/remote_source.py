"""One remote shard as its server gives it: size, version, and ranges of bytes; one attempt each, no retries.

fsspec opens the connections, with its own settings (`~/.config/fsspec/*.json`, `FSSPEC_S3_ENDPOINT_URL`, ...). From
http servers ranges are read chunk by chunk, so that what came before a connection broke off is not lost.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from mmfoundry.data.shard_names import shown
from mmfoundry.pipeline.errors import ConfigError, MissingInput, StorageError

SCHEMES = {"http": "http", "https": "http", "s3": "s3", "gs": "gs", "gcs": "gs", "hf": ""}  # -> extra that reads it
_VERSIONS = ("ETag", "etag", "generation", "xet_hash", "blob_id", "LastModified", "last_modified")
_RETRIED = (408, 425, 429)  # of the 4xx, those that a server means for now


class Changed(Exception):
    """The shard is not the one that was opened."""


class NoRanges(StorageError):
    """The server gives a file as a whole only."""


class Source(ABC):
    """One remote shard.

    Attributes:
        name: its URL as it may be shown: no password, no signed query.
        size: bytes; known once `open` has returned, as is `version`.
        version: what changes when its bytes do; "" where the server tells none.
        transient: exceptions that another attempt may not meet, unless `is_permanent` says so.
        refused: those of them that every attempt meets, as nobody said how to log in.
    """

    size = 0
    version = ""
    transient: tuple[type[Exception], ...] = (OSError, EOFError)
    refused: tuple[type[Exception], ...] = ()

    def __init__(self, url: str):
        self.url, self.name = url, shown(url)

    @abstractmethod
    def open(self) -> None:
        """Ask for size and version.

        Raises:
            FileNotFoundError: no such shard.
            NoRanges: the server serves no ranges.
        """

    @abstractmethod
    def fetch(self, offset: int, count: int, into: bytearray) -> None:
        """Append the `count` bytes from `offset` on; where it raises, those that came are appended all the same.

        Raises:
            FileNotFoundError: no such shard any more.
            Changed: it is another one now.
        """

    def whole(self, write: Callable[[bytes], object]) -> None:
        """Hand the whole shard to `write`, chunk by chunk; for servers that serve no ranges."""
        raise NoRanges(f"{self.name}: it is read by ranges only")


def open_source(url: str, stall_s: float) -> Source:
    """The source for a URL, not opened yet.

    Raises:
        ConfigError: no scheme that is read.
        MissingInput: the package that reads it is not installed.
    """
    scheme = urlsplit(url).scheme.lower()
    if scheme not in SCHEMES:
        raise ConfigError(f"{shown(url)}: shards are read from {', '.join(SCHEMES)} and from paths")
    try:
        return _Http(url, stall_s) if SCHEMES[scheme] == "http" else _Bucket(url, scheme)
    except ImportError as error:
        raise MissingInput(
            f"{shown(url)}: reading it needs a package that is not installed ({error.name}); "
            f"pip install 'mmfoundry[{SCHEMES[scheme]}]'"
        ) from error


def is_permanent(error: BaseException) -> bool:
    """Whether another attempt would meet the same: no access, or a status that says that the request is wrong."""
    if isinstance(error, PermissionError | NotADirectoryError | IsADirectoryError):
        return True
    response = getattr(error, "response", None)
    status = getattr(error, "status", None) or getattr(response, "status_code", None)
    if isinstance(response, dict):  # botocore's ClientError
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return isinstance(status, int) and 400 <= status < 500 and status not in _RETRIED


def reason(error: BaseException, source: Source) -> str:
    """What to say of an error; messages of http clients quote the URL, with all that is secret in it."""
    status = getattr(error, "status", None)
    text = f"status {status}" if isinstance(status, int) else str(error).replace(source.url, source.name)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class _Http(Source):
    """A shard on a web server."""

    def __init__(self, url: str, stall_s: float):
        super().__init__(url)
        import aiohttp
        import fsspec

        self._system = fsspec.filesystem("http")
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=stall_s, sock_read=stall_s)
        self.transient = (OSError, EOFError, aiohttp.ClientError)

    def open(self) -> None:
        """As `Source.open`."""
        self._sync(self._probe())

    def fetch(self, offset: int, count: int, into: bytearray) -> None:
        """As `Source.fetch`."""
        self._sync(self._range(offset, count, into))

    def whole(self, write: Callable[[bytes], object]) -> None:
        """As `Source.whole`; an error if the server breaks off."""
        self._sync(self._whole(write))

    def _sync(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._system.loop).result()

    async def _get(self, first: int, last: int) -> Any:
        session = await self._system.set_session()
        options = dict(self._system.kwargs)
        # compressed, the bytes would not be those of the range
        headers = options.pop("headers", {}) | {"Range": f"bytes={first}-{last}", "Accept-Encoding": "identity"}
        url = self._system.encode_url(self.url)
        return session.get(url, headers=headers, timeout=self._timeout, **options)

    async def _probe(self) -> None:
        # a GET, not a HEAD: a signed URL is good for one method
        async with await self._get(0, 0) as response:
            if response.status == 404 or response.status == 410:
                raise FileNotFoundError(self.name)
            total = _total(response)
            if response.status == 416 and total == 0:
                return  # an empty file has no first byte
            response.raise_for_status()
            if response.status != 206 or total is None:
                raise NoRanges(
                    f"{self.name}: the server gives no ranges of bytes, so single samples cannot be read; copy the "
                    "shard to a disk, or read it as a stream (mmfoundry.data.stream)"
                )
            self.size, self.version = total, _version(response)

    async def _range(self, offset: int, count: int, into: bytearray) -> None:
        async with await self._get(offset, offset + count - 1) as response:
            if response.status == 404 or response.status == 410:
                raise FileNotFoundError(self.name)
            if response.status == 416:
                raise Changed
            response.raise_for_status()
            if response.status != 206 or _total(response) != self.size or _version(response) != self.version:
                raise Changed
            end = len(into) + count
            async for chunk in response.content.iter_any():
                into += chunk[: end - len(into)]
                if len(into) == end:  # whatever the server may still send
                    return
        raise EOFError("the answer is shorter than the range")

    async def _whole(self, write: Callable[[bytes], object]) -> None:
        session = await self._system.set_session()
        url = self._system.encode_url(self.url)
        async with session.get(url, timeout=self._timeout, **self._system.kwargs) as response:
            if response.status == 404 or response.status == 410:
                raise FileNotFoundError(self.name)
            response.raise_for_status()
            async for chunk in response.content.iter_any():
                write(chunk)


def _total(response: Any) -> int | None:
    """The size of the whole, from `Content-Range: bytes 0-0/12345`."""
    total = response.headers.get("Content-Range", "").rpartition("/")[2]
    return int(total) if total.isascii() and total.isdigit() else None


def _version(response: Any) -> str:
    return response.headers.get("ETag") or response.headers.get("Last-Modified") or ""


class _Bucket(Source):
    """A shard that an fsspec file system opens: S3, Google Cloud Storage, the Hugging Face hub."""

    def __init__(self, url: str, scheme: str):
        super().__init__(url)
        import fsspec

        self._file: Any = None
        self._changed: tuple[type[Exception], ...] = ()
        if scheme == "s3":
            from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError
            from s3fs.utils import FileExpired

            self.transient = (OSError, EOFError, BotoCoreError, ClientError)
            self.refused = (NoCredentialsError, PartialCredentialsError)
            self._changed = (FileExpired,)
        elif SCHEMES[scheme] == "gs":
            import aiohttp
            from gcsfs.retry import HttpError

            self.transient = (OSError, EOFError, aiohttp.ClientError, HttpError)
        else:
            from huggingface_hub.errors import HfHubHTTPError

            # its base is the error of whichever http client the hub's package uses
            self.transient = (OSError, EOFError, *HfHubHTTPError.__bases__)
        # no listings are kept: a shard that was replaced must be seen as it is now
        self._system, self._path = fsspec.core.url_to_fs(url, use_listings_cache=False)

    def open(self) -> None:
        """As `Source.open`."""
        self._file = self._system.open(self._path, "rb", cache_type="none")
        details = self._file.details
        self.size = int(self._file.size)
        self.version = next((str(details[name]) for name in _VERSIONS if details.get(name)), "")

    def fetch(self, offset: int, count: int, into: bytearray) -> None:
        """As `Source.fetch`."""
        try:
            data = self._file._fetch_range(offset, offset + count)  # what every file of fsspec's is made of
        except self._changed as error:
            raise Changed from error
        if len(data) > count:
            raise StorageError(f"{self.name}: {len(data)} bytes came where {count} were asked for")
        into += data
        if len(data) < count:
            raise EOFError("the answer is shorter than the range")
