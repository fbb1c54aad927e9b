"""Colour names from pixels, where they are certain.

The names that an instance's pixels allow: each pixel of the eroded mask votes, in CIELAB (D65), for the names whose region it lies in.
Regions have a strict core and a loose rim. An instance is of a colour where most pixels lie in the core of one name and few in the rim of
any other; a name is excluded where few lie in its rim; everything between stays open, and no expression depends on it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import ndimage

from grex_mllm.ops.masks import segmentation_to_mask
from grex_mllm.types import ImageRecord

COLOURED = frozenset(  # categories of which people say the colour
    {"cat", "dog", "horse", "cow", "bear", "bird", "car", "bus", "truck", "train", "motorcycle", "umbrella", "suitcase", "backpack"}
    | {"handbag", "couch", "chair", "frisbee", "kite", "surfboard"}
)
ANIMALS = frozenset({"cat", "dog", "horse", "cow", "bear", "bird"})
OF_ANIMALS = ("black", "white", "grey", "orange", "brown")
VAGUE = frozenset({"grey", "brown"})  # people call many things so: never said where there is none
NAMES = ("black", "white", "grey", "red", "orange", "yellow", "green", "blue", "brown")
COLOUR_WORDS = {name: name for name in NAMES} | {"gray": "grey", "ginger": "orange"}
CORE_SHARE = 0.7  # of the pixels, for a name to hold
RIM_SHARE = 0.2  # of the pixels, for a name to stay possible
FEWEST_PIXELS = 60  # of the eroded mask
DARK, BRIGHT = 30.0, 80.0  # median lightness of images in which everything looks black, or white
ERODED = 2  # pixels


def possible_colours(record: ImageRecord, image: Callable[[], np.ndarray]) -> dict[str, list[str]]:
    """Return, for each instance of the COLOURED categories that is large enough, the names that its pixels allow.

    One name: that colour. None: no colour that has a name here. Several: open. image: reads uint8 [H, W, 3], only
    where it is needed.
    """
    wanted = [instance for instance in record.instances if instance.category in COLOURED and not instance.iscrowd]
    if not wanted:
        return {}
    lab = rgb_to_lab(image())
    light = float(np.median(lab[..., 0]))
    doubtful = {"black"} if light < DARK else {"white"} if light > BRIGHT else set()
    found = {}
    for instance in wanted:
        mask = segmentation_to_mask(instance.segmentation, record.height, record.width)
        inner = ndimage.binary_erosion(mask, iterations=ERODED)
        if np.count_nonzero(inner) >= FEWEST_PIXELS:
            names = name_colours(lab[inner])
            found[instance.annotation_id] = [*names, "other"] if len(names) == 1 and names[0] in doubtful else names
    return found


def name_colours(lab: np.ndarray) -> list[str]:
    """Return the names that pixels allow. lab: float [N, 3]."""
    core, rim = _votes(lab, 0.0), _votes(lab, 1.0)
    possible = [name for name in NAMES if rim[name] >= RIM_SHARE]
    certain = [name for name in NAMES if core[name] >= CORE_SHARE]
    if certain and all(rim[name] < 1 - CORE_SHARE for name in possible if name != certain[0]):
        return certain[:1]
    return possible if len(possible) != 1 else [*possible, "other"]


def rgb_to_lab(image: np.ndarray) -> np.ndarray:
    """Return CIELAB (D65, 2 degrees) of sRGB. image: uint8 [..., 3]. Source: IEC 61966-2-1, CIE 15."""
    values = image.astype(np.float32) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    matrix = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]], np.float32)
    xyz = linear @ matrix.T / np.array([0.95047, 1.0, 1.08883], np.float32)
    cube = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    x, y, z = cube[..., 0], cube[..., 1], cube[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def _votes(lab: np.ndarray, rim: float) -> dict[str, float]:
    """Return the share of pixels in the region of each name. rim: 0 = cores, 1 = with their rims."""
    light, chroma = lab[:, 0], np.hypot(lab[:, 1], lab[:, 2])
    hue = np.degrees(np.arctan2(lab[:, 2], lab[:, 1])) % 360
    dull = chroma <= 9 + 5 * rim
    vivid = chroma >= 32 - 14 * rim

    def between(low: float, high: float, slack: float = 12.0) -> np.ndarray:
        turned = (hue - low + slack * rim) % 360
        return np.asarray(turned <= (high - low) % 360 + 2 * slack * rim)

    inside = {
        "black": (light <= 24 + 10 * rim) & (chroma <= 12 + 4 * rim),
        "white": (light >= 76 - 12 * rim) & dull,
        "grey": (light >= 38 - 8 * rim) & (light <= 62 + 8 * rim) & dull,
        "red": vivid & between(15, 42) & (light >= 20) & (light <= 62 + 6 * rim),
        "orange": vivid & between(52, 76) & (light >= 45 - 8 * rim),
        "yellow": vivid & between(86, 104) & (light >= 60 - 10 * rim),
        "green": vivid & between(118, 172) & (light >= 20 - 5 * rim),
        "blue": vivid & between(235, 300) & (light >= 15),
        "brown": (chroma >= 16 - 4 * rim) & (chroma <= 38 + 10 * rim) & between(40, 75) & (light >= 18 - 4 * rim) & (light <= 42 + 8 * rim),
    }
    return {name: float(np.mean(region)) for name, region in inside.items()}


def names_for(category: str) -> tuple[str, ...]:
    """Return the colours that objects of a category are said to have."""
    return OF_ANIMALS if category in ANIMALS else NAMES
