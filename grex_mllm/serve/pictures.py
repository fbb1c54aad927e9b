"""From uploaded bytes to pixels: still PNG, JPEG and WebP pictures alone, upright, in sRGB, at a size that a page can show."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms, ImageOps

from grex_mllm.data.images import UNREADABLE, load_image
from grex_mllm.errors import GrexError, fault
from grex_mllm.serve.limits import MAX_SIDE, MAX_UPLOAD_PIXELS

FORMATS = ("PNG", "JPEG", "WEBP")
WANTED = "a still PNG, JPEG or WebP picture"
_MARKUP = re.compile(rb"^(\xef\xbb\xbf)?\s*<")
_GIF = (b"GIF87a", b"GIF89a")


@dataclass(frozen=True)
class Picture:
    """pixels: uint8 [H, W, 3] RGB.  given: (width, height) of the upload, upright, before it was scaled."""

    pixels: np.ndarray
    given: tuple[int, int]


def read_picture(data: bytes) -> Picture:
    """Read an uploaded picture: EXIF orientation applied, colours converted to sRGB, scaled to a longer side of MAX_SIDE.

    Raises:
        GrexError: another format, an animation, damaged data, or more than MAX_UPLOAD_PIXELS.
    """
    if _MARKUP.match(data[:200]):
        raise fault("an SVG drawing or another text file", WANTED, "export it as PNG first")
    if data[:6] in _GIF:
        raise fault("a GIF", WANTED, "save one frame of it as PNG")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return _still(image)
    except GrexError:
        raise
    except Image.DecompressionBombError:
        raise _too_large("more pixels than any photograph") from None
    except UNREADABLE as error:
        raise fault(
            f"a file that is no whole picture ({type(error).__name__})", WANTED, "choose another file, or save this one again"
        ) from None


def kept(pixels: np.ndarray, side: int = MAX_SIDE) -> Picture:
    """Return a picture of uint8 [H, W, 3] as an upload is kept: scaled down to a longer side of at most `side`."""
    height, width = pixels.shape[:2]
    if max(height, width) > side:
        pixels = load_image(_smaller(Image.fromarray(pixels), side))
    return Picture(pixels, (width, height))


def _still(image: Image.Image) -> Picture:
    if image.width * image.height > MAX_UPLOAD_PIXELS:
        raise _too_large(f"{image.width}x{image.height}")
    # An MPO is a photograph of a phone that carries a depth map or a second view beside itself.
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        raise fault(f"an animation of {getattr(image, 'n_frames', 1)} frames", WANTED, "save one frame of it as PNG")
    profile = image.info.get("icc_profile")
    upright = ImageOps.exif_transpose(image)
    given = upright.size
    if max(given) > MAX_SIDE:
        upright = _smaller(upright)
    if profile and upright.mode == "RGB":
        upright = _in_srgb(upright, profile)
    return Picture(load_image(upright), given)


def _smaller(image: Image.Image, side: int = MAX_SIDE) -> Image.Image:
    share = side / max(image.size)
    size = (max(1, round(image.width * share)), max(1, round(image.height * share)))
    if image.mode in ("P", "1", "PA"):
        image = image.convert("RGBA")
    return image.resize(size, Image.Resampling.BICUBIC if image.mode.startswith("I") else Image.Resampling.LANCZOS)


def _in_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.profileToProfile(image, own, ImageCms.createProfile("sRGB"), outputMode="RGB") or image
    except (ImageCms.PyCMSError, OSError):  # a broken profile: the numbers are taken as sRGB, as browsers do
        return image


def _too_large(size: str) -> GrexError:
    return fault(f"a picture of {size}", f"at most {MAX_UPLOAD_PIXELS:,} pixels", "scale it down first")
