"""Where a model with proposals loses: give it the true masks, the true selection, the true objects in turn, and score each.

    python benchmarks/photo_causes.py --model runs/photos --data runs/photos/data --split test --out runs/photos/causes

For a model whose decoder is `instance_selection`. Rows of the table (strict protocol; with several sources their mean, each the same):

- as it is: the model's own answers, with those about the mirror image where it takes them (`predict.mirror`).
- put together: whole regions of the image as it is, resized one by one and then united, as in the other rows. Which of them is the
  model's rule for masks; where it weighs pixels (`answer: overlap`), which are of no region, as many of the best as the count says.
- true masks: what it selected stays selected; a region that overlaps a true object (mask IoU from 0.5, one to one) becomes that object.
- true selection: of its regions those that match the targets, with its own masks. What is lost: detection and masks.
- true selection and masks: those regions become the objects. What is lost: objects that no region has found.
- true objects: its regions are the true boxes, which it reads and does not refine, and it selects among them by the expression;
  a region stands for its object's mask. What is lost: selection, count and "no target".

The last is an approximation: a region's first features come from the cell at its box's centre, the features inside the box from the true
box, and its score as an object is set to sure.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from grex_mllm.config import PROTOCOL_FOLDER
from grex_mllm.data.dataset import FolderDataset
from grex_mllm.data.refs_program import status_of
from grex_mllm.data.transforms import boxes_to_original, mask_to_original
from grex_mllm.errors import fault
from grex_mllm.models.answer import EncodedImage, above_threshold
from grex_mllm.models.decoders.instance_selection.network import THRESHOLD, answer_by_count
from grex_mllm.models.decoders.instance_selection.regions import Regions
from grex_mllm.models.grex import GrexModel
from grex_mllm.ops.boxes import xyxy_to_cxcywh
from grex_mllm.predictors.lines import grounding_fields
from grex_mllm.predictors.protocol import Item
from grex_mllm.score import score
from grex_mllm.types import MORE_THAN_FIVE, Grounding, GroundingOutput, Sample

OVERLAP = 0.5  # mask IoU from which a region has found an object
ROWS = ("as it is", "put together", "true masks", "true selection", "true selection and masks", "true objects")
MEASURES = {"gIoU": "gres.gIoU", "N-acc": "gres.N_acc", "T-acc": "gres.T_acc", "count": "count.accuracy", "Pr@F1": "grec.Pr@F1"}


@dataclass
class Seen:
    """One image: regions and true objects at its own size, and which region has found which object.

    masks: bool [K, H, W].  boxes: float [K, 4] xyxy.  pairs: region -> object.
    """

    masks: np.ndarray
    boxes: np.ndarray
    true_masks: np.ndarray
    true_boxes: np.ndarray
    pairs: dict[int, int] = field(default_factory=dict)

    def region(self, k: int, true: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return mask and box of a region, or, with `true`, of the object that it has found."""
        if true and k in self.pairs:
            return self.true_masks[self.pairs[k]], self.true_boxes[self.pairs[k]]
        return self.masks[k], self.boxes[k]


