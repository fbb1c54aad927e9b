"""Colours: brightness, contrast, saturation and hue as one linear map of the pixels."""

from __future__ import annotations

import numpy as np
from PIL import Image

BRIGHTNESS = CONTRAST = 0.15  # largest relative change: mild, so that white stays white
SATURATION = 0.4
HUE = 0.03  # of a turn
LUMA = np.array([0.299, 0.587, 0.114])
TO_YIQ = np.array([LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


def change_colours(image: np.ndarray, numbers: np.ndarray, *, keep_hues: bool) -> np.ndarray:
    """Return an image uint8 [H, W, 3] in other colours.

    numbers: four in [-1, 1], for brightness, contrast, saturation and hue.  keep_hues: change brightness and contrast alone.
    """
    brightness, contrast = 1 + BRIGHTNESS * numbers[0], 1 + CONTRAST * numbers[1]
    change = np.eye(3) * brightness * contrast
    if not keep_hues:
        angle, saturation = 2 * np.pi * HUE * numbers[3], 1 + SATURATION * numbers[2]
        turn = np.eye(3)
        turn[1:, 1:] = saturation * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        change = change @ np.linalg.inv(TO_YIQ) @ turn @ TO_YIQ
    grey = brightness * float(image[::4, ::4].reshape(-1, 3).mean(axis=0) @ LUMA)
    offset = (1 - contrast) * grey
    matrix = np.concatenate([change, np.full((3, 1), offset)], axis=1).reshape(-1)
    picture = Image.fromarray(np.ascontiguousarray(image))
    return np.array(picture.convert("RGB", tuple(float(number) for number in matrix)))
