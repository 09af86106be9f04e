"""Real servers for the tests of remote shards: nginx, a proxy that cuts connections, and moto's S3."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

NGINX = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed (Debian: apt-get install nginx-light)")

_CONFIG = """
daemon off; master_process off; worker_processes 1; pid {work}/nginx.pid; error_log {work}/error.log;
events {{ worker_connections 256; }}
http {{
  log_format ranges '$uri $status $http_range'; access_log {work}/access.log ranges;
  client_body_temp_path {work}/a; proxy_temp_path {work}/b; fastcgi_temp_path {work}/c; uwsgi_temp_path {work}/d;
  scgi_temp_path {work}/e; default_type application/octet-stream;
  server {{
    listen 127.0.0.1:{port}; root {root};
    location /slow/ {{ alias {root}/; limit_rate 300k; }}
    location /whole/ {{ alias {root}/; max_ranges 0; }}
    location /refused/ {{ return 403; }}
    location /busy/ {{ return 503; }}
  }}
}}
"""


@dataclass
class WebServer:
    """A folder served by nginx, and its log."""

    root: Path
    port: int
    log: Path
    _marks: int = 0

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/{path}"

    def requests(self) -> list[tuple[str, int, int, int]]:
        """File name, status, first and last byte of what was asked for up to now, oldest first."""
        self._marks += 1
        mark = f"mark-{self._marks}"
        with contextlib.suppress(urllib.error.HTTPError):  # there is no such file; but all before it is in the log then
            urllib.request.urlopen(self.url(mark))
        while mark not in (lines := self.log.read_text()):
            time.sleep(0.01)
        found = []
        for line in lines.splitlines():
            uri, status, asked = line.split()
            first, _, last = asked.removeprefix("bytes=").partition("-")
            found.append((uri.rpartition("/")[2], int(status), int(first or 0), int(last or 0)))
        return found

    def ranges(self) -> list[tuple[str, int, int]]:
        """Shard, first and last byte of what was asked for, without the probes for size and version."""
        return [
            (name, first, last)
            for name, _, first, last in self.requests()
            if name.endswith(".tar") and (first, last) != (0, 0)
        ]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def nginx(root: Path, work: Path) -> Iterator[WebServer]:
    """Serve `root` on a free port: below `/`, `/slow/`, `/whole/` (no ranges); `/refused/` and `/busy/` fail."""
    assert NGINX is not None
    work.mkdir(parents=True)
    port = free_port()
    config = work / "nginx.conf"
    config.write_text(_CONFIG.format(work=work, port=port, root=root))
    with _running([NGINX, "-e", str(work / "error.log"), "-p", str(work), "-c", str(config)], port):
        yield WebServer(root, port, work / "access.log")


@contextlib.contextmanager
def proxy(port: int, after: int, connections: int = 1 << 30, how: str = "cut") -> Iterator[int]:
    """The port of a proxy to `port` that spoils its first `connections` connections `after` bytes of answers.

    Args:
        how: "cut" breaks the connection off, "stall" keeps it open and says nothing more.
    """
    mine = free_port()
    command = [sys.executable, str(Path(__file__).with_name("spoiling_proxy.py"))]
    with _running([*command, *map(str, (mine, port, after, connections)), how], mine):
        yield mine


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """The URL of a moto server."""
    port = free_port()
    with _running([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def _running(command: list[str], port: int, patience_s: float = 120) -> Iterator[None]:
    with tempfile.TemporaryFile() as said:  # a pipe that nobody reads would fill up
        process = subprocess.Popen(command, stdout=said, stderr=said)
        try:
            ends = time.monotonic() + patience_s
            while not _answers(port):
                if process.poll() is not None or time.monotonic() > ends:
                    said.seek(0)
                    raise RuntimeError(f"{command[0]} does not serve: {said.read().decode()}")
                time.sleep(0.05)
            yield
        finally:
            process.kill()
            process.wait()


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False
