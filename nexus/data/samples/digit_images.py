"""Images with two scanned handwritten digits (scikit-learn's `load_digits`, 8x8, from UCI's Optical Recognition of Handwritten
Digits) and the question what they add up to.

Shape letters: H, W 16 pixels; S scans.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

IMAGE_SIZE = 16
SCAN_SIZE = 8
# Scans per split, of 1,797: teachers must generalise to new handwriting, the student to newer handwriting still.
_NUM_SCANS = {"teacher": 1000, "student": 550, "test": 247}
QUESTIONS = (
    "What is the sum of the two digits in the image?",
    "Add the two digits in the picture.",
    "Which number do the digits in this image add up to?",
    "Look at the picture. What do both digits make together?",
    "What is the total of the digits in the picture?",
    "Two digits are drawn in this image. What is the sum?",
)


@dataclass(frozen=True)
class Scans:
    """One split's scans: `pixels_SHW` uint8 0..255, their digits `labels_S`, and their numbers in load_digits `ids_S`."""

    pixels_SHW: np.ndarray
    labels_S: np.ndarray
    ids_S: np.ndarray


def scans_of(split: str) -> Scans:
    """Returns the scans of "teacher", "student" or "test"; no scan is in two of them."""
    from sklearn.datasets import load_digits  # only the making of samples needs scikit-learn

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    ends = np.cumsum(list(_NUM_SCANS.values()))
    place = list(_NUM_SCANS).index(split)
    ids_S = np.sort(order[ends[place] - _NUM_SCANS[split] : ends[place]])
    pixels_SHW = np.rint(digits.images[ids_S] * (255 / 16)).astype(np.uint8)
    return Scans(pixels_SHW, digits.target[ids_S], ids_S)


def place_pair(first_HW: np.ndarray, second_HW: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns a uint8 [16, 16] image with both 8x8 scans at random places where they cannot overlap: side by side or one above
    the other, each shifted freely along the other axis."""
    image_HW = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    shifts = rng.integers(0, IMAGE_SIZE - SCAN_SIZE + 1, size=2)
    for scan_HW, start, shift in zip((first_HW, second_HW), (0, SCAN_SIZE), shifts, strict=True):
        image_HW[start : start + SCAN_SIZE, shift : shift + SCAN_SIZE] = scan_HW.T
    # Filled with transposed scans one above the other; transposing back gives the side-by-side layout.
    if rng.integers(2):
        return image_HW.T
    for scan_HW, start, shift in zip((first_HW, second_HW), (0, SCAN_SIZE), shifts, strict=True):
        image_HW[start : start + SCAN_SIZE, shift : shift + SCAN_SIZE] = scan_HW
    return image_HW


def encode_png(image_HW: np.ndarray) -> bytes:
    """Returns the grayscale image as PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image_HW).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
