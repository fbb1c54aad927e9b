"""Label Studio, both ways: predictions as pre-annotations, and what people made of them as a dataset folder.

A task is an image with one expression. Each object is a region of its own: a brush stroke where there is a mask, else a rectangle. People
change, add and remove regions, polygons too; a task that they submit without any says that the expression has no target.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from grex_mllm.data.records import Dataset, load_dataset
from grex_mllm.data.writing import DatasetWriter
from grex_mllm.errors import GrexError, fault
from grex_mllm.exchange.brush import decode_brush, encode_brush
from grex_mllm.exchange.found import Found, line_objects, open_answers
from grex_mllm.ops.masks import encode_rle, mask_to_box_xyxy, segmentation_to_mask
from grex_mllm.types import ExpressionRecord, ImageRecord, Instance
from grex_mllm.writing import whole_file

LABEL = "target"
KINDS = {"brushlabels": "mask", "polygonlabels": "outline", "rectanglelabels": "box"}  # kind of a region -> name of its control
LOCAL_FILES = "/data/local-files/?d="  # how Label Studio serves a folder of its own machine
INTERFACE = """<View>
  <Text name="expression" value="$expression"/>
  <Image name="image" value="$image" zoom="true"/>
  <BrushLabels name="mask" toName="image"><Label value="target" background="#d9480f"/></BrushLabels>
  <PolygonLabels name="outline" toName="image"><Label value="target" background="#d9480f"/></PolygonLabels>
  <RectangleLabels name="box" toName="image"><Label value="target" background="#d9480f"/></RectangleLabels>
