"""Faces in frames: detectors, one face followed through a clip, and the square that is cut out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image
from skimage.feature import Cascade

from ..files import BrokenFile

DETECTED_AT = 480  # pixels of the longer side at which faces are looked for
LEAST_FACE = 40  # pixels, at that size

Detector = Callable[[np.ndarray], np.ndarray]
"""From a frame ``(H, W, 3)`` uint8 to its faces ``(K, 4)`` float64: left, top, right, bottom in pixels."""


def _shrunk(frame: np.ndarray) -> tuple[np.ndarray, float]:
    height, width = frame.shape[:2]
    factor = min(1.0, DETECTED_AT / max(height, width))
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR)), factor


@cache
def cascade() -> Detector:
    """The LBP cascade for frontal faces that scikit-image ships."""
    model = Cascade(skimage.data.lbp_frontal_face_cascade_filename())

    def detect(frame: np.ndarray) -> np.ndarray:
        small, factor = _shrunk(frame)
        if min(small.shape[:2]) < LEAST_FACE:
            return np.empty((0, 4))
        found = model.detect_multi_scale(small, 1.2, 1, (LEAST_FACE, LEAST_FACE), small.shape[:2])
        boxes = [(f["c"], f["r"], f["c"] + f["width"], f["r"] + f["height"]) for f in found]
        return np.array(boxes, float).reshape(-1, 4) / factor

    return detect


@cache
def yunet(model_file: str) -> Detector:
    """OpenCV's YuNet; ``model_file`` is its ONNX file, which OpenCV's model zoo has."""
    if not Path(model_file).is_file():
        raise ValueError(f"detector_file: no file '{model_file}'")
    try:
        import cv2
    except ImportError as error:
        raise ValueError("detector: yunet needs OpenCV: pip install opencv-python-headless") from error
    model = cv2.FaceDetectorYN.create(model_file, "", (DETECTED_AT, DETECTED_AT))

    def detect(frame: np.ndarray) -> np.ndarray:
        small, factor = _shrunk(frame)
        model.setInputSize(small.shape[1::-1])
        found = model.detect(np.ascontiguousarray(small[:, :, ::-1]))[1]  # BGR in; left, top, width, height, … out
        if found is None:
            return np.empty((0, 4))
        return np.hstack([found[:, :2], found[:, :2] + found[:, 2:4]]).astype(float) / factor

    return detect


def follow(candidates: Sequence[np.ndarray]) -> np.ndarray:
    """One face through a clip: the largest there is, and in the frames before and after it the nearest to the last.

    Args:
        candidates: for each frame its faces ``(K, 4)``.

    Returns:
        ``(T, 4)`` float64; NaN where no face lies within one side of the last.

    Raises:
        BrokenFile: there is no face at all.
    """
    sizes = [max(boxes[:, 2] - boxes[:, 0], default=0.0) for boxes in candidates]
    start = int(np.argmax(sizes))
    if not sizes[start]:
        raise BrokenFile("no face found" + (f" in any of {len(candidates)} frames" if len(candidates) > 1 else ""))
    track = np.full((len(candidates), 4), np.nan)
    for order in (range(start, len(candidates)), range(start, -1, -1)):
        first = candidates[start]
        last = first[np.argmax(first[:, 2] - first[:, 0])]
        for index in order:
            boxes = candidates[index]
            if not len(boxes):
                continue
            distances = np.hypot(*((boxes[:, :2] + boxes[:, 2:] - last[:2] - last[2:]) / 2).T)
            if distances.min() <= last[2] - last[0]:
                track[index] = last = boxes[np.argmin(distances)]
    return track


def smooth(track: np.ndarray, times: np.ndarray, width: float) -> np.ndarray:
    """Fill gaps linearly, then average over time by a Gaussian.

    Args:
        track: ``(T, 4)``, NaN where unknown, known at least once.
        times: ``(T,)`` rising numbers of the frames.
        width: σ in frames; 0 averages nothing.
    """
    known = ~np.isnan(track[:, 0])
    filled = np.stack([np.interp(times, times[known], column[known]) for column in track.T], axis=1)
    if not width:
        return filled
    weights = np.exp(-0.5 * ((times[:, None] - times[None]) / width) ** 2)
    return weights @ filled / weights.sum(1, keepdims=True)


def squares(boxes: np.ndarray, margin: float, width: int, height: int) -> np.ndarray:
    """Squares about the boxes, their side the longer one times the margin, moved and shrunk to lie within the frame.

    Returns:
        ``(T, 4)`` int64: left, top, right, bottom; right and bottom lie outside.
    """
    sides = np.round(margin * np.maximum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]))
    sides = np.clip(sides, 1, min(width, height))[:, None]
    corners = np.round((boxes[:, :2] + boxes[:, 2:]) / 2 - sides / 2)
    corners = np.clip(corners, 0, np.array([width, height]) - sides)
    return np.hstack([corners, corners + sides]).astype(np.int64)
