"""Other systems' files -> lines of predictions.jsonl, written to a temporary file that the one scorer then reads.

- `*.jsonl`: our predictions, no conversion.
- `*.json`: COCO results, a list of {"expression_id" or "image_id", "bbox" [x, y, w, h], "score", "segmentation" (RLE)}. The rows of one
  expression are its boxes and the union of its masks. An image_id must be an expression id (layout of MDETR and gRefCOCO). A row without
  bbox and segmentation says "nothing there"; an expression without a row is missing.
- a folder: PNG masks `<expression id>.png`, also percent-quoted or nested (`video/expression/frame.png`: submissions to MeViS and
  Ref-YouTube-VOS). Not 0 = target, all 0 = "no target".
- a folder that LISA, GLaMM, Sa2VA or Grounded SAM 2 wrote: see `other_systems.py`.
- `*.pth`: ReLA's `ref_seg_predictions.pth`, {img_id, sent, pred_mask, pred_nt} each, loaded weights-only. Masks at the input size become
  `mask_rle_input`, and `mask_rle` by nearest neighbour.
"""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from grex_mllm.errors import GrexError, fault
from grex_mllm.ops.masks import encode_rle, resize_mask_nearest
from grex_mllm.ops.rle import check_rle, union
from grex_mllm.score.other_systems import lines_of_folder
from grex_mllm.score.truth import TruthFolder

COCO_KEYS = {"expression_id", "image_id", "category_id", "bbox", "score", "segmentation", "id", "area", "iscrowd"}
FORMATS = "our .jsonl, COCO results .json, a folder of PNG masks (or of LISA, GLaMM, Sa2VA, Grounded SAM 2), or ReLA's .pth"


def as_jsonl(path: Path, truth: TruthFolder, folder: Path, notes: list[str]) -> Path:
    """Return a file of our prediction lines: `path` itself, or a conversion inside `folder` (what was done goes into notes).

    Raises:
        GrexError: an unknown kind of file, or content that is not what the format says.
    """
    if path.suffix == ".jsonl" and path.is_file():
        return path
    if path.is_dir():
        lines, words = lines_of_folder(path) or (_from_pngs(path), "a folder of PNG masks")
    elif path.suffix == ".json" and path.is_file():
        lines, words = _from_coco(path), "COCO results"
    elif path.suffix in (".pth", ".pt") and path.is_file():
        lines, words = _from_rela(path, truth, notes), "ReLA's predictions"
    elif not path.exists():
        raise fault(f"predictions {path} do not exist", FORMATS, "give the path of the predictions")
    else:
        raise fault(f"predictions {path} of an unknown kind", FORMATS, "convert them to predictions.jsonl")
    out = folder / f"{path.stem}.converted.jsonl"
    count = 0
    with out.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            count += 1
    notes.append(f"{path.name}: read as {words}, {count} expressions")
    return out


