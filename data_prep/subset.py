"""Some images of a dataset folder, with their expressions, as a dataset folder of its own: to overfit, to try, to look at.

python data_prep/subset.py data/grefcoco --split val --images 16 --out data/sixteen
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

from grex_mllm.data.records import load_dataset
from grex_mllm.data.refs_program import status_of
from grex_mllm.data.writing import DatasetWriter
from grex_mllm.errors import fault

PROGRAM = "data_prep/subset.py"


def main(arguments: list[str] | None = None) -> int:
    """Run the program; a fault of the user's files is one line and status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="dataset folder to choose from")
    parser.add_argument("--split", required=True, help="split to choose from")
    parser.add_argument("--out", required=True, type=Path, help="dataset folder to make")
    parser.add_argument("--images", type=int, default=16, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which ones; images with several kinds of expressions come first")
    parser.add_argument("--image-root", type=Path, help="where the images lie, when not where dataset.json says")
    given = parser.parse_args(arguments)
    return status_of(PROGRAM, lambda: subset(given.folder, given.split, given.out, given.images, given.seed, given.image_root))


def subset(folder: Path, split: str, out: Path, num_images: int, seed: int, image_root: Path | None = None) -> None:
    """Write `num_images` images of a split: first those with no-target or multi-target expressions, the rest drawn by the seed.

    Raises:
        GrexError: a malformed folder, an unknown split, fewer images than asked for, or an output folder that exists.
    """
    data = load_dataset(folder, image_root)
    expressions = data.expressions_of(split)
    by_image: dict[str, list[int]] = {}
    for record in expressions:
        by_image.setdefault(record.image_id, []).append(len(record.targets))
    if num_images < 1 or num_images > len(by_image):
        raise fault(f"--images {num_images}", f"1 to {len(by_image)}, the images of split {split}", "ask for fewer")
    order = sorted(by_image)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda image_id: all(number == 1 for number in by_image[image_id]))  # stable: the drawn order stays within both halves
    chosen = set(order[:num_images])
    kept = [record for record in expressions if record.image_id in chosen]
    with DatasetWriter(out) as writer:
        writer.add_images([data.images[image_id] for image_id in by_image if image_id in chosen])
        writer.add_expressions(kept)
        writer.set_info(
            {
                "name": f"{data.name}-subset",
                "tool": PROGRAM,
                "sources": [{"folder": folder.name, "split": split, "images": num_images, "seed": seed}],
                "licence": data.info.get("licence", "as its source"),
                "image_root": str(data.image_root.resolve()),
                "skipped": {},
            }
        )
    print(f"{out}: {num_images} images, {len(kept)} expressions")


if __name__ == "__main__":
    sys.exit(main())
