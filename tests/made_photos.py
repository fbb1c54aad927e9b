"""A folder of drawn pictures in COCO's format, of two sources, with refs in gRefCOCO's; and tiny stages of a training on them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from tiny import tiny_config

from grex_mllm.config import to_dict

WIDTH, HEIGHT = 96, 72
SOURCES = {"cats": [(17, "cat")], "traffic": [(3, "car"), (6, "bus")]}
PER_SOURCE = 12
SPEAKER = {"lm": "tiny", "hidden_size": 16, "num_heads": 2, "num_layers": 1, "intermediate_size": 32, "projector_width": 16,
           "max_new_tokens": 6, "vocab_size": 300, "lora_rank": 4}  # fmt: skip


def made_coco(folder: Path, per_source: int = PER_SOURCE) -> Path:
    """Write both sources below `folder`, one with a gzipped instance file; ids are unique over them, as COCO's are."""
    for number, (name, categories) in enumerate(SOURCES.items()):
        images, annotations, place = [], [], folder / name
        (place / "images").mkdir(parents=True)
        for image_id in range(1000 * (number + 1), 1000 * (number + 1) + per_source):
            dice = np.random.default_rng(image_id)
            pixels = np.full((HEIGHT, WIDTH, 3), (90, 130, 90), np.uint8)
            for k in range(int(dice.integers(2, 4))):
                width, height = (int(side) for side in dice.integers(14, 24, 2))
                x, y = 3 + 32 * k, int(dice.integers(2, HEIGHT - height - 2))
                pixels[y : y + height, x : x + width] = [(200, 40, 40), (40, 40, 210), (240, 240, 240)][int(dice.integers(3))]
                polygon = [x, y, x + width, y, x + width, y + height, x, y + height]
                annotations.append(
                    {"id": 10 * image_id + k, "image_id": image_id, "category_id": categories[k % len(categories)][0], "iscrowd": 0}
                    | {"bbox": [x, y, width, height], "area": width * height, "segmentation": [[float(v) for v in polygon]]}
                )
            file = f"{image_id:012d}.png"
            Image.fromarray(pixels).save(place / "images" / file)
            images.append({"id": image_id, "file_name": file, "height": HEIGHT, "width": WIDTH})
        named = [{"id": key, "name": word, "supercategory": "thing"} for key, word in categories]
        text = json.dumps({"images": images, "annotations": annotations, "categories": named})
        if number:
            (place / "instances.json").write_text(text, encoding="utf-8")
        else:
            (place / "instances.json.gz").write_bytes(gzip.compress(text.encode()))
    return folder


def made_human(folder: Path, coco: Path) -> Path:
    """Write refs about the first three pictures of traffic, which are also in `coco`: they must not be trained on."""
    instances = json.loads((coco / "traffic" / "instances.json").read_text(encoding="utf-8"))
    (folder / "images").mkdir(parents=True)
    refs: list[dict[str, Any]] = []
    for n, image in enumerate(instances["images"][:3]):
        name = f"COCO_train2014_{image['file_name']}"  # the same photograph under COCO's older name
        (folder / "images" / name).write_bytes((coco / "traffic" / "images" / image["file_name"]).read_bytes())
        targets = [a["id"] for a in instances["annotations"] if a["image_id"] == image["id"]]
        for k, (text, chosen) in enumerate((("the car at the very left", targets[:1]), ("all of these", targets), ("a dog", [-1]))):
            refs.append(
                {"ref_id": 10 * n + k, "image_id": image["id"], "ann_id": chosen, "category_id": 3, "split": "test", "file_name": name}
                | {"sentences": [{"sent": text, "raw": text, "sent_id": 10 * n + k, "tokens": []}]}
            )
        image["file_name"] = name
    kept = {"images": instances["images"][:3], "categories": instances["categories"], "annotations": instances["annotations"]}
    ids = {image["id"] for image in kept["images"]}
    kept["annotations"] = [a for a in kept["annotations"] if a["image_id"] in ids]
    (folder / "instances.json").write_text(json.dumps(kept), encoding="utf-8")
    (folder / "grefs_few.json").write_text(json.dumps(refs), encoding="utf-8")
    return folder


def made_parts(folder: Path) -> Path:
    """Make the names that data_prep/weights.py looks for; the tiny stages read nothing of them."""
    for name in ("all-minilm-l6-v2", "smollm2-135m-instruct"):
        (folder / name).mkdir(parents=True)
    (folder / "efficientnet_lite0.safetensors").write_bytes(b"")
    return folder


def made_stages(folder: Path, **changes: object) -> list[str]:
    """Write three configurations: grounding alone, the projector aligned, both; two steps of two images each."""
    folder.mkdir(parents=True, exist_ok=True)
    speaker = {f"model__generator__{name}": value for name, value in SPEAKER.items()}
    tasks = {"ground": {"train__tasks": "ground"}, "align": {"train__tasks": "align"}, "joint": {}}
    files = []
    for name, task in tasks.items():
        fields = {"train__steps": 2, "train__batch_images": 2, "train__save_every": 1, "train__precision": "fp32"}
        fields |= {"data__expressions_per_image": 3, "predict__precision": "fp32", "train__num_threads": 1}
        config = to_dict(tiny_config(**(fields | task | ({} if name == "ground" else speaker) | changes)))  # type: ignore[arg-type]
        del config["data"]["train"], config["train"]["start"]  # the driver says where the data are, and what a stage starts from
        if name != "ground":
            config["model"]["text"]["tokenizer"] = None  # comes from the stage before
        files.append(str(folder / f"{name}.yaml"))
        Path(files[-1]).write_text("# tiny\n" + yaml.safe_dump(config), encoding="utf-8")
    return files