</View>
"""
MAX_BYTES = 2_000_000_000


def write_tasks(predictions: str, data: str, out: str) -> list[str]:
    """Write tasks with pre-annotations, and the labelling interface beside them (x.xml); return lines to print.

    Raises:
        GrexError: files of another form, or predictions of no expression of the dataset folder.
    """
    answers, dataset = open_answers(predictions, data)
    tasks = []
    for record in dataset.expressions:
        line = answers.find(record.expression_id)
        if line is not None:
            tasks.append(task_of(record, dataset.images[record.image_id], line))
    answers.close()
    with whole_file(out) as work:
        work.write_text(json.dumps(tasks, ensure_ascii=False), encoding="utf-8")
    interface = Path(out).with_suffix(".xml")
    with whole_file(interface) as work:
        work.write_text(INTERFACE, encoding="utf-8")
    return [f"{out}: {len(tasks)} tasks with pre-annotations", f"{interface}: the labelling interface"]


def task_of(record: ExpressionRecord, image: ImageRecord, line: dict[str, Any]) -> dict[str, Any]:
    """Return one task of a grounding line."""
    regions = [_region(i, found, image) for i, found in enumerate(line_objects(line))]
    data = {"image": LOCAL_FILES + quote(image.file), "expression": record.expression}
    data |= {"expression_id": record.expression_id, "image_id": record.image_id}
    surest = line.get("no_target_prob")
    score = {} if surest is None else {"score": round(max(float(surest), 1 - float(surest)), 4)}
    return {"data": data, "predictions": [{"model_version": "grex_mllm", "result": regions, **score}]}


def _region(number: int, found: Found, image: ImageRecord) -> dict[str, Any]:
    if found.mask is not None:
        kind = "brushlabels"
        value: dict[str, Any] = {"format": "rle", "rle": encode_brush(found.mask)}
    else:
        assert found.box_xyxy is not None
        x1, y1, x2, y2 = found.box_xyxy
        place = {"x": x1 / image.width, "y": y1 / image.height, "width": (x2 - x1) / image.width, "height": (y2 - y1) / image.height}
        kind = "rectanglelabels"
        value = {name: 100 * share for name, share in place.items()} | {"rotation": 0}
    sizes = {"original_width": image.width, "original_height": image.height, "image_rotation": 0}
    scored = {} if found.score is None else {"score": round(found.score, 4)}
    return {
        "id": f"r{number}",
        "type": kind,
        "from_name": KINDS[kind],
        "to_name": "image",
        **sizes,
        "value": {**value, kind: [LABEL]},
        **scored,
    }


def read_annotations(export: str, data: str, out: str) -> list[str]:
    """Write what people submitted as a dataset folder, with the images and expressions of `data`; return lines to print.

    The last submitted annotation of a task counts. Tasks without one, or skipped, are left out and counted. Regions of one image that hold
    the same pixels are one object, of all its expressions.

    Raises:
        GrexError: not Label Studio's JSON, a task of no expression of the folder, or a region of another form.
    """
    dataset = load_dataset(data)
    known = {record.expression_id: record for record in dataset.expressions}
    images: dict[str, ImageRecord] = {}
    expressions: list[ExpressionRecord] = []
    left_out = 0
    for number, task in enumerate(_tasks(export)):
        where = f"{export}, task {number}"
        given = task.get("data") if isinstance(task.get("data"), dict) else {}
        record = known.get(str(given.get("expression_id")))  # type: ignore[union-attr]
        if record is None:
            raise fault(f"{where} of expression {given.get('expression_id')!r}", f"an expression of {data}", "give its dataset folder")  # type: ignore[union-attr]
        done = [a for a in task.get("annotations") or [] if isinstance(a, dict) and not a.get("was_cancelled")]
        if not done:
            left_out += 1
            continue
        old = dataset.images[record.image_id]
        image = images.setdefault(record.image_id, ImageRecord(old.image_id, old.file, old.height, old.width))
        try:
            targets = [_place(image, found) for found in _objects(done[-1].get("result"), image)]
        except GrexError as error:
            raise GrexError(f"{where}: {error}") from None
        fields = {**vars(record), "targets": list(dict.fromkeys(targets)), "source": "label_studio"}
        expressions.append(ExpressionRecord(**fields))
    _write(dataset, images, expressions, out)
    note = f", {left_out} tasks without a submitted annotation left out" if left_out else ""
    return [f"{out}: {len(expressions)} expressions of {len(images)} images{note}"]


def _tasks(export: str) -> list[dict[str, Any]]:
    path = Path(export)
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise fault(f"{export} is no file of at most {MAX_BYTES:,} bytes", "Label Studio's JSON export", "export the project as JSON")
    try:
        tasks = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise fault(f"{export} is not JSON ({error})", "Label Studio's JSON export", "export the project as JSON") from None
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise fault(f"{export} holding no list of tasks", "Label Studio's JSON export", "export as JSON, not JSON-MIN or COCO")
    return tasks


def _objects(result: Any, image: ImageRecord) -> list[Instance]:
    if not isinstance(result, list) or not all(isinstance(region, dict) for region in result):
        raise fault("an annotation without a list of regions", "`result`", "export the project as JSON")
    found = []
    for region in result:
        kind, value = region.get("type"), region.get("value")
        if kind not in KINDS or not isinstance(value, dict):
            raise fault(f"a region of type {kind!r}", ", ".join(KINDS), "use the labelling interface that grex wrote")
        if (region.get("original_width"), region.get("original_height")) != (image.width, image.height):
            size = f"{region.get('original_height')}x{region.get('original_width')}"
            raise fault(f"a region on an image of {size}", f"{image.height}x{image.width}", "give the image that the dataset names")
        found.append(_instance(str(kind), value, image))
    return found


def _instance(kind: str, value: dict[str, Any], image: ImageRecord) -> Instance:
    """Return the object of a region; its id is set later. A brush stroke without a pixel is refused, as a mistake."""
    if kind == "rectanglelabels":
        x, y, width, height = (_number(value.get(name)) for name in ("x", "y", "width", "height"))
        if value.get("rotation"):
            raise fault("a rotated rectangle", "upright ones", "draw a polygon instead")
        box = np.array([x, y, x + width, y + height]) / 100 * [image.width, image.height, image.width, image.height]
        return Instance("", LABEL, box.clip(0, [image.width, image.height, image.width, image.height]).tolist())
    if kind == "polygonlabels":
        points = value.get("points")
        if not isinstance(points, list) or len(points) < 3 or not all(isinstance(p, list) and len(p) == 2 for p in points):
            raise fault("a polygon without three points", "[[x, y], ...] in percent", "draw it again")
        flat = [_number(v) / 100 * side for point in points for v, side in zip(point, (image.width, image.height), strict=True)]
        segmentation: Any = [flat]
        mask = segmentation_to_mask(segmentation, image.height, image.width)
    else:
        mask = decode_brush(value.get("rle"), image.height, image.width)  # type: ignore[arg-type]
        segmentation = encode_rle(mask)
    if not mask.any():
        raise fault("a region without a pixel", "at least one", "remove it, or draw it again")
    return Instance("", LABEL, mask_to_box_xyxy(mask), segmentation)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise fault(f"a place of {value!r}", "a number, in percent", "export the project as JSON")
    return float(value)


def _place(image: ImageRecord, found: Instance) -> str:
    """Put an object among those of its image, unless it is there already, and return its id."""
    for other in image.instances:
        if other.segmentation == found.segmentation and np.allclose(other.box_xyxy, found.box_xyxy, atol=1e-6):
            return other.annotation_id
    found.annotation_id = f"{image.image_id}-{len(image.instances)}"
    image.instances.append(found)
    return found.annotation_id


def _write(dataset: Dataset, images: dict[str, ImageRecord], expressions: list[ExpressionRecord], out: str) -> None:
    with DatasetWriter(out) as writer:
        writer.add_images(images.values())
        writer.add_expressions(expressions)
        root = os.path.relpath(dataset.image_root, Path(out).absolute())
        writer.set_info({"name": f"{dataset.name}-corrected", "image_root": Path(root).as_posix()})
