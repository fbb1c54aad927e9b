"""Ground expressions in an image with the graphs of this folder, without torch: numpy, PIL, onnxruntime and tokenizers.

python ground.py photo.jpg "the two people on the left" "the dog" --out answers
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tokenizers import Tokenizer


def onnx_graphs(folder, facts):
    """Return name -> function from named arrays to named arrays."""
    import onnxruntime

    sessions = {name: onnxruntime.InferenceSession(str(folder / f"{name}.onnx")) for name in facts["graphs"]}

    def runner(name):
        given, answers = facts["graphs"][name]["inputs"], facts["graphs"][name]["outputs"]
        return lambda arrays: dict(zip(answers, sessions[name].run(answers, {key: arrays[key] for key in given})))

    return {name: runner(name) for name in sessions}


class Model:
    """The model of an exported folder. `ground` answers expressions at the image's own size."""

    def __init__(self, folder=Path(__file__).parent, graphs=onnx_graphs):
        self.facts = json.loads((Path(folder) / "export.json").read_text(encoding="utf-8"))
        self.graphs, self.tokenizer = graphs(Path(folder), self.facts), Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()

    def ground(self, image, expressions, size=None):
        """Return a dictionary for each expression. image: PIL or a file.  size: of the network's input, where export.json lets it vary."""
        pixels, place = self.network_input(upright(image), size or self.facts["image_size"])
        arrays, results = {"image": pixels}, []
        if "image" in self.graphs:
            arrays = self.graphs["image"](arrays)
        step = self.facts["expressions_at_once"]
        for start in range(0, len(expressions), step):
            given = arrays | self.tokens(expressions[start : start + step])
            answers = self.graphs["language" if "language" in self.graphs else "whole"](given)
            for row in range(len(given["text_ids"])):
                results.append(self.answer({name: value[row] for name, value in answers.items()}, place, pixels.shape[-2:]))
        return [{"expression": text, **result} for text, result in zip(expressions, results)]

    def network_input(self, image, size):
        """Return the normalised image float32 [1, 3, H, W], and (H0, W0, rows, columns, top, left): how it lies in there."""
        resize, (width, height) = self.facts["resize"], image.size
        factor = size / max(height, width)
        rows, columns = (size, size) if resize == "squash" else (max(1, round(side * factor)) for side in (height, width))
        top, left = ((size - rows) // 2, (size - columns) // 2) if resize == "letterbox" else (0, 0)
        inner = np.asarray(image.resize((columns, rows), Image.Resampling.BILINEAR) if (columns, rows) != image.size else image)
        canvas = np.full((size, size, 3), 128 if resize == "letterbox" else 0, np.uint8)
        canvas[top : top + rows, left : left + columns] = inner
        mean, std = (np.array(self.facts[name], np.float32)[:, None, None] for name in ("mean", "std"))
        x = (canvas.astype(np.float32).transpose(2, 0, 1) - mean) / std
        if resize == "pad":
            x[:, rows:], x[:, :, columns:] = 0, 0
        more = -size % self.facts["stride"]
        return np.pad(x, ((0, 0), (0, more), (0, more)))[None], (height, width, rows, columns, top, left)

    def tokens(self, expressions):
        """Return text_ids and text_mask, int64 [E, L]."""
        rows = [code.ids[: self.facts["max_tokens"]] for code in self.tokenizer.encode_batch(list(expressions))]
        length = max(map(len, rows)) if self.facts["pad"] == "longest" else self.facts["max_tokens"]
        ids = np.array([row + [0] * (length - len(row)) for row in rows], np.int64)
        return {"text_ids": ids, "text_mask": np.array([[i < len(row) for i in range(length)] for row in rows], np.int64)}

    def answer(self, logits, place, canvas):
        """Decide as the model's configuration (`predict`) says."""
        rules = self.facts["rules"]
        mask = np.zeros(place[:2], bool)
        if rules["masks"]:
            shift = math.log(rules["mask_threshold"]) - math.log1p(-rules["mask_threshold"])
            mask = at_image(logits["mask_logits"][1] - logits["mask_logits"][0] - np.float32(shift), place, canvas) > 0
        by_pixels = rules["no_target"] == "pixels" or ("no_target_logits" not in logits and rules["masks"])
        probability, nothing = float(mask.sum() < rules["min_mask_pixels"]), bool(mask.sum() < rules["min_mask_pixels"])
        if not by_pixels:
            ahead = float(np.diff(logits.get("no_target_logits", np.array([1.0, -1e9])).astype(np.float64))[0])
            limit = rules["no_target_threshold"]
            probability = 0.5 * (1 + math.tanh(ahead / 2))
            nothing = limit == 0 if limit in (0, 1) else ahead > math.log(limit) - math.log1p(-limit)
        nothing = nothing or bool(rules["masks"] and not mask.any())
        boxes, scores, count = self.boxes(logits, place, canvas)
        if nothing:
            mask, count, boxes, scores = np.zeros_like(mask), count and 0, boxes and [], scores and []
        return {
            "no_target": nothing,
            "no_target_prob": probability,
            "count": count,
            "boxes_xyxy": boxes,
            "box_scores": scores,
            "mask": mask,
        }

    def boxes(self, logits, place, canvas):
        """Return boxes in pixels, best first, their scores, and the count (6: more than five); None for what the model has no head for."""
        rules, (height, width, rows, columns, top, left) = self.facts["rules"], place
        counted = int(logits["count_logits"].argmax()) if "count_logits" in logits else None
        if "boxes_norm" not in logits:
            return None, None, counted
        scores = 1 / (1 + np.exp(-logits["box_logits"]))
        order = np.argsort(-scores, kind="stable")
        above = int((scores >= rules["box_threshold"]).sum())
        count = counted if counted is not None else min(above, 6)
        best = max(6, above) if count >= 6 else count
        order = order[: {"count": best, "threshold": above, "both": min(best, above)}[rules["boxes"]]]
        x, y, w, h = logits["boxes_norm"][order].T
        sides = np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], axis=-1)
        sides[:, 0::2] = (sides[:, 0::2] * canvas[1] - left) * width / columns
        sides[:, 1::2] = (sides[:, 1::2] * canvas[0] - top) * height / rows
        return sides.clip(0, [width, height, width, height]).tolist(), scores[order].tolist(), count


