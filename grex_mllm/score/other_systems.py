"""Files that the public code of segmentation MLLMs and detectors writes -> prediction lines, as far as that code is known.

- LISA (dvlab-research/LISA, `chat.py`): `<name of the picture>_mask_<i>.jpg`, one for each [SEG], 100 = target. A later question about a
  picture of the same name overwrites them: give each expression a copy of the picture whose name is the expression's id. Nothing is written
  where no [SEG] came, and JPEG bends edges by a pixel.
- GLaMM (mbzuai-oryx/groundingLMM, `eval/gcg/infer.py`) and Sa2VA (bytedance/Sa2VA, `sa2va_eval_gcg.py`): `<name>.json` for each picture,
  {"image_id", "caption", "phrases", "pred_masks": [RLE]}. No masks = "no target".
- Grounded SAM 2 (IDEA-Research/Grounded-SAM-2, DUMP_JSON_RESULTS): {"image_path", "annotations": [{"class_name", "bbox" xyxy,
  "segmentation" RLE, "score"}], "box_format", "img_width", "img_height"}; name the file `<expression id>.json`.

GSVA, the referring segmentation of GLaMM and Sa2VA, and Grounding DINO write numbers or pictures, but no masks or boxes. Region captions of
GLaMM and Sa2VA are named by ids of their own annotation files: not read.
"""

from __future__ import annotations

import json
import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from grex_mllm.errors import fault
from grex_mllm.ops.masks import encode_rle
from grex_mllm.ops.rle import check_rle, union

LISA_MASK = re.compile(r"(.+)_mask_(\d+)\.jpe?g")
LISA_PICTURE = re.compile(r".+_masked_img_\d+\.jpe?g")
LISA_MIDDLE = 50  # between 0 and the 100 of a target
GCG_FIELDS = {"image_id", "caption", "phrases", "pred_masks"}
DETECTION_FIELDS = {"image_path", "annotations", "box_format", "img_width", "img_height"}


def lines_of_folder(folder: Path) -> tuple[Iterator[dict[str, Any]], str] | None:
    """Return the prediction lines of a folder and what it holds; None where none of these systems wrote it.

    Raises (the iterator, too):
        GrexError: a file that is not what the format says.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if any(LISA_MASK.fullmatch(file.name) for file in files):
        return _from_lisa(folder, files), "LISA's masks"
    if files and all(file.suffix.lower() == ".json" for file in files):
        return (_from_json(file, folder) for file in files), "JSON files of GLaMM, Sa2VA or Grounded SAM 2"
    return None


def _from_lisa(folder: Path, files: list[Path]) -> Iterator[dict[str, Any]]:
    from PIL import Image, UnidentifiedImageError

    masks: dict[str, np.ndarray] = {}
    for file in files:
        found = LISA_MASK.fullmatch(file.name)
        if found is None:
            if LISA_PICTURE.fullmatch(file.name):
                continue
            raise fault(f"{file} among LISA's masks", "<expression id>_mask_<i>.jpg and _masked_img_<i>.jpg", "remove it")
        try:
            with Image.open(file) as picture:
                mask = np.asarray(picture.convert("L")) >= LISA_MIDDLE
        except (UnidentifiedImageError, OSError) as error:
            raise fault(f"{file} cannot be read ({error})", "a JPEG mask", "write it again") from None
        key = _key(file.with_name(found[1] + ".jpg"), folder)
        if key in masks and masks[key].shape != mask.shape:
            raise fault(f"{file} of size {mask.shape}", f"{masks[key].shape}, as the first mask of {key}", "remove masks of other pictures")
        masks[key] = masks[key] | mask if key in masks else mask
    for key, mask in masks.items():
        yield {"expression_id": key, "mask_rle": encode_rle(mask)}


def _from_json(file: Path, folder: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise fault(f"{file} is not JSON ({error})", "an object of GLaMM, Sa2VA or Grounded SAM 2", "write it again") from None
    fields = set(value) if isinstance(value, dict) else set()
    if fields >= GCG_FIELDS - {"caption", "phrases"} and fields <= GCG_FIELDS and isinstance(value["pred_masks"], list):
        return {"expression_id": _key(file, folder), "mask_rle": _union(value["pred_masks"])}
    if fields >= {"annotations", "box_format"} and fields <= DETECTION_FIELDS and isinstance(value["annotations"], list):
        return {"expression_id": _key(file, folder)} | _detections(file, value)
    expected = f"{', '.join(sorted(GCG_FIELDS))}, or {', '.join(sorted(DETECTION_FIELDS))}"
    raise fault(f"{file} with {', '.join(sorted(fields)) or 'no fields'}", expected, "see eval/README.md")


def _detections(file: Path, value: dict[str, Any]) -> dict[str, Any]:
    if value["box_format"] != "xyxy":
        raise fault(f"{file}: box_format {value['box_format']!r}", "xyxy", "write the boxes so")
    boxes, scores, masks = [], [], []
    for row in value["annotations"]:
        box: Any = row.get("bbox") if isinstance(row, dict) else None
        score: Any = row.get("score", 1.0) if isinstance(row, dict) else None
        score = score[0] if isinstance(score, list) and len(score) == 1 else score  # as SAM's own scores come
        if not isinstance(box, list) or len(box) != 4 or not all(type(v) in (int, float) for v in [*box, score]):
            raise fault(f"{file}: annotation {str(row)[:100]!r}", "bbox [x1, y1, x2, y2] and a score", "fix it")
        boxes.append([float(v) for v in box])
        scores.append(float(score))
        masks += [row["segmentation"]] if row.get("segmentation") is not None else []
    return {"boxes_xyxy": boxes, "box_scores": scores, "mask_rle": _union(masks)}


def _union(masks: list[Any]) -> dict[str, Any] | None:
    if not masks:
        return None
    merged = union([check_rle(mask) for mask in masks])
    counts = merged["counts"]
    return {"size": list(merged["size"]), "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}


def _key(file: Path, folder: Path) -> str:
    return urllib.parse.unquote(file.relative_to(folder).with_suffix("").as_posix())
