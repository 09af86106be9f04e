"""data/detectors: each finds what is drawn or built into its network, wherever the picture's shape puts it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from mmfoundry.data.detectors.base import DETECTORS, Detect, parse_detector
from mmfoundry.data.detectors.rapidocr import padded_square
from mmfoundry.data.regions import covered, mask_of
from mmfoundry.pipeline.errors import ConfigError, DamagedInput, MissingInput, UnknownName


@pytest.fixture(scope="module")
def text() -> Detect:
    pytest.importorskip("rapidocr_onnxruntime", reason="the extra `ocr` is not installed")
    return parse_detector("rapidocr", "text", "detectors.text").load()


def written(words: str, size: tuple[int, int], place: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A picture with words on it, and which pixels they changed."""
    image = Image.new("RGB", size, (200, 220, 255))
    blank = np.array(image)
    ImageDraw.Draw(image).text(place, words, fill=(20, 20, 60), font=ImageFont.load_default(size=40))
    drawn = np.array(image)
    return drawn, (drawn != blank).any(axis=2)


@pytest.mark.parametrize("size", [(400, 300), (300, 500), (900, 200)])
def test_text_is_found_where_it_is(text: Detect, size: tuple[int, int]) -> None:
    pixels, ink = written("HELLO 123", size, (40, 80))
    regions = text(pixels)
    mask = mask_of(regions, *pixels.shape[:2])
    assert (mask & ink).sum() > 0.97 * ink.sum()
    rows, columns = np.nonzero(ink)
    assert mask.sum() < 2.5 * np.ptp(rows) * np.ptp(columns)
    assert regions.dtype == np.float32
    assert regions.shape[1:] == (4, 2)
    assert ((regions >= 0) & (regions <= 1)).all()


def test_no_text_gives_no_regions(text: Detect) -> None:
    plain = np.full((200, 300, 3), 90, np.uint8)
    assert text(plain).shape == (0, 4, 2)
    assert covered(text(plain), 200, 300) == 0.0


@pytest.mark.parametrize("shape", [(1, 1), (2, 6000), (6000, 2), (33, 31)])
def test_any_shape_is_taken(text: Detect, shape: tuple[int, int]) -> None:
    assert text(np.zeros((*shape, 3), np.uint8)).shape == (0, 4, 2)


def test_squares_keep_the_shape_of_what_is_in_them() -> None:
    square, scale = padded_square(np.zeros((50, 100, 3), np.uint8), 64)
    assert scale == 0.64
    assert padded_square(np.zeros((10, 20, 3), np.uint8), 64)[1] == 2.0
    assert square.shape == (64, 64, 3)
    assert not square[:32].any()
    assert (square[32:] == 255).all()


def yunet_file(path: Path, side: int) -> Path:
    """A network with YuNet's outputs that finds one face: at 16 pixels a step, column 1 and row 2, always the same."""
    onnx = pytest.importorskip("onnx", reason="writes the network of the test")
    helper, kinds = onnx.helper, onnx.TensorProto
    nodes, outputs = [], []
    widths = {"cls": 1, "obj": 1, "bbox": 4, "kps": 10}
    for kind, width in widths.items():
        for stride in (8, 16, 32):
            cells = (side // stride) ** 2
            values = np.zeros((1, cells, width), np.float32)
            if stride == 16 and kind in ("cls", "obj"):
                values[0, 2 * (side // stride) + 1] = 0.9
            elif stride == 16 and kind == "bbox":  # the middle half a step on; sides e^0.5 and e^1 steps
                values[0, 2 * (side // stride) + 1] = [0.5, 0.5, 0.5, 1.0]
            tensor = helper.make_tensor(f"{kind}_{stride}_values", kinds.FLOAT, values.shape, values.reshape(-1))
            # reads the picture (times zero), or OpenCV would find no path from its input
            nodes.append(helper.make_node("Constant", [], [f"{kind}_{stride}_raw"], value=tensor))
            nodes.append(helper.make_node("Add", [f"{kind}_{stride}_raw", "nothing"], [f"{kind}_{stride}"]))
            outputs.append(helper.make_tensor_value_info(f"{kind}_{stride}", kinds.FLOAT, values.shape))
    zero = helper.make_tensor("zero_value", kinds.FLOAT, [1], [0.0])
    first = [
        helper.make_node("Constant", [], ["zero"], value=zero),
        helper.make_node("GlobalAveragePool", ["input"], ["mean"]),
        helper.make_node("ReduceMean", ["mean"], ["one"], axes=[1], keepdims=0),
        helper.make_node("Mul", ["one", "zero"], ["scaled"]),
        helper.make_node("Reshape", ["scaled", "shape"], ["nothing"]),
    ]
    shape = helper.make_tensor("shape", kinds.INT64, [3], [1, 1, 1])
    picture = helper.make_tensor_value_info("input", kinds.FLOAT, [1, 3, side, side])
    graph = helper.make_graph(first + nodes, "yunet", [picture], outputs, [shape])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=7), str(path))
    return path


def test_faces_come_as_fractions_of_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("cv2", reason="the extra `faces` is not installed")
    file = yunet_file(tmp_path / "faces.onnx", 64)
    detect = parse_detector({"yunet": {"weights": str(file), "side": 64}}, "faces", "detectors.faces").load()
    middle = np.array([1.5 * 16, 2.5 * 16])
    sides = np.exp([0.5, 1.0]) * 16
    for height, width in ((64, 64), (128, 96)):
        regions = detect(np.zeros((height, width, 3), np.uint8))
        assert regions.shape == (1, 4, 2)
        scale = 64 / max(height, width)
        low, high = (middle - sides / 2) / scale, (middle + sides / 2) / scale
        np.testing.assert_allclose(regions[0].min(axis=0), low / (width, height), atol=1e-3)
        np.testing.assert_allclose(regions[0].max(axis=0), np.minimum(high / (width, height), 1), atol=1e-3)


def test_faces_need_weights_that_are_there_and_whole(tmp_path: Path) -> None:
    pytest.importorskip("cv2", reason="the extra `faces` is not installed")
    with pytest.raises(MissingInput, match=r"yunet\.weights"):
        parse_detector({"yunet": {"weights": str(tmp_path / "no.onnx")}}, "faces", "detectors.faces").load()
    (tmp_path / "broken.onnx").write_bytes(b"not a network")
    with pytest.raises(DamagedInput, match=r"broken\.onnx"):
        parse_detector({"yunet": {"weights": str(tmp_path / "broken.onnx")}}, "faces", "detectors.faces").load()


def test_what_is_written_wrong_is_named() -> None:
    with pytest.raises(UnknownName, match="rapidocr"):
        parse_detector("rapidor", "text", "detectors.text")
    with pytest.raises(ConfigError, match=r"rapidocr finds text, not faces; those that do: yunet"):
        parse_detector("rapidocr", "faces", "detectors.faces")
    with pytest.raises(ConfigError, match=r"detectors\.text\.rapidocr\.size: .*side"):
        parse_detector({"rapidocr": {"size": 3}}, "text", "detectors.text")
    with pytest.raises(ConfigError, match=r"detectors\.text: give a detector's name"):
        parse_detector(["rapidocr"], "text", "detectors.text")


def test_every_detector_tells_what_it_finds() -> None:
    assert {name: kind.finds for name, kind in DETECTORS.items()} == {"rapidocr": "text", "yunet": "faces"}
