"""Images from anywhere to one form: uint8 [H, W, 3] RGB, EXIF orientation applied."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from PIL import Image

from grex_mllm.errors import GrexError, fault

MAX_IMAGE_PIXELS = 64_000_000  # 192 MB decoded: beyond any photograph in use, far below what a decompression bomb claims
EXIF_ORIENTATION = 0x0112
EXIF_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


def load_image(source: Any) -> np.ndarray:
    """Return uint8 [H, W, 3] RGB of a path, PIL image, numpy array (HWC or HW) or torch tensor (CHW, HW or HWC).

    Arrays are uint8, tensors uint8 or float in [0, 1]. EXIF orientation is applied to files and PIL images. Grey-scale, palette, CMYK,
    16-bit and other PIL modes are converted; transparent pixels are laid over white, as a viewer shows them.

    Raises:
        GrexError: missing, truncated or unreadable file, more than MAX_IMAGE_PIXELS, an array of another shape or type.
    """
    if isinstance(source, str | Path):
        return _load_file(Path(source))
    if isinstance(source, Image.Image):
        return _convert(source, "image")
    if isinstance(source, np.ndarray):
        return _from_array(source, channels_first=False)
    if hasattr(source, "detach") and hasattr(source, "cpu"):  # a tensor, without importing torch for those who have none here
        return _from_array(source.detach().cpu().numpy(), channels_first=True)
    raise fault(
        f"image of type {type(source).__name__}", "a path, a PIL image, a numpy array or a torch tensor", "convert it to one of these"
    )


def resolve_image(root: str | Path, file: str) -> Path:
    """Return root / file, where `file` must stay under the root.

    Raises:
        GrexError: absolute path, `..`, backslash or drive letter, or an empty name.
    """
    parts = PurePosixPath(file).parts
    windows = PureWindowsPath(file)
    if not file or "\x00" in file or "\\" in file or PurePosixPath(file).is_absolute() or windows.drive or windows.root or ".." in parts:
        raise fault(f"image file {file!r}", f"a path relative to the image root {root}, without '..'", "fix `file` in images.jsonl")
    return Path(root) / file


def _open(path: Path) -> Image.Image:
    if not path.is_file():
        raise fault(
            f"image file {path} does not exist", "a readable image file", "check the path, or give the image root with --image-root"
        )
    try:
        image = Image.open(path)
    except Image.DecompressionBombError:
        raise _too_large(str(path), "its header's size") from None
    except UNREADABLE as error:
        raise _unreadable(path, error) from None
    if image.width * image.height > MAX_IMAGE_PIXELS:
        image.close()
        raise _too_large(str(path), f"{image.width}x{image.height}")
    return image


def _load_file(path: Path) -> np.ndarray:
    with _open(path) as image:
        try:
            return _convert(image, str(path))
        except GrexError:
            raise
        except UNREADABLE as error:
            raise _unreadable(path, error) from None


def _convert(image: Image.Image, name: str) -> np.ndarray:
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise _too_large(name, f"{image.width}x{image.height}")
    orientation = _orientation(image)
    image.load()
    if image.mode.startswith("I;16") or image.mode == "I":
        image = _sixteen_bit(image, name)
    elif image.mode == "F":
        raise fault(f"{name} holds floating-point pixels", "an 8- or 16-bit image", "convert it to 8 bits first")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer)
    image = image.convert("RGB")
    if orientation in EXIF_TRANSPOSE:
        image = image.transpose(EXIF_TRANSPOSE[orientation])
    pixels = np.array(image, dtype=np.uint8)
    if pixels.ndim != 3 or 0 in pixels.shape:
        raise fault(f"{name} of size {image.width}x{image.height}", "at least one pixel", "give another image")
    return pixels


def _sixteen_bit(image: Image.Image, name: str) -> Image.Image:
    """Scale 0..65535 to 0..255 (PIL's own conversion cuts everything above 255 to white)."""
    values = np.asarray(image).astype(np.int64)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise fault(f"{name} holds pixel values {values.min()}..{values.max()}", "8 or 16 bits a channel", "convert it to 8 bits first")
    if image.mode == "I" and values.size and values.max() <= 255:
        return Image.fromarray(values.astype(np.uint8))
    return Image.fromarray((values // 257).astype(np.uint8))


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(EXIF_ORIENTATION, 1)
    except UNREADABLE:  # a broken EXIF block does not make the pixels unreadable
        return 1
    return int(value) if isinstance(value, int) else 1


def _from_array(array: np.ndarray, channels_first: bool) -> np.ndarray:
    shape, kind = tuple(array.shape), array.dtype
    if channels_first and array.ndim == 3 and shape[0] in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3) or 0 in array.shape:
        expected = "[3, H, W], [1, H, W], [H, W] or [H, W, 3]" if channels_first else "[H, W, 3], [H, W, 1] or [H, W]"
        raise fault(f"image array of shape {shape}", expected, "pass one RGB image")
    if array.shape[0] * array.shape[1] > MAX_IMAGE_PIXELS:
        raise _too_large("image array", f"{array.shape[1]}x{array.shape[0]}")
    if channels_first and np.issubdtype(kind, np.floating):
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise fault(
                f"float image with values {array.min()}..{array.max()}", "values in [0, 1]", "undo the normalisation, or pass uint8"
            )
        array = np.round(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise fault(f"image array of type {kind}", "uint8", "convert it to 0..255 first")
    return np.ascontiguousarray(np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array)


def _unreadable(path: Path, error: BaseException) -> GrexError:
    reason = str(error) or type(error).__name__
    return fault(f"image file {path} cannot be read ({reason})", "a complete image file", "fetch the file again or remove its record")


def _too_large(name: str, size: str) -> GrexError:
    return fault(f"{name} is too large ({size})", f"at most {MAX_IMAGE_PIXELS:,} pixels", "scale it down first")
