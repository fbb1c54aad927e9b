"""Ground expressions with torch programs: python ground_torch.py photo.jpg "the two people on the left" "the dog" --out answers

Needs torch, numpy, PIL and tokenizers, none of the model's own code. From Python: Model(graph=torch_graph).ground(image, expressions).
"""

import argparse
import json
from pathlib import Path

import torch
from ground import Model
from PIL import Image


def torch_graph(file, inputs, outputs):
    """Return a program as a function from named arrays to named arrays. file: its path without the ending."""
    program = torch.export.load(f"{file}.pt2").module()

    def run(arrays):
        with torch.inference_mode():
            answers = program(*(torch.from_numpy(arrays[name]) for name in inputs))
        return dict(zip(outputs, (answer.numpy() for answer in answers)))

    return run


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name, nargs, default in (("image", None, None), ("expression", "+", None), ("--out", None, ".")):
        parser.add_argument(name, nargs=nargs, default=default)
    given = parser.parse_args()
    Path(given.out).mkdir(parents=True, exist_ok=True)
    for number, result in enumerate(Model(graph=torch_graph).ground(given.image, given.expression)):
        file = Path(given.out) / f"{Path(given.image).stem}.{number}.mask.png"
        Image.fromarray(result.pop("mask")).save(file)
        print(json.dumps(result | {"mask": str(file)}, ensure_ascii=False))
