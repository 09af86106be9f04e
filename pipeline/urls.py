"""What is a URL and what is a path; light, as every process that reads shards asks."""

import re

_URL = re.compile(r"(?!file:)[A-Za-z][A-Za-z0-9+.-]+://")


def is_url(text: str) -> bool:
    """Whether it names something by scheme, as `s3://bucket/pool.tar` does; `file://` is a path all the same."""
    return _URL.match(text) is not None