def main(arguments: list[str] | None = None) -> int:
    """Run the program; a fault of the user's files is one line and status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--data", required=True, type=Path, help="dataset folder")
    parser.add_argument("--split", default="test")
    parser.add_argument("--out", type=Path, required=True, help="folder for the predictions and results of every row")
    parser.add_argument("--limit", type=int, help="only the first images")
    given = parser.parse_args(arguments)
    return status_of("benchmarks/photo_causes.py", lambda: print(run(given.model, given.data, given.split, given.out, given.limit)))


def run(model: str, data: Path, split: str, out: Path, limit: int | None = None) -> str:
    """Write predictions and results of every row into `out` and return the table.

    Raises:
        GrexError: a model without regions, and what reading model and data raises.
    """
    net = GrexModel.from_pretrained(model)
    if net.config.model.decoder.name != "instance_selection":
        raise fault(
            f"{model} with the decoder {net.config.model.decoder.name}", "instance_selection, which has regions", "give another model"
        )
    out.mkdir(parents=True, exist_ok=True)
    source, counted = FolderDataset(data, split, 10**9, num_images=limit), Counter[str]()
    files = {row: out / f"{row.replace(' ', '_')}.jsonl" for row in ROWS}
    opened = {row: path.open("w", encoding="utf-8") for row, path in files.items()}
    for position in range(len(source)):
        for row, line in lines_of(net, source[position], counted):
            opened[row].write(json.dumps(line) + "\n")
    results = {}
    for row, path in files.items():
        opened[row].close()
        results[row] = score(path, data, split, PROTOCOL_FOLDER / "all.yaml", path.with_suffix(".json"), allow_missing=limit is not None)
    found = f"{counted['found']} of {counted['objects']} objects ({100 * counted['found'] / max(1, counted['objects']):.1f} %)"
    return f"{table(results)}\n\n{found} have a region of their own with a mask IoU from {OVERLAP}; {counted['images']} images."


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the measures in Markdown, percent: the mean of the sources, or the whole where there is one source."""
    lines = [["", *MEASURES], ["---", *["---:"] * len(MEASURES)]]
    for row, found in results.items():
        block = found["mean_of_sources"]["strict"] if "mean_of_sources" in found else found["results"]["strict"]
        values = [block[task].get(key) for task, key in (place.split(".") for place in MEASURES.values())]
        lines.append([row, *("-" if value is None else f"{100 * value:.1f}" for value in values)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@torch.inference_mode()
def lines_of(net: GrexModel, sample: Sample, counted: Counter[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (row, prediction line) for every expression of an image."""
    encoded = net.encode(sample.image)
    item = Item(sample.record, Path(sample.record.file), lambda: sample.image, sample.expressions)
    seen = look(encoded, item)
    counted.update(images=1, objects=len(seen.true_masks), found=len(seen.pairs))
    place = {instance.annotation_id: n for n, instance in enumerate(item.instances)}
    output, own = read(net, encoded.features.decoded, sample), net.ground(encoded, [record.raw for record in sample.expressions])
    true_regions = regions_on(net, encoded, seen.true_boxes) if len(seen.true_boxes) else None
    given = None if true_regions is None else read(net, true_regions, sample)
    objects = Seen(seen.true_masks, seen.true_boxes, seen.true_masks, seen.true_boxes)
    for e, record in enumerate(sample.expressions):
        wanted = {place[target] for target in record.targets}
        matched = [k for k, n in seen.pairs.items() if n in wanted]
        made = {
            "as it is": own[e],
            "put together": selected(net, output, e, seen, record.raw, true=False),
            "true masks": selected(net, output, e, seen, record.raw, true=True),
            "true selection": assembled(record.raw, seen, matched, matched, len(matched), none=not wanted, true=False),
            "true selection and masks": assembled(record.raw, seen, matched, matched, len(matched), none=not wanted, true=True),
            "true objects": own[e] if given is None else selected(net, given, e, objects, record.raw, true=False),
        }
        for row, answer in made.items():
            fields = {name: value for name, value in grounding_fields(answer).items() if name not in ("mask_rle_input", "minimap")}
            yield row, {"expression_id": record.expression_id, **fields, "status": "ok"}


def read(net: GrexModel, regions: Regions, sample: Sample) -> GroundingOutput:
    """Let the decoder's language half read the expressions of an image among some regions."""
    ids, mask = net.encode_text([record.raw for record in sample.expressions])
    text = net.grounding.encode_text(ids, mask)
    return net.grounding.decoder.language_part(regions, torch.zeros(len(ids), dtype=torch.int64), text)


def look(encoded: EncodedImage, item: Item) -> Seen:
    """Return an image's regions beside its true objects, paired one to one for the largest sum of mask IoUs."""
    regions, geometry = encoded.features.decoded, encoded.geometry
    masks = mask_to_original(regions.masks()[0], geometry, encoded.canvas).numpy()
    boxes = boxes_to_original(regions.boxes_norm[-1][0].clone(), geometry, encoded.canvas).numpy()
    true = item.masks
    flat, true_flat = masks.reshape(len(masks), -1).astype(np.float32), true.reshape(len(true), -1).astype(np.float32)
    both = flat @ true_flat.T
    iou = both / np.maximum(flat.sum(1)[:, None] + true_flat.sum(1)[None] - both, 1)
    pairs = {int(k): int(n) for k, n in zip(*linear_sum_assignment(-np.where(iou >= OVERLAP, iou, 0)), strict=True) if iou[k, n] >= OVERLAP}
    return Seen(masks, boxes, true, np.asarray([i.box_xyxy for i in item.instances], np.float32).reshape(-1, 4), pairs)


def selected(net: GrexModel, output: GroundingOutput, e: int, seen: Seen, text: str, *, true: bool) -> Grounding:
    """Return the answer of the model's own choices: regions by logits or by the count, boxes by the count, "no target" by its head."""
    logits, rules = output.box_logits[e], net.config.predict
    chosen = logits
    if net.config.model.decoder.answer != THRESHOLD:
        counted = None if output.count_logits is None else output.count_logits[e : e + 1]
        chosen = answer_by_count(logits[None], counted, output.no_target_logits[e : e + 1])[0]
    order = logits.sigmoid().sort(descending=True, stable=True).indices.tolist()
    count = int(output.count_logits[e].argmax())
    above = int((logits.sigmoid() >= rules.box_threshold).sum())
    best = order[: max(MORE_THAN_FIVE, above) if count >= MORE_THAN_FIVE else count]
    none = bool(above_threshold(output.no_target_logits[e][None], rules.no_target_threshold)[0])
    return assembled(text, seen, [k for k in order if chosen[k] > 0], best, count, none=none, true=true)


def assembled(text: str, seen: Seen, chosen: list[int], boxed: list[int], count: int, *, none: bool, true: bool) -> Grounding:
    """Return the answer of chosen regions: the union of their masks, the boxes of some, the count; "nothing" empties all of it."""
    mask = np.zeros(seen.true_masks.shape[1:], bool)
    for k in chosen:
        mask |= seen.region(k, true)[0]
    nothing = none or not mask.any()
    boxes = np.asarray([] if nothing else [seen.region(k, true)[1] for k in boxed], np.float32).reshape(-1, 4)
    mask = np.zeros_like(mask) if nothing else mask
    count = 0 if nothing else min(count, MORE_THAN_FIVE)
    return Grounding(text, mask, None, boxes, np.ones(len(boxes)), count, nothing, float(none), None, none)


def regions_on(net: GrexModel, encoded: EncodedImage, boxes_xyxy: np.ndarray) -> Regions:
    """Return the regions of an image with the true boxes [N, 4] in the place of the model's own."""
    geometry, (height, width) = encoded.geometry, encoded.canvas
    scale = torch.tensor([geometry.scale_x / width, geometry.scale_y / height] * 2, dtype=torch.float32)
    margin = torch.tensor([geometry.left / width, geometry.top / height] * 2, dtype=torch.float32)
    boxes = xyxy_to_cxcywh(torch.from_numpy(boxes_xyxy) * scale + margin)[None].to(net.device)
    return net.grounding.decoder.known(encoded.features, boxes)


if __name__ == "__main__":
    sys.exit(main())