def _from_coco(path: Path) -> Iterator[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise GrexError(f"{path} is not JSON ({error}); expected COCO results, a list; write the file again") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise fault(f"{path} holding no list of objects", "COCO results: a list of objects", f"give {FORMATS}")
    unknown = sorted({key for row in rows for key in row} - COCO_KEYS)
    if unknown:
        raise fault(f"{path} with fields {', '.join(unknown)}", f"those of COCO results: {', '.join(sorted(COCO_KEYS))}", "remove them")
    grouped: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        key = row.get("expression_id", row.get("image_id"))
        if key is None:
            raise fault(f"{path}: a row without expression_id or image_id", "one of them", "add the expression's id")
        grouped.setdefault(str(key), []).append(row)
    has_boxes, has_masks = (any(row.get(name) is not None for row in rows) for name in ("bbox", "segmentation"))
    for key, found in grouped.items():
        line: dict[str, Any] = {"expression_id": key}
        if has_boxes:
            boxes = [row for row in found if row.get("bbox") is not None]
            line["boxes_xyxy"] = [_xyxy(row["bbox"], path) for row in boxes]
            line["box_scores"] = [float(row.get("score", 1.0)) for row in boxes]
        if has_masks:
            codes = [check_rle(row["segmentation"]) for row in found if row.get("segmentation") is not None]
            merged = union(codes) if codes else None
            line["mask_rle"] = merged if merged is None else {"size": list(merged["size"]), "counts": _text(merged["counts"])}
        yield line


def _xyxy(box: Any, path: Path) -> list[float]:
    if not isinstance(box, list) or len(box) != 4 or not all(type(v) in (int, float) for v in box):
        raise fault(f"{path}: bbox {box!r}", "[x, y, width, height]", "fix the row")
    return [float(box[0]), float(box[1]), float(box[0] + box[2]), float(box[1] + box[3])]


def _text(counts: str | bytes) -> str:
    return counts.decode("ascii") if isinstance(counts, bytes) else counts


def _from_pngs(folder: Path) -> Iterator[dict[str, Any]]:
    from PIL import Image, UnidentifiedImageError

    files = sorted(folder.rglob("*"))
    strange = [file for file in files if file.is_file() and file.suffix.lower() != ".png"]
    if strange:
        names = ", ".join(str(f.relative_to(folder)) for f in strange[:5])
        raise fault(f"{folder} with {len(strange)} files that are no PNG (first: {names})", "PNG masks only", "remove them")
    for file in files:
        if file.is_file():
            try:
                with Image.open(file) as picture:
                    pixels = np.asarray(picture)
            except (UnidentifiedImageError, OSError) as error:
                raise fault(f"{file} cannot be read ({error})", "a PNG mask", "write it again") from None
            mask = pixels != 0 if pixels.ndim == 2 else (pixels[..., :3] != 0).any(-1)
            key = urllib.parse.unquote(file.relative_to(folder).with_suffix("").as_posix())
            yield {"expression_id": key, "mask_rle": encode_rle(mask)}


def _from_rela(path: Path, truth: TruthFolder, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Match by (image, sentence): ReLA's file names expressions by neither id nor order."""
    rows = _load_weights_only(path)
    if not isinstance(rows, list) or not all(isinstance(r, dict) and {"img_id", "sent", "pred_mask", "pred_nt"} <= r.keys() for r in rows):
        raise fault(f"{path} without img_id, sent, pred_mask, pred_nt", "ReLA's ref_seg_predictions.pth", f"give {FORMATS}")
    waiting: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        waiting.setdefault((str(row["img_id"]).lstrip("0"), row["sent"]), []).append(row)
    for record in truth.expressions():
        found = next((f for text in (record.raw, record.expression) if (f := waiting.get((record.image_id.lstrip("0"), text)))), None)
        if found:
            row = found.pop(0)
            image = truth.image(record.image_id)
            mask = np.asarray(row["pred_mask"]) != 0
            yield {
                "expression_id": record.expression_id,
                "mask_rle": encode_rle(resize_mask_nearest(mask, image.height, image.width)),
                "mask_rle_input": encode_rle(mask),
                "no_target": bool(row["pred_nt"]),
            }
    left = sum(map(len, waiting.values()))
    if left:
        some = ", ".join(f"{key[0]}: {key[1]!r}" for key, found in waiting.items() if found)[:300]
        raise fault(
            f"{path}: {left} predictions match no expression of split {truth.split} (first: {some})", "the same split", "check --split"
        )
    notes.append(f"{path.name}: masks were at the model's input size; strict uses them resized by nearest neighbour")


def _load_weights_only(path: Path) -> Any:
    import pickle

    import torch

    kinds = [np.dtype, np.ndarray, type(np.dtype(np.int8)), type(np.dtype(np.uint8)), type(np.dtype(bool)), type(np.dtype(np.int64))]
    rebuild = np.zeros(1).__reduce__()[0]  # NumPy's own function; its module differs between versions
    safe: list[Any] = [*kinds, rebuild, (rebuild, "numpy.core.multiarray._reconstruct")]
    try:
        with torch.serialization.safe_globals(safe):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise fault(f"{path} is no plain torch file ({reason})", "tensors, arrays and plain containers", f"give {FORMATS}") from None
