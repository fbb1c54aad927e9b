"""What `grex search` does: rank, ground the images that are shown, draw them on a contact sheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from grex_mllm.draw import add_caption, contact_sheet, enlarge_factor, overlay, save_png
from grex_mllm.errors import GrexError, fault
from grex_mllm.ops.masks import resize_mask_nearest
from grex_mllm.search.folder import short_reason
from grex_mllm.search.index import Hit, SearchIndex, open_index
from grex_mllm.types import MORE_THAN_FIVE, Grounding

SHOWN_SIDE = 384  # longer side of a picture on the sheet
MAX_TOP = 200
COLUMNS = 4


def run_search(
    model: str, images: str, expressions: Sequence[str], *, index: str | None, top: int, out: Path, device: str, rebuild: bool
) -> dict[str, Any]:
    """Search, write a contact sheet for each expression, and return what is printed.

    Raises:
        GrexError: what `open_index` and `SearchIndex.search` raise, or `top` outside 1 to 200.
    """
    if not 1 <= top <= MAX_TOP:
        raise fault(f"--top {top}", f"1 to {MAX_TOP}", "give a number of images that a sheet can show")
    opened = open_index(model, images, index, device=device, rebuild=rebuild)
    answers = []
    for number, (expression, found) in enumerate(zip(expressions, map(opened.found, expressions), strict=True)):
        sheet = out if len(expressions) == 1 else out.with_name(f"{out.stem}.{number}{out.suffix}")
        shown = [_show(opened, hit, expression, place + 1) for place, hit in enumerate(found[:top])]
        save_png(contact_sheet([picture for picture, _ in shown if picture is not None], COLUMNS), sheet)
        results = [line for _, line in shown]
        answers.append({"expression": expression, "num_found": len(found), "sheet": str(sheet), "results": results})
    refused = opened.updated.refused if opened.updated is not None else {}
    return {"images": images, "num_images": len(opened), "refused": refused, "answers": answers}


def _show(opened: SearchIndex, hit: Hit, expression: str, place: int) -> tuple[Image.Image | None, dict[str, Any]]:
    """Ground an image as a whole; return its picture for the sheet and its line. A file that changed meanwhile has no picture."""
    numbers = {name: round(getattr(hit, name), 4) for name in ("score", "no_target_prob", "region_score")}
    line: dict[str, Any] = {"rank": place, "file": hit.file, **numbers}
    try:
        pixels = opened.read(hit.file)
        result: Grounding = opened.model.ground(pixels, expression)
    except (GrexError, OSError) as error:
        return None, line | {"error": short_reason(error)}
    line["count"] = "more than 5" if result.count is not None and result.count >= MORE_THAN_FIVE else result.count
    line["boxes_xyxy"] = None if result.boxes_xyxy is None else np.round(result.boxes_xyxy.astype(float), 1).tolist()
    line["mask_pixels"] = int(result.mask.sum())
    return add_caption(picture_of(pixels, result), f"{place}. {hit.file}  {hit.score:.2f}"), line


def picture_of(pixels: np.ndarray, result: Grounding) -> Image.Image:
    """Draw an answer on an image, scaled so that its longer side comes near SHOWN_SIDE."""
    height, width = pixels.shape[:2]
    share = min(1.0, SHOWN_SIDE / max(height, width))
    small = max(1, round(height * share)), max(1, round(width * share))
    mask, boxes = result.mask, result.boxes_xyxy
    if share < 1.0:
        pixels = np.asarray(Image.fromarray(pixels).resize((small[1], small[0]), Image.Resampling.BILINEAR))
        mask = resize_mask_nearest(mask, *small)
        boxes = None if boxes is None else boxes * np.tile([small[1] / width, small[0] / height], 2)
    factor = enlarge_factor(pixels.shape[0], pixels.shape[1], SHOWN_SIDE)
    return overlay(pixels, mask, () if boxes is None else boxes, result.count, no_target=result.no_target, factor=factor)
