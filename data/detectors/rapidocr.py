"""`rapidocr`: regions of text by PP-OCRv4's detector, whose weights come inside the wheel of rapidocr-onnxruntime."""

import logging

import numpy as np
from PIL import Image
from pydantic import Field

from mmfoundry.data.detectors.base import DETECTORS, Detect, Detector, needs_package
from mmfoundry.data.regions import NO_REGIONS

_MAX_ENLARGED = 2.0
_MULTIPLE = 32  # what the network wants its sides to be divisible by


@DETECTORS.register("rapidocr")
class RapidOcr(Detector):
    """Text in any script, line by line: the detector of PP-OCRv4 by ONNX Runtime (Liao et al. 2020, arXiv 1911.08947).

    Pictures are padded to a square and brought to one side, as T-MARS does before it detects text, so that a picture's
    shape never decides how much memory it takes.
    """

    finds = "text"
    side: int = Field(512, ge=128, le=2048, description="pixels; pictures are resized to a square of this side")
    threshold: float = Field(0.5, ge=0, le=1, description="least mean score of a line of text")
    num_threads: int = Field(1, ge=1, description="of the network; one a process is best where there are many")

    def load(self) -> Detect:
        """The network in memory."""
        try:
            from rapidocr_onnxruntime import RapidOCR
        except ImportError as error:
            raise needs_package(error, "rapidocr-onnxruntime", "ocr") from error
        logging.getLogger("rapidocr").setLevel(logging.ERROR)
        side = self.side - self.side % _MULTIPLE
        engine = RapidOCR(
            use_cls=False,
            use_rec=False,
            det_limit_side_len=side,
            det_limit_type="max",
            det_box_thresh=self.threshold,
            intra_op_num_threads=self.num_threads,
            inter_op_num_threads=1,
            max_side_len=side,
        )

        def detect(pixels: np.ndarray) -> np.ndarray:
            square, scale = padded_square(pixels, side)
            found, _ = engine.text_det(square[:, :, ::-1])  # it was trained on BGR
            if found is None or not len(found):
                return NO_REGIONS
            # corners name pixels: what they frame ends behind the last one
            corners = np.asarray(found, np.float32).reshape(-1, 4, 2)
            corners += np.where(corners > corners.mean(axis=1, keepdims=True), 1, 0)
            return (corners / scale / (pixels.shape[1], pixels.shape[0])).clip(0, 1).astype(np.float32)

        return detect


def padded_square(pixels: np.ndarray, side: int) -> tuple[np.ndarray, float]:
    """The picture in the upper left corner of a white square, and by how much it was enlarged: at most twice.

    The blots that a thumbnail becomes when it is blown up further look like strokes.
    """
    height, width = pixels.shape[:2]
    scale = min(side / max(height, width), _MAX_ENLARGED)
    new_height, new_width = (max(1, min(side, round(length * scale))) for length in (height, width))
    square = np.full((side, side, 3), 255, np.uint8)
    small = Image.fromarray(pixels).resize((new_width, new_height), Image.Resampling.BICUBIC)
    square[:new_height, :new_width] = np.asarray(small)
    return square, scale
