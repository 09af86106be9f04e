"""`yunet`: faces by YuNet through OpenCV, from a weights file that the user names."""

from pathlib import Path

import numpy as np
from pydantic import Field

from mmfoundry.data.detectors.base import DETECTORS, Detect, Detector, needs_package
from mmfoundry.data.detectors.rapidocr import padded_square
from mmfoundry.data.regions import NO_REGIONS, from_boxes
from mmfoundry.pipeline.errors import DamagedInput, MissingInput

_MULTIPLE = 32


@DETECTORS.register("yunet")
class YuNet(Detector):
    """Faces, by YuNet (Wu et al. 2023, Machine Intelligence Research 20) in OpenCV's `FaceDetectorYN`.

    DataComp's faces come from SCRFD-10G at 224 pixels; its weights may not be used commercially. YuNet's may: take
    `face_detection_yunet_2023mar.onnx` from OpenCV's model zoo. Another detector is a class registered in `DETECTORS`.
    """

    finds = "faces"
    weights: str = Field(description="YuNet's ONNX file")
    side: int = Field(640, ge=64, le=2048, description="pixels; pictures are resized to a square of this side")
    threshold: float = Field(0.6, ge=0, le=1, description="least score of a face; DataComp takes SCRFD's at 0.3")

    def load(self) -> Detect:
        """The network in memory."""
        try:
            import cv2
        except ImportError as error:
            raise needs_package(error, "opencv-python-headless", "faces") from error
        if not Path(self.weights).is_file():
            raise MissingInput(f"detectors.faces.yunet.weights: {self.weights}: no such file")
        side = self.side - self.side % _MULTIPLE
        try:
            network = cv2.FaceDetectorYN.create(self.weights, "", (side, side), self.threshold)
        except cv2.error as error:
            reason = str(error).strip().splitlines()[0]
            raise DamagedInput(f"{self.weights}: not an ONNX file that OpenCV can read ({reason})") from error

        def detect(pixels: np.ndarray) -> np.ndarray:
            square, scale = padded_square(pixels, side)
            _, found = network.detect(np.ascontiguousarray(square[:, :, ::-1]))  # OpenCV's order is BGR
            if found is None:
                return NO_REGIONS
            left, top, width, height = (found[:, :4] / scale).T
            boxes = np.stack([left, top, left + width, top + height], axis=1)
            fractions = boxes / np.array([pixels.shape[1], pixels.shape[0]] * 2)
            return from_boxes(fractions.clip(0, 1))

        return detect
