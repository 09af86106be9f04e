"""data/uids.py: uids as numbers, many at a time as one by one."""

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfoundry.data import uids
from mmfoundry.data.uids import high_low, numbers_of

HEX = st.text("0123456789abcdefABCDEF", min_size=32, max_size=32)


@settings(max_examples=50, deadline=None)
@given(st.lists(HEX, max_size=20), st.integers(1, 8))
def test_many_at_a_time_are_as_one_by_one(found: list[str], at_once: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uids, "_AT_ONCE", at_once)
        numbers = numbers_of(pl.Series("uid", found, dtype=pl.String))
    assert numbers is not None
    assert numbers.rows() == [divmod(int(uid, 16), 2**64) for uid in found]
    assert numbers.equals(pl.Series("uid", found, dtype=pl.String).str.to_lowercase().to_frame().select(*high_low()))


@pytest.mark.parametrize(
    "other",
    [
        None,
        "",
        "0" * 31,
        "0" * 33,
        "g" + "0" * 31,
        " " + "0" * 31,
        "00 " * 10 + "00",  # decoders of hex pass over white space between digits
        "0" * 30 + "é",  # 32 bytes
        "\x00" * 32,
        "0x" + "0" * 30,
    ],
)
def test_what_is_no_uid_is_told(other: str | None) -> None:
    good = "0123456789abcdef" * 2
    assert numbers_of(pl.Series([good, good])) is not None
    for column in ([other], [good, other], [other, good]):
        assert numbers_of(pl.Series(column, dtype=pl.String)) is None
