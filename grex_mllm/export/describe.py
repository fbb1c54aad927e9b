"""Describe objects of an image without torch: python describe.py photo.jpg --mask left.png --mask right.png --beside dog.png"""

import argparse
from pathlib import Path

import numpy as np
from ground import Model, onnx_graph
from PIL import Image
from tokenizers import Tokenizer


class Describer:
    """The generator of an exported folder. `describe` writes one expression for each set of objects, the likeliest token at each step."""

    def __init__(self, folder=Path(__file__).parent):
        self.grounding = Model(folder)
        self.facts = self.grounding.facts["generator"]
        self.graphs = {name: onnx_graph(Path(folder) / name, **ends) for name, ends in self.facts["graphs"].items()}
        self.tokenizer = Tokenizer.from_file(str(Path(folder) / "lm_tokenizer.json"))

    def describe(self, image, masks, sets=None, size=None):
        """Return an expression for each set. masks: bool [H, W] of objects, at the image's size.  sets: positions in masks, for each set
        (None: all of them are one set); what a set leaves out, and what the model finds, stands beside it.  size: as in `Model.ground`."""
        given = self.grounding.network_input(image, size)
        given |= self.graphs["see"](given)
        known = self.with_found([np.asarray(mask, bool) for mask in masks], given)
        given["masks"] = np.stack([self.graphs["at_input"](given | {"mask": mask})["network_mask"] for mask in known])
        chosen = [set(range(len(masks)))] if sets is None else map(set, sets)
        given["chosen"] = np.array([[n in positions for n in range(len(known))] for positions in chosen])
        rows, eos = [], self.facts["eos"]
        for step in range(self.facts["max_new_tokens"]):
            given = self.graphs["step" if step else "prefix"](given)
            given = {name.removeprefix("next_"): value for name, value in given.items()}
            rows.append(given["token"])
            if all((np.stack(rows) == eos).any(0)):
                break
        tokens = np.stack([*rows, np.full_like(rows[0], eos)], 1).tolist()
        return [self.tokenizer.decode(row[: row.index(eos)]).strip() for row in tokens]

    def with_found(self, masks, given):
        """Return the masks and those of the objects that the model finds beside them, surest first."""
        known, share = list(masks), self.facts["most_overlap"]
        for logits in given.get("object_logits", ()):
            mask = self.graphs["at_image"](given | {"logits": logits})["mask"]
            if mask.any() and all((mask & other).sum() < share * max(1, min(mask.sum(), other.sum())) for other in known):
                known.append(mask)
        return known


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image")
    parser.add_argument("--mask", action="append", required=True, help="a picture of the image's size, not black where the object is")
    parser.add_argument("--beside", action="append", default=[], help="the same, of another object that is there")
    asked = parser.parse_args()
    objects = [np.asarray(Image.open(file).convert("L")) > 0 for file in asked.mask + asked.beside]
    print(Describer().describe(asked.image, objects, [range(len(asked.mask))])[0])
