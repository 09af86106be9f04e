"""pipeline/urls.py: what counts as a URL."""

import pytest

from mmfoundry.pipeline.urls import is_url


@pytest.mark.parametrize(
    ("ref", "url"),
    [
        ("s3://bucket/pool", True),
        ("https://host/pool-{000..009}.tar", True),
        ("file:///data/pool", False),
        ("/data/pool", False),
        ("owner/name", False),
        ("C:/pool", False),
        ("://pool", False),
    ],
)
def test_what_counts_as_a_url(ref: str, url: bool) -> None:
    assert is_url(ref) is url
