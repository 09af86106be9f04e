"""Raw samples become samples; what they lack or break has a name."""

from pathlib import Path

import numpy as np
import pytest

from mmfoundry.data.decode import DecodeLimits, LazyImage, UnreadableSample
from mmfoundry.data.reshard import rewritten
from mmfoundry.data.sample import RawSample, Sample, image_member, read_text, to_sample

from .conftest import encode, smooth
from .photographs import photograph

PNG = encode(smooth(1))


def _raw(**members: bytes) -> RawSample:
    return RawSample("a", members, Path("a.tar"))


def test_every_part_of_a_sample_finds_its_place() -> None:
    text = b'{"captions": [" one ", "", "two"], "messages": [{"role": "user", "content": "?"}], "uid": "x", "n": 3}'
    sample = to_sample(_raw(png=PNG, txt=b"not used", json=text))
    assert (sample.key, sample.text, sample.meta) == ("a", ["one", "two"], {"uid": "x", "n": 3})
    assert sample.messages == [{"role": "user", "content": "?"}]
    np.testing.assert_array_equal(sample.image, smooth(1))


def test_captions_are_the_lines_of_txt_where_json_has_none() -> None:
    assert read_text(_raw(txt="ein Äpfel\r\n\n two \n".encode(), json=b"{}"))[0] == ["ein Äpfel", "two"]
    assert read_text(_raw(png=PNG)) == ([], None, {})


def test_the_caption_of_img2datasets_json_counts_where_there_is_no_txt() -> None:
    text = '{"caption": " ein Äpfel\\n\\ntwo", "status": "success"}'.encode()
    assert read_text(_raw(json=text))[0] == ["ein Äpfel", "two"]
    assert read_text(_raw(json=text))[2] == {"caption": " ein Äpfel\n\ntwo", "status": "success"}
    assert read_text(_raw(txt=b"", json=text))[0] == []
    assert read_text(_raw(json=b'{"captions": [], "caption": "a"}'))[0] == []
    assert read_text(_raw(json=b'{"caption": null}'))[0] == []
    cut = rewritten(_raw(json=text), "0" * 32, [1])
    assert read_text(_raw(json=cut["json"]))[0] == ["two"]


def test_the_image_member_is_chosen_by_a_fixed_order() -> None:
    assert image_member({"webp": b"w", "jpg": b"j", "txt": b"t"}) == b"j"
    assert image_member({"seg.png": b"mask", "txt": b"t"}) is None


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"txt": b"a"}, "no image"),
        ({"png": b""}, "empty image"),
        ({"png": PNG, "txt": b"\xff\xfe"}, "text is not UTF-8"),
        ({"png": PNG, "json": b"{"}, "broken JSON"),
        ({"png": PNG, "json": b"\xff"}, "broken JSON"),
        ({"png": PNG, "json": b"[" * 100_000}, "broken JSON"),
        ({"png": PNG, "json": b"[1]"}, "JSON is not an object"),
        ({"png": PNG, "json": b'{"captions": "one"}'}, "captions are not a list of strings"),
        ({"png": PNG, "json": b'{"captions": [1]}'}, "captions are not a list of strings"),
        ({"png": PNG, "json": b'{"messages": ["hi"]}'}, "messages are not a list of objects"),
    ],
)
def test_what_cannot_be_read_has_a_reason(members: dict[str, bytes], reason: str) -> None:
    with pytest.raises(UnreadableSample) as caught:
        to_sample(_raw(**members))
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)


def test_limits_reach_the_decoder() -> None:
    with pytest.raises(UnreadableSample, match="too many pixels"):
        to_sample(_raw(png=PNG), DecodeLimits(max_pixels=10))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_lazy_sample_has_its_size_at_once_and_its_pixels_when_asked(kind: str) -> None:
    data = encode(photograph(40, 60), kind)
    eager, lazy = to_sample(_raw(jpg=data)), to_sample(_raw(jpg=data), lazy=True)
    assert isinstance(lazy.picture, LazyImage)
    assert lazy.picture.size == (40, 60)
    assert eager.picture is eager.image
    np.testing.assert_array_equal(lazy.image, eager.image)
    assert lazy.image is lazy.image


def test_damaged_pixels_are_met_when_they_are_decoded() -> None:
    half = encode(photograph(40, 60), "JPEG")[:900]
    with pytest.raises(UnreadableSample, match="damaged image"):
        to_sample(_raw(jpg=half))
    sample = to_sample(_raw(jpg=half), lazy=True)
    with pytest.raises(UnreadableSample, match="damaged image"):
        _ = sample.image


def test_headers_and_limits_are_looked_at_at_once() -> None:
    for data in (PNG, encode(smooth(1), "JPEG")):
        with pytest.raises(UnreadableSample, match="too many pixels"):
            to_sample(_raw(png=data), DecodeLimits(max_pixels=10), lazy=True)
    with pytest.raises(UnreadableSample, match="unknown image format"):
        to_sample(_raw(png=b"junk"), lazy=True)


def test_a_frozen_sample_cannot_be_written_to() -> None:
    data = encode(photograph(40, 60), "PNG")
    for sample in (to_sample(_raw(png=data)), to_sample(_raw(png=data), lazy=True)):
        assert sample.freeze() == 40 * 60 * 3
        with pytest.raises(ValueError, match="read-only"):
            sample.image[0, 0] = 1
    jpeg = encode(photograph(40, 60), "JPEG")
    assert to_sample(_raw(jpg=jpeg), lazy=True).freeze() == len(jpeg)


def test_samples_do_not_share_what_is_left_out() -> None:
    one, two = (Sample(name, np.zeros((1, 1, 3), np.uint8)) for name in "ab")
    one.text.append("said of one")
    one.meta["n"] = 1
    assert (two.text, two.meta, two.messages) == ([], {}, None)
