"""The images of a folder: which files are searched, and which are refused, with the reason."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from grex_mllm.data.images import MAX_IMAGE_PIXELS, UNREADABLE, load_image
from grex_mllm.errors import GrexError, fault

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
DRAWING_SUFFIXES = frozenset({".svg", ".svgz"})
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
MAX_FILE_BYTES = 64 * 2**20
MAX_REASON_CHARACTERS = 200


@dataclass(frozen=True)
class ImageFile:
    """A file under the folder. file: path with "/", relative to the folder.  size_bytes, mtime_ns: what tells that it was changed."""

    file: str
    size_bytes: int
    mtime_ns: int


@dataclass
class Listing:
    """What a folder holds. refused: file -> reason, of files that look like images and are not searched."""

    files: list[ImageFile] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def list_images(root: str | Path) -> Listing:
    """List the images under a folder, in the order of their names. Hidden files and folders are left out; no link to a folder is followed.

    Raises:
        GrexError: no such folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise fault(f"--images {root}, which is no folder", "a folder of images", "check the path")
    listing, inside = Listing(), root.resolve()
    for path in _walk(root):
        name = path.relative_to(root).as_posix()
        suffix = path.suffix.lower()
        if suffix not in IMAGE_SUFFIXES | DRAWING_SUFFIXES and not (path.is_symlink() and path.is_dir()):
            continue
        try:
            reason = _refusal(path, inside, suffix)
            about = path.stat()
        except OSError as error:
            reason, about = f"cannot be read ({error.strerror})", None
        if reason or about is None:
            listing.refused[_printable(name)] = reason
        else:
            listing.files.append(ImageFile(name, about.st_size, about.st_mtime_ns))
    listing.files.sort(key=lambda item: item.file)
    return listing


def read_image(root: str | Path, file: str) -> np.ndarray:
    """Return uint8 [H, W, 3] of a listed file.

    Raises:
        GrexError: an animation, another format than its name promises, too many pixels, or a damaged file.
    """
    path = Path(root) / file
    Image.init()  # Pillow registers most formats late, and knows none of these names before
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise fault(f"{image.width}x{image.height} pixels", f"at most {MAX_IMAGE_PIXELS:,}", "scale it down")
            # Pillow calls a JPEG with previews behind the picture, as phones write it, MPO
            if image.format != "MPO" and getattr(image, "is_animated", False):
                raise fault("an animation or several pages", "one picture", "save one of them")
    except Image.DecompressionBombError:
        raise fault("too many pixels", f"at most {MAX_IMAGE_PIXELS:,}", "scale it down") from None
    except GrexError:
        raise
    except UNREADABLE as error:
        raise fault(f"no readable image ({type(error).__name__})", f"a whole file of {', '.join(FORMATS)}", "fetch it again") from None
    return load_image(path)


def short_reason(error: Exception) -> str:
    """Return an error's text in one line of bounded length."""
    return " ".join(str(error).split())[:MAX_REASON_CHARACTERS]


def _walk(root: Path) -> Iterator[Path]:
    """Yield files, and links to folders, without what is hidden."""
    for folder, folders, files in os.walk(root, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        linked = [name for name in folders if (Path(folder) / name).is_symlink()]
        yield from (Path(folder) / name for name in sorted([*files, *linked]) if not name.startswith("."))


def _refusal(path: Path, inside: Path, suffix: str) -> str:
    """Return why a file is not searched, or an empty text."""
    if path.is_symlink() and not path.resolve().is_relative_to(inside):
        return "a link out of the folder"
    if path.is_dir():
        return "a link to a folder"
    if not stat.S_ISREG(path.stat().st_mode):
        return "no regular file"
    if suffix in DRAWING_SUFFIXES:
        return "a vector drawing (SVG), which may hold programs and addresses; save it as PNG"
    if path.stat().st_size > MAX_FILE_BYTES:
        return f"a file of over {MAX_FILE_BYTES:,} bytes"
    if _printable(path.name) != path.name:
        return "a name that is no UTF-8 text"
    return ""


def _printable(name: str) -> str:
    return name.encode("utf-8", "replace").decode("utf-8")
