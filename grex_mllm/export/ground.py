"""Ground expressions in an image without torch: python ground.py photo.jpg "the two people on the left" "the dog" --out answers"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tokenizers import Tokenizer


def onnx_graph(file, inputs, outputs):
    """Return a graph as a function from named arrays to named arrays. file: its path without the ending."""
    import onnxruntime

    session = onnxruntime.InferenceSession(f"{file}.onnx")
    return lambda arrays: dict(zip(outputs, session.run(outputs, {name: arrays[name] for name in inputs})))


class Model:
    """The model of an exported folder. `ground` answers expressions at the image's own size."""

    def __init__(self, folder=Path(__file__).parent, graph=onnx_graph):
        self.facts = json.loads((Path(folder) / "export.json").read_text(encoding="utf-8"))
        self.graphs = {name: graph(Path(folder) / name, **ends) for name, ends in self.facts["graphs"].items()}
        self.tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))

    def ground(self, image, expressions, size=None):
        """Return a dictionary for each expression. image: PIL or a file.  size: of the network's input, where export.json lets it vary."""
        arrays, results = self.network_input(image, size), []
        arrays |= self.graphs["image"](arrays) if "image" in self.graphs else {}
        answer, decide = list(self.graphs.values())[-2:]
        for text in expressions:
            code = self.tokenizer.encode(text)
            tokens = np.array([[code.ids], [code.attention_mask]], np.int64)[..., : self.facts["max_tokens"]]
            answers = answer(arrays | dict(zip(("text_ids", "text_mask"), tokens)))
            said = {name: value if name == "mask" else value.tolist() for name, value in decide(arrays | answers).items()}
            results.append({"expression": text, "count": None, "boxes_xyxy": None, "box_scores": None} | said)
        return results

    def network_input(self, image, size=None):
        """Return the picture as a viewer shows it (turned as its camera says, over white), normalised, and its place in there."""
        image = ImageOps.exif_transpose(image if isinstance(image, Image.Image) else Image.open(image)).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        size, squash = size or self.facts["image_size"], self.facts["resize"] == "squash"
        sides = [size if squash else max(1, round(side * (size / max(image.size)))) for side in image.size]
        picture = np.array(image.resize(sides, Image.Resampling.BILINEAR))
        return self.graphs["prepare"]({"picture": picture, "original": np.array(image.size), "size": np.array(size)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name, nargs, default in (("image", None, None), ("expression", "+", None), ("--out", None, ".")):
        parser.add_argument(name, nargs=nargs, default=default)
    given = parser.parse_args()
    Path(given.out).mkdir(parents=True, exist_ok=True)
    for number, result in enumerate(Model().ground(given.image, given.expression)):
        file = Path(given.out) / f"{Path(given.image).stem}.{number}.mask.png"
        Image.fromarray(result.pop("mask")).save(file)
        print(json.dumps(result | {"mask": str(file)}, ensure_ascii=False))
