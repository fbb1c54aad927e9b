"""Draw the gallery's pictures of scenes and their exact truth: every kind of expression, and sets of chosen objects.

    python docs/gallery.py --out docs/gallery

Equal arguments draw equal pixels. Nothing here is a model's answer; those are in docs/demo.png and docs/photographs.jpg.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from grex_mllm.data.refs_program import status_of
from grex_mllm.data.synthetic import SyntheticDataset
from grex_mllm.data.synthetic.settings import SyntheticConfig
from grex_mllm.draw import TRUTH, add_caption, contact_sheet, draw_objects, overlay
from grex_mllm.types import ExpressionRecord, Sample
from grex_mllm.writing import whole_file

NUM_SCENES, EXPRESSIONS = 60, 8
COLUMNS, SIDE, QUALITY = 4, 288, 88
NOTHING = "no_target"


def main(arguments: list[str] | None = None) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/gallery"))
    parser.add_argument("--scenes", type=int, default=NUM_SCENES, help="to choose from (default: %(default)s)")
    options = parser.parse_args(arguments)
    return status_of("docs/gallery.py", lambda: draw(options.out, options.scenes))


def draw(out: Path, num_scenes: int) -> None:
    """Write kinds.jpg and sets.jpg into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    scenes = SyntheticDataset(SyntheticConfig(), "test", num_scenes, EXPRESSIONS)
    samples = [scenes[n] for n in range(num_scenes)]
    save(contact_sheet([kind_card(*example) for example in one_of_each_kind(samples)], COLUMNS), out / "kinds.jpg")
    save(contact_sheet([set_card(*example) for example in some_sets(samples)], COLUMNS), out / "sets.jpg")


def one_of_each_kind(samples: list[Sample]) -> list[tuple[Sample, ExpressionRecord]]:
    """Return an example of each kind with a target, then a row of examples without one; scenes that were not yet shown come first."""
    kinds = sorted({record.tags[0] for sample in samples for record in sample.expressions})
    wanted = [(kind, False) for kind in kinds] + [(kind, True) for kind in kinds[:COLUMNS]]
    chosen: list[tuple[Sample, ExpressionRecord]] = []
    for kind, nothing in wanted:
        found = [(s, r) for s in samples for r in s.expressions if r.tags[0] == kind and (NOTHING in r.tags) == nothing]
        fresh = [one for one in found if all(one[0] is not shown for shown, _ in chosen)]
        chosen += (fresh or found)[:1]
    return chosen


def some_sets(samples: list[Sample]) -> list[tuple[Sample, ExpressionRecord]]:
    """Return expressions with two to five targets, one of a scene, as many as two rows hold."""
    chosen = []
    for sample in samples:
        wanted = [record for record in sample.expressions if 2 <= len(record.targets) <= 5]
        if wanted:
            chosen.append((sample, wanted[-1]))
    return chosen[: 2 * COLUMNS]


def targets_of(sample: Sample, record: ExpressionRecord) -> list[np.ndarray]:
    """Return the masks of an expression's targets, bool [H, W] each."""
    return [item.mask for item in sample.record.instances if item.annotation_id in record.targets and item.mask is not None]


def kind_card(sample: Sample, record: ExpressionRecord) -> Image.Image:
    """Draw an expression with its truth; the kind stands before the text."""
    masks = targets_of(sample, record)
    boxes = [item.box_xyxy for item in sample.record.instances if item.annotation_id in record.targets]
    mask = np.any(masks, axis=0) if masks else np.zeros(sample.image.shape[:2], bool)
    factor = SIDE // max(sample.image.shape[:2])
    picture = overlay(sample.image, mask, boxes, len(masks), no_target=not masks, colour=TRUTH, factor=factor, spotlight=True)
    return add_caption(picture, f"{record.tags[0].replace('_', ' ')}: {record.expression}")


def set_card(sample: Sample, record: ExpressionRecord) -> Image.Image:
    """Draw a set of objects as a generator is asked about them, with an expression that means exactly these."""
    factor = SIDE // max(sample.image.shape[:2])
    return add_caption(draw_objects(sample.image, targets_of(sample, record), factor=factor, spotlight=True), record.expression)


def save(picture: Image.Image, file: Path) -> None:
    """Write a JPEG, whole or not at all."""
    with whole_file(file) as work:
        picture.convert("RGB").save(work, format="JPEG", quality=QUALITY, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