def upright(image):
    """Return the RGB picture of a file or a PIL image as a viewer shows it: turned as its camera says, transparent pixels over white."""
    image = ImageOps.exif_transpose(image if isinstance(image, Image.Image) else Image.open(image))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer)
    return image.convert("RGB")


def at_image(values, place, canvas):
    """Resample values [h, w] over the network's input to the image's own size, bilinear."""
    height, width, rows, columns, top, left = place
    low, high, share = cells(height, rows, canvas[0], values.shape[0], top)
    values = values[low] * (1 - share)[:, None] + values[high] * share[:, None]
    low, high, share = cells(width, columns, canvas[1], values.shape[1], left)
    return values[:, low] * (1 - share) + values[:, high] * share


def cells(original, valid, total, number, margin):
    """Return for each pixel of the original its two neighbouring cells and the share of the second."""
    first, last = margin * number // total, max(0, -(-(margin + valid) * number // total) - 1)
    where = (np.arange(original) + 0.5) * (valid / original * number / total) - 0.5
    where = (where + margin * number / total).clip(first, last)
    low = np.floor(where).astype(np.int64)
    return low, (low + 1).clip(max=last), (where - low).astype(np.float32)


def main(graphs=onnx_graphs):
    """Ground the expressions of the command line, print JSON, and write a mask PNG for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image")
    parser.add_argument("expression", nargs="+")
    parser.add_argument("--out", default=".")
    given = parser.parse_args()
    Path(given.out).mkdir(parents=True, exist_ok=True)
    for number, result in enumerate(Model(graphs=graphs).ground(given.image, given.expression)):
        file = Path(given.out) / f"{Path(given.image).stem}.{number}.mask.png"
        Image.fromarray(result.pop("mask")).save(file)
        print(json.dumps(result | {"mask": str(file)}, ensure_ascii=False))


if __name__ == "__main__":
    main()
