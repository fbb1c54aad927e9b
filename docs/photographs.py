"""Draw README's picture: answers of a model about held-out photographs whose licence allows showing them, with the attribution beside.

    python docs/photographs.py --model runs/photos --data runs/photos/data --instances FILE [FILE ...] \
        --show 8021="the person on the left" --show 96640="the two cars on the right" --out docs/photographs.jpg

Only photographs of the split that no training saw, with licence 7 or 8 (no known restrictions) or 4 (CC BY 2.0) in the instance files, are
taken. Beside the picture a Markdown file of the same name gets one line for each: expression, link, licence. With `--plain FOLDER` the
photographs themselves are written, too, with `photographs.json`, as the page of `grex serve` shows them in its gallery
(`--plain grex_mllm/serve/photographs`).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from grex_mllm import GrexModel
from grex_mllm.data.coco import load_instances
from grex_mllm.data.dataset import FolderDataset
from grex_mllm.data.refs_program import status_of
from grex_mllm.draw import add_caption, contact_sheet, overlay
from grex_mllm.errors import fault
from grex_mllm.writing import whole_file

LICENCES = {7: "no known copyright restrictions", 8: "United States Government work", 4: "CC BY 2.0"}
WIDTH, COLUMNS, QUALITY = 640, 3, 80


def main(arguments: list[str] | None = None) -> int:
    """Run the program; a fault of the user's files is one line and status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--data", required=True, type=Path, help="dataset folder that it was trained on")
    parser.add_argument("--split", default="test", help="whose photographs no training saw (default: %(default)s)")
    parser.add_argument(
        "--instances", required=True, nargs="+", type=Path, help="COCO-format files with licence and link of the photographs"
    )
    parser.add_argument("--show", required=True, action="append", metavar="IMAGE_ID=EXPRESSION", help="what to ask")
    parser.add_argument("--out", type=Path, default=Path("docs/photographs.jpg"))
    parser.add_argument("--plain", type=Path, help="a folder for the photographs without answers")
    options = parser.parse_args(arguments)
    return status_of("docs/photographs.py", lambda: draw(options))


def draw(options: argparse.Namespace) -> None:
    """Write the picture and its attributions.

    Raises:
        GrexError: a photograph of another split or licence, or a wish of another form.
    """
    known = licences(options.instances)
    samples = FolderDataset(options.data, options.split, 10**9)
    places = {samples[n].record.image_id: n for n in range(len(samples))}
    wishes = [tuple(part.strip() for part in wish.partition("=")[::2]) for wish in options.show]
    for image_id, expression in wishes:
        if image_id not in places or not expression:
            given = f"--show {image_id}={expression}"
            raise fault(given, f"the id of a photograph of split {options.split}, =, and an expression", "fix it")
    model = GrexModel.from_pretrained(options.model)
    cards, lines, shown = [], [], []
    for image_id, expression in wishes:
        sample = samples[places[image_id]]
        entry = known.get(Path(sample.record.file).name, {})
        if entry.get("license") not in LICENCES or not entry.get("flickr_url"):
            given = f"photograph {image_id} with licence {entry.get('license')}"
            raise fault(given, f"one of {sorted(LICENCES)}, and a link", "show another photograph")
        answer = model.ground(sample.image, expression)
        picture = overlay(
            sample.image, answer.mask, answer.boxes_xyxy, answer.count, None, no_target=answer.no_target, factor=2, spotlight=True
        )
        picture = picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)))
        said = "nothing" if answer.no_target else f"{answer.count}"
        cards.append(add_caption(picture, f'"{expression}": {said}'))
        lines.append(f'- "{expression}": photograph [{entry["flickr_url"]}]({entry["flickr_url"]}), {LICENCES[entry["license"]]}')
        shown.append((sample.image, {"expression": expression, "link": entry["flickr_url"], "licence": LICENCES[entry["license"]]}))
    if options.plain is not None:
        write_plain(options.plain, shown)
    with whole_file(options.out) as work:
        contact_sheet(cards, COLUMNS).save(work, format="JPEG", quality=QUALITY)
    with whole_file(options.out.with_suffix(".md")) as work:
        head = "Photographs, none of which the model had seen; masks and boxes are its answers.\n\n"
        work.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


def write_plain(folder: Path, shown: list[tuple[Any, dict[str, str]]]) -> None:
    """Write photographs uint8 [H, W, 3] as N.jpg and what is known of them as photographs.json, a list in the same order."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (pixels, _) in enumerate(shown):
        with whole_file(folder / f"{number}.jpg") as work:
            Image.fromarray(pixels).save(work, format="JPEG", quality=QUALITY)
    with whole_file(folder / "photographs.json") as work:
        work.write_text(json.dumps([facts for _, facts in shown], indent=1) + "\n", encoding="utf-8")


def licences(files: list[Path]) -> dict[str, dict[str, Any]]:
    """Return the image entries of COCO-format files by file name."""
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        found |= {Path(image["file_name"]).name: image for image in load_instances(file).images.values()}
    return found


if __name__ == "__main__":
    sys.exit(main())
