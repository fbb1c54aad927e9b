"""Describe objects of an image with the graphs of this folder, without torch: numpy, PIL, onnxruntime and tokenizers.

python describe.py photo.jpg --mask left.png --mask right.png --beside dog.png
"""

import argparse
from pathlib import Path

import numpy as np
from ground import Model, at_image, onnx_graphs, upright
from PIL import Image
from tokenizers import Tokenizer


class Describer:
    """The generator of an exported folder. `describe` writes one expression for each set of objects, the likeliest token at each step."""

    def __init__(self, folder=Path(__file__).parent):
        self.grounding = Model(folder)
        self.facts = self.grounding.facts["generator"]
        self.graphs = onnx_graphs(Path(folder), self.facts)
        self.tokenizer = Tokenizer.from_file(str(Path(folder) / "lm_tokenizer.json"))

    def describe(self, image, masks, sets=None, size=None):
        """Return an expression for each set. masks: bool [H, W] of objects, at the image's size.  sets: positions in masks, for each set
        (None: all of them are one set); what a set leaves out, and what the model finds, stands beside it.  size: as in `Model.ground`."""
        size = size or self.grounding.facts["image_size"]
        pixels, place = self.grounding.network_input(upright(image), size)
        sets, given = [range(len(masks))] if sets is None else sets, self.graphs["see"]({"image": pixels})
        known = self.with_found([np.asarray(mask, bool) for mask in masks], given, place, pixels.shape[-2:])
        given["masks"] = np.stack([network_mask(mask, place, size) for mask in known])
        given["chosen"] = np.array([[n in positions for n in range(len(known))] for positions in map(set, sets)])
        given["seen"] = np.array([place[2:4] if self.grounding.facts["resize"] == "pad" else (size, size)], np.int64)
        tokens = self.write(given)
        ends = [row.index(self.facts["eos"]) if self.facts["eos"] in row else len(row) for row in tokens]
        return [self.tokenizer.decode(row[:end]).strip() for row, end in zip(tokens, ends)]

    def with_found(self, masks, given, place, canvas):
        """Return the masks and those of the objects that the model finds beside them, surest first."""
        known, scores = list(masks), given.get("object_scores", np.zeros(0))
        for n in np.argsort(-scores, kind="stable"):
            mask = at_image(given["object_logits"][n], place, canvas) > 0
            least = [max(1, min(mask.sum(), other.sum())) * self.facts["most_overlap"] for other in known]
            if scores[n] >= self.facts["least_score"] and mask.any() and all((mask & k).sum() < most for k, most in zip(known, least)):
                known.append(mask)
        return known

    def write(self, arrays):
        """Return a list of tokens for each set: the likeliest at each step; what stands behind the first end means nothing."""
        out, rows = self.graphs["prefix"](arrays), []
        for step in range(self.facts["max_new_tokens"]):
            out["logits"][:, self.facts["banned"] + ([self.facts["eos"]] if step == 0 else [])] = -np.inf
            rows.append(out.pop("logits").argmax(-1))
            if step + 1 == self.facts["max_new_tokens"] or all((np.stack(rows) == self.facts["eos"]).any(0)):
                break
            out = self.graphs["step"](out | {"token": rows[-1]})
            out = {name.removeprefix("next_"): value for name, value in out.items()}
        return np.stack(rows, 1).tolist()


def network_mask(mask, place, size):
    """Bring a mask to the network's input, bool [size, size]; one that vanishes there keeps the pixel nearest to its middle."""
    height, width, rows, columns, top, left = place
    y, x = (((np.arange(n) + 0.5) * side / n).astype(np.int64) for n, side in ((rows, height), (columns, width)))
    small = mask[y[:, None], x]
    if not small.any():
        y, x = (int(np.median(where)) for where in np.nonzero(mask))
        small[min(int(y * (rows / height)), rows - 1), min(int(x * (columns / width)), columns - 1)] = True
    placed = np.zeros((size, size), bool)
    placed[top : top + rows, left : left + columns] = small
    return placed


def main():
    """Print the expression for the objects of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image")
    parser.add_argument("--mask", action="append", required=True, help="a picture of the image's size, not black where the object is")
    parser.add_argument("--beside", action="append", default=[], help="the same, of another object that is there")
    given = parser.parse_args()
    masks = [np.asarray(Image.open(file).convert("L")) > 0 for file in given.mask + given.beside]
    print(Describer().describe(given.image, masks, [range(len(given.mask))])[0])


if __name__ == "__main__":
    main()
